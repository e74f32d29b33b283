"""`spkd extract`: run the teacher once over every view of a manifest and keep what it said."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spkd.audio import SAMPLE_RATE
from spkd.cache import (
    EMBEDDING,
    FBANK,
    LOGITS,
    Cache,
    Plan,
    Target,
    UnitWriter,
    claim_units,
    finalize,
    heartbeat,
    initialise,
)
from spkd.cache import card as cards
from spkd.cache.target import DTYPES
from spkd.cache.write import manifest_path
from spkd.config import ExtractConfig
from spkd.errors import SpkdError, UsageError, did_you_mean
from spkd.extract.teacher import Teacher
from spkd.features import fbank
from spkd.files import write_bytes
from spkd.manifest import Manifest, measure
from spkd.progress import say, track
from spkd.view import Batch, Player, ViewPlan, play

REJECTED = "rejected.csv"


@dataclass
class Report:
    """What one run did: views extracted, whether the cache is complete now, and what it lacks with the reasons."""

    views: int
    rejected: dict[str, str]
    complete: bool


def run(config: ExtractConfig, teacher: Teacher, manifest: Manifest) -> Report:
    """Extract the chosen targets into `config.cache`; continue where an earlier run of the same command stopped.

    Raises:
        UsageError: an unknown target or view plan. SpkdError: the folder holds another cache, or cannot be written.
    """
    targets = chosen_targets(config, teacher)
    view_plan = ViewPlan.parse(config.view)
    manifest, unreadable = measure(manifest, max(config.workers, 1) * 4)
    if not len(manifest):
        raise SpkdError(f"{manifest.source}: none of {len(unreadable)} utterances can be read")
    views = view_plan.views(manifest)
    plan = Plan.make(manifest, views, config.storage.unit_views, config.storage.unit_seconds)
    with_head = teacher.head is not None and LOGITS in config.teacher.targets
    card = cards.make(
        teacher.card(),
        targets,
        view_plan.card(),
        manifest,
        plan,
        {"kind": "cosine", "classes": teacher.head.classes, "scale": teacher.head.scale}
        if with_head and teacher.head
        else None,
    )
    root = Path(config.cache)
    initialise(root, card, plan, targets, _head_bytes(teacher) if with_head else None)

    min_seconds = max(config.min_seconds, teacher.min_samples / SAMPLE_RATE)
    player = Player(manifest, views, view_plan.augmentation, min_seconds, say)
    rejected: dict[str, str] = dict(unreadable)
    done = len(views) - sum(len(plan.unit(u)) for u in _open_units(root, plan))
    written = 0
    with track("extracting", len(views), "views", done) as bar:
        for unit in claim_units(root, plan.units):
            writer = UnitWriter(root, plan, targets, unit, card["fingerprint"])
            try:
                for batch in play(player, np.array(plan.unit(unit)), config.batch_size, config.workers, writer.reject):
                    _store(writer, teacher, targets, batch)
                    heartbeat(root, unit)
                    bar.advance(len(batch.rows))
                    written += len(batch.rows)
                lost = writer.commit()
            except BaseException:
                writer.abandon()
                raise
            for row, reason in lost.items():
                rejected[_view_name(manifest, plan, row)] = reason
            bar.advance(len(lost))
    complete = finalize(root, plan.units)
    if complete:
        rejected = _list_rejections(root, manifest, plan, unreadable)
    return Report(written, rejected, complete)


def chosen_targets(config: ExtractConfig, teacher: Teacher) -> list[Target]:
    """The targets to store: those asked for, in the asked dtype, and fbank on request (always without a teacher).

    Logits of a teacher with a cosine head are not stored: the embedding and the head are, from which they follow
    exactly.
    """
    names = config.teacher.targets if teacher.targets else []
    for name in names:
        if name not in teacher.targets:
            raise UsageError(
                f"teacher={teacher.family} has no target {name!r}{did_you_mean(name, teacher.targets)} "
                f"(it has {', '.join(teacher.targets)})"
            )
    stored = [n for n in dict.fromkeys(names) if n != LOGITS or teacher.head is None]
    if LOGITS in names and teacher.head is not None and EMBEDDING not in stored:
        stored.append(EMBEDDING)
    targets = [teacher.targets[name] for name in stored] + ([FBANK] if config.fbank or not teacher.targets else [])
    if not targets:
        raise UsageError("teacher.targets: name at least one target")
    if config.storage.dtype not in DTYPES:
        raise UsageError(f"storage.dtype={config.storage.dtype}{did_you_mean(config.storage.dtype, DTYPES)}")
    return [Target(t.name, t.dim, t.hop, t.window, config.storage.dtype) for t in targets]


def _store(writer: UnitWriter, teacher: Teacher, targets: list[Target], batch: Batch) -> None:
    said = teacher.say(batch.waves, [t.name for t in targets if t.name != FBANK.name])
    if any(t.name == FBANK.name for t in targets):
        said[FBANK.name] = fbank(batch.waves).numpy()
    for name, values in said.items():
        for row, value in zip(batch.rows, values, strict=True):
            writer.put(name, int(row), value)


def _open_units(root: Path, plan: Plan) -> Iterator[int]:
    return (unit for unit in range(plan.units) if not manifest_path(root, unit).is_file())


def _view_name(manifest: Manifest, plan: Plan, row: int) -> str:
    """The utterance's id, and which of its views where there are several."""
    utterance = int(plan.views.utterance[row])
    first = int(np.searchsorted(plan.views.utterance, utterance))
    return (
        manifest[utterance].id if len(plan.views) == len(manifest) else f"{manifest[utterance].id} view {row - first}"
    )


def _head_bytes(teacher: Teacher) -> bytes:
    from safetensors.torch import save

    assert teacher.head is not None
    return save({"weight": teacher.head.weight.float().cpu().contiguous()})


def _list_rejections(root: Path, manifest: Manifest, plan: Plan, unreadable: dict[str, str]) -> dict[str, str]:
    """Every utterance or view left out of a complete cache, with the reason; kept as rejected.csv if there is one."""
    rejected = dict(unreadable)
    for row, reason in Cache.open(root).rejected.items():
        rejected[_view_name(manifest, plan, row)] = reason
    if rejected:
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([("utt", "reason"), *rejected.items()])
        write_bytes(root / REJECTED, out.getvalue().encode())
    return rejected
