"""Parts of caches that no teacher made, for benchmarks of storage alone."""

from __future__ import annotations

from collections.abc import Sequence

from spkd.cache import Card, Part, Plan, TeacherCard
from spkd.config import ViewConfig
from spkd.manifest import Manifest
from spkd.target import Target
from spkd.view import ViewPlan


def make_card(targets: Sequence[Target], manifest: Manifest, plan: Plan) -> Card:
    """The card of a cache of one part."""
    teacher = TeacherCard("benchmark", "", "none", "synthetic", "none")
    part = Part(manifest.digest, len(manifest), round(manifest.seconds / 3600, 3), len(plan.views), plan.units)
    views = ViewPlan.parse(ViewConfig()).card()
    return Card(teacher, tuple(targets), views, plan.unit_views, plan.unit_seconds, None, None, (part,))
