"""Export of one target to Kaldi's ark and scp or to .npy, and import of another toolkit's vectors as a cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
from spkd.files.text import counted
from spkd.files.vectors import joined, read_vectors, write_vectors
from spkd.outputs.settings import StorageConfig
from spkd.outputs.target import EMBEDDING, Target
from spkd.outputs.teacher_card import TeacherCard

FAMILY = "vectors"  # family of the teacher on the card of a cache made of vectors
AT_ONCE = 256  # views read together


def export_vectors(cache: Cache, out: Path, name: str) -> int:
    """Write one target of every view, decoded: vectors, or matrices of frames.

    Where utterances have several views, their names end in -0, -1, ...

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
    cache.sources([name])
    vectors = cache.target(name).hop is None
    for start in range(0, len(cache.usable_views), AT_ONCE):
        batch = cache.usable_views[start : start + AT_ONCE]
        if vectors:
            rows = list(cache.batch(batch, [name])[name].float().numpy())
        else:
            rows = [cache.batch(np.array([view]), [name])[name][0].float().numpy() for view in batch]
        numbers = views.utterance[batch]
        first = cache.plan.tables.views_of(numbers)[0]
        for view, utterance, begin, values in zip(batch, numbers.tolist(), first, rows, strict=True):
            yield (f"{utterances[utterance]}-{view - begin}" if several else utterances[utterance]), values


def import_vectors(source: Path, manifest: Manifest, root: Path) -> str:
    """Make a cache with one view of every utterance, whose embedding is the vector of the same name, atomically.

    Utterances without a vector are rejected views of the cache; those whose audio cannot be used are left out.

    Returns:
        Phrase that says how many utterances have a vector, and what was left out.
    Raises:
        UsageError: as of `read_vectors`.
        SpkdError: as of `read_vectors`; no usable utterance has a vector; or `root` exists already.
    """
    names, vectors = joined(list(read_vectors(source)), str(source))
    by_name = {name: i for i, name in enumerate(names)}
    listed = {u.id for u in manifest}
    if not listed & by_name.keys():
        raise SpkdError(f"{source}: has no vector of an utterance of {manifest.source} (for example {names[0]!r})")
    manifest, unusable = measure(manifest)
    if not any(u.id in by_name for u in manifest):
        raise SpkdError(f"{manifest.source}: no utterance with a vector can be used ({_first(unusable)})")
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
        0.0,
        plan.unit_views,
        plan.unit_seconds,
        None,
        None,
        (part_of(manifest, plan),),
    )
    rejected = {i: f"no vector in {source.name}" for i, u in enumerate(manifest) if u.id not in by_name}
    with building(root, Metadata(card, {str(plan_path(0)): plan.to_bytes()}), unusable) as builder:
        for unit in builder.units():
            kept = (view for view in plan.unit(unit) if view not in rejected)
            rows = ((v, {EMBEDDING: vectors[by_name[manifest[v].id]][None]}) for v in kept)
            builder.write(unit, rejected, rows)
    phrase = f"{len(listed & by_name.keys())} of {counted(len(listed), 'utterance')} have a vector in {source}"
    if unusable:
        phrase += f"; left out: {counted(len(unusable), 'utterance')} that cannot be used ({_first(unusable)})"
    if of_none := [name for name in names if name not in listed]:
        phrase += f"; not used: {counted(len(of_none), 'vector')} of other names (the first: {of_none[0]})"
    return phrase


def _first(unusable: Mapping[str, str]) -> str:
    return ": ".join(next(iter(unusable.items())))
