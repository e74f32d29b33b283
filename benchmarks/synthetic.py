"""Caches that no teacher made, for benchmarks of storage and mining alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from spkd.cache import Card, Part, Plan, UnitWriter, claim_units, finalize, initialise
from spkd.cache.codec import make_codec
from spkd.corpus.manifest import Manifest
from spkd.corpus.settings import ViewConfig
from spkd.corpus.view import ViewPlan, Views
from spkd.outputs.target import Target
from spkd.outputs.teacher_card import TeacherCard


def make_card(targets: Sequence[Target], manifest: Manifest, plan: Plan) -> Card:
    """The card of a cache of one part."""
    teacher = TeacherCard("benchmark", "", "none", "synthetic", "none")
    part = Part(manifest.digest, len(manifest), round(manifest.seconds / 3600, 3), len(plan.views), plan.units)
    views = ViewPlan.parse(ViewConfig()).card()
    return Card(teacher, tuple(targets), views, 0.0, plan.unit_views, plan.unit_seconds, None, None, (part,))


def whole_views(samples: np.ndarray, each: int = 1) -> Views:
    """`each` views, as recorded, of every utterance.

    Args:
        samples: of a view, by utterance.
    """
    count = len(samples) * each
    return Views(
        utterance=np.repeat(np.arange(len(samples), dtype=np.int32), each),
        start=np.zeros(count, np.int64),
        samples=np.repeat(samples.astype(np.int32), each),
        speed=np.ones(count, np.float32),
        formants=np.ones(count, np.float32),
        seed=np.arange(count, dtype=np.uint32),
    )


def write_cache(
    root: Path,
    targets: Sequence[Target],
    manifest: Manifest,
    samples: int,
    unit_views: int,
    values: Callable[[Target, np.ndarray], np.ndarray],
) -> None:
    """A complete cache of one view of `samples` samples of every utterance.

    Args:
        values: outputs of a target for the views of a unit, (B, T, dim) or (B, dim).
    """
    views = whole_views(np.full(len(manifest), samples))
    plan = Plan.make(manifest, views, unit_views, 100_000.0)
    card = make_card(targets, manifest, plan)
    initialise(root, card, [plan])
    codecs = {target.name: make_codec(target.codec, target.dim) for target in targets}
    for unit in claim_units(root, plan.units):
        writer = UnitWriter(root, card, plan, unit, codecs)
        rows = np.asarray(plan.unit(unit))
        for target in targets:
            writer.put(target.name, rows, values(target, rows))
        writer.commit()
    if not finalize(root, card, plan):
        raise SystemExit(f"{root}: not complete")
