"""Export of one target to Kaldi's ark and scp or to .npy, and import of another toolkit's vectors as a cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from spkd.cache.card import Card
from spkd.cache.exchange.transfer import Metadata, building
from spkd.cache.folder import plan_path
from spkd.cache.plan import Plan, part_of
from spkd.cache.read import Cache
from spkd.corpus.manifest import Manifest, measure
from spkd.corpus.settings import ViewConfig
from spkd.corpus.view import ViewPlan
from spkd.errors import SpkdError
from spkd.files import digest
from spkd.files.vectors import joined, read_vectors, write_vectors
from spkd.outputs.settings import StorageConfig
from spkd.outputs.target import EMBEDDING, Target
from spkd.outputs.teacher_card import TeacherCard

FAMILY = "vectors"  # family of the teacher on the card of a cache made of vectors
AT_ONCE = 256  # views read together


def export_vectors(cache: Cache, out: Path, name: str) -> int:
    """Write one target of every view, decoded: vectors, or matrices of frames.

    Where utterances have several views, their names end in -0, -1, ...

    Args:
        cache: the cache.
        out: the file to write.
        name: name of the target.
    Returns:
        Number of views written.
    Raises:
        UsageError: as of `write_vectors`.
        SpkdError: the cache lacks the target.
    """
    return write_vectors(out, _rows(cache, name))


def _rows(cache: Cache, name: str) -> Iterator[tuple[str, np.ndarray]]:
    views, utterances = cache.plan.views, cache.plan.utterances
    several = len(views) > len(utterances)
    first = np.searchsorted(views.utterance, np.arange(len(utterances)))
    cache.sources([name])
    vectors = cache.target(name).hop is None
    for start in range(0, len(cache.usable_views), AT_ONCE):
        batch = cache.usable_views[start : start + AT_ONCE]
        if vectors:
            rows = list(cache.batch(batch, [name])[name].float().numpy())
        else:
            rows = [cache.batch(np.array([view]), [name])[name][0].float().numpy() for view in batch]
        for view, values in zip(batch, rows, strict=True):
            utterance = int(views.utterance[view])
            identity = utterances[utterance]
            yield (f"{identity}-{view - first[utterance]}" if several else identity), values


def import_vectors(source: Path, manifest: Manifest, root: Path) -> int:
    """Make a cache with one view of every utterance, whose embedding is the vector of the same name, atomically.

    Utterances without a vector are rejected views of the cache.

    Args:
        source: file of the vectors.
        manifest: the utterances.
        root: folder of the new cache.
    Returns:
        Number of utterances that have a vector.
    Raises:
        UsageError: as of `read_vectors`.
        SpkdError: as of `read_vectors`; no utterance has a vector; or `root` exists already.
    """
    names, vectors = joined(list(read_vectors(source)), str(source))
    by_name = {name: i for i, name in enumerate(names)}
    manifest, _ = measure(manifest)
    if not any(u.id in by_name for u in manifest):
        raise SpkdError(f"{source}: has no vector of an utterance of {manifest.source} (for example {names[0]!r})")
    view_plan, storage = ViewPlan.parse(ViewConfig()), StorageConfig()
    plan = Plan.make(manifest, view_plan.views(manifest), storage.unit_views, storage.unit_seconds)
    target = Target(EMBEDDING, vectors.shape[1], codec="float32")
    teacher = TeacherCard(
        FAMILY,
        digest.of_bytes(vectors.tobytes()),
        "the owner's",
        source.name,
        "not known: the vectors were computed by another program",
    )
    card = Card(
        teacher,
        (target,),
        view_plan.card(),
        plan.unit_views,
        plan.unit_seconds,
        None,
        None,
        (part_of(manifest, plan),),
    )
    rejected = {i: f"no vector in {source.name}" for i, u in enumerate(manifest) if u.id not in by_name}
    with building(root, Metadata(card, {str(plan_path(0)): plan.to_bytes()})) as builder:
        for unit in builder.units():
            kept = (view for view in plan.unit(unit) if view not in rejected)
            rows = ((v, {EMBEDDING: vectors[by_name[manifest[v].id]][None]}) for v in kept)
            builder.write(unit, rejected, rows)
    return len(manifest) - len(rejected)
