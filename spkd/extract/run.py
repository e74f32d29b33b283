"""`spkd extract`: run the teacher once over every view of a manifest and keep what it said."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from spkd.audio import SAMPLE_RATE
from spkd.cache import (
    EMBEDDING,
    FBANK,
    FEATURES,
    LOGITS,
    WAVE,
    Background,
    Cache,
    Codebook,
    Plan,
    Target,
    UnitWriter,
    claim_units,
    finalize,
    heartbeat,
    initialise,
)
from spkd.cache import card as cards
from spkd.cache import codebook as codebooks
from spkd.cache import codec as codecs
from spkd.cache.head import STORED
from spkd.cache.write import check_folder, manifest_path
from spkd.config import ExtractConfig
from spkd.errors import SpkdError, UsageError, did_you_mean
from spkd.extract.calibrate import calibrate, said_of
from spkd.extract.teacher import Teacher
from spkd.files import write_bytes
from spkd.manifest import Manifest, measure
from spkd.progress import say, track
from spkd.view import Player, ViewPlan, play

REJECTED = "rejected.csv"


@dataclass
class Report:
    """What one run did: views extracted, whether the cache is complete now, and what it lacks with the reasons."""

    views: int
    rejected: dict[str, str]
    complete: bool


def run(config: ExtractConfig, teacher: Teacher, manifest: Manifest) -> Report:
    """Extract the chosen targets into `config.cache`; continue where an earlier run of the same command stopped, and
    add what a longer manifest brings to a cache that is there.

    Raises:
        UsageError: an unknown target, codec or view plan. SpkdError: the folder holds another cache, or cannot be
            written.
    """
    root, targets = Path(config.cache), chosen_targets(config, teacher)
    view_plan = ViewPlan.parse(config.view)
    manifest, unreadable = measure(manifest, max(config.workers, 1) * 4)
    if not len(manifest):
        raise SpkdError(f"{manifest.source}: none of {len(unreadable)} utterances can be read")
    manifests = parts_of(root, manifest)
    storage = config.storage
    plans = [Plan.make(m, view_plan.views(m), storage.unit_views, storage.unit_seconds) for m in manifests]
    plan, manifest = Plan.join(plans), Manifest(tuple(u for m in manifests for u in m), manifest.source)
    min_seconds = max(config.min_seconds, teacher.min_samples / SAMPLE_RATE)
    player = Player(manifest, plan.views, view_plan.augmentation, min_seconds, say)

    parts = [cards.part(m, p) for m, p in zip(manifests, plans, strict=True)]
    head = teacher.head if LOGITS in config.teacher.targets else None
    if head is not None and LOGITS in [t.name for t in targets]:
        head = replace(head, kind=STORED)
    described = (teacher.card(), targets, view_plan.card(), parts, plan, head)
    series = cards.series(cards.make(*described))
    codebook = codebooks.load(root, targets, series) if root.is_dir() else None
    if codebook is None:
        check_folder(root, targets)
        codebook = calibrate(teacher, player, targets, head, config).create(root, series, targets)
    card = cards.make(*described, codebook.digest, codebook.errors)
    initialise(root, card, plans, targets, None if head is None or head.kind == STORED else head.to_bytes())
    report = _extract(config, root, card, plan, targets, codebook, teacher, player)
    report.rejected |= unreadable
    report.complete = finalize(root, card, plan)
    if report.complete:
        report.rejected = _list_rejections(root, manifest, plan, unreadable)
    return report


def _extract(
    config: ExtractConfig,
    root: Path,
    card: dict[str, Any],
    plan: Plan,
    targets: list[Target],
    codebook: Codebook,
    teacher: Teacher,
    player: Player,
) -> Report:
    """Fill every unit that is nobody else's; the rows reach the disk behind the teacher's back."""
    report = Report(0, {}, False)
    open_units = (unit for unit in range(plan.units) if not manifest_path(root, unit).is_file())
    done = len(plan.views) - sum(len(plan.unit(unit)) for unit in open_units)
    halves = [target.name for target in targets if target.codec.removesuffix(codecs.ZSTD) == "float16"]
    writers: dict[int, UnitWriter] = {}

    def commit(unit: int) -> None:
        lost = writers[unit].commit()
        del writers[unit]
        report.rejected |= {_view_name(player.manifest, plan, row): reason for row, reason in lost.items()}

    try:
        with track("extracting", len(plan.views), "views", done) as bar, Background() as background:
            for unit in claim_units(root, plan.units):
                key = cards.part_key(card, plan.part(unit)[0])
                writer = writers[unit] = UnitWriter(root, plan, targets, unit, key, codebook.codecs)

                def reject(row: int, reason: str, writer: UnitWriter = writer) -> None:
                    writer.reject(row, reason)
                    bar.advance(1)

                rows = np.array(plan.unit(unit))
                for batch in play(player, rows, config.batch_size, config.workers, reject):
                    for name, values in said_of(teacher, batch, targets, halves).items():
                        background(writer.put, name, batch.rows, values)
                    heartbeat(root, unit)
                    bar.advance(len(batch.rows))
                    report.views += len(batch.rows)
                background.commit(commit, unit)
    finally:
        for writer in writers.values():  # empty unless something failed
            writer.abandon()
    return report


def parts_of(root: Path, manifest: Manifest) -> list[Manifest]:
    """A manifest as the parts of the cache at `root`, and behind them what that cache lacks; whole where there is none,
    or one of something else (which `initialise` refuses)."""
    if not (root / cards.FILE).is_file():
        return [manifest]
    card = cards.load(root)
    known = Plan.load(root, len(card["parts"])).utterances
    parts = cards.pick_parts(card, known, manifest)
    if parts is None:
        return [manifest]
    there = set(known)
    new = tuple(u for u in manifest if u.id not in there)
    return [*parts, *([Manifest(new, manifest.source)] if new else [])]


def chosen_targets(config: ExtractConfig, teacher: Teacher) -> list[Target]:
    """The targets to store: those asked for, under the asked codecs, and features on request (or without teacher).

    Logits of a teacher with a head are not stored unless a codec is named for them: the embedding and the head are,
    from which they follow exactly.
    """
    names, chosen = config.teacher.targets if teacher.targets else [], config.storage.codecs
    for name in names:
        if name not in teacher.targets:
            raise UsageError(
                f"teacher={teacher.family} has no target {name!r}{did_you_mean(name, teacher.targets)} "
                f"(it has {', '.join(teacher.targets)})"
            )
    follows = LOGITS in names and teacher.head is not None and LOGITS not in chosen
    stored = [name for name in dict.fromkeys(names) if name != LOGITS or not follows]
    if follows and EMBEDDING not in stored:
        stored.append(EMBEDDING)
    targets = [teacher.targets[name] for name in stored]
    targets += [FBANK] if config.fbank or not (teacher.targets or config.wave) else []
    targets += [WAVE] if config.wave else []
    if not targets:
        raise UsageError("teacher.targets: name at least one target")
    for name in chosen:
        if name not in [t.name for t in targets]:
            raise UsageError(f"storage.codecs: no target {name!r} is stored{did_you_mean(name, [*names, *FEATURES])}")
    targets = [target.stored_as(chosen.get(target.name, config.storage.codec)) for target in targets]
    for target in targets:
        codecs.make(target.codec, target.dim)
        if target.codec.startswith("topk") and target.name != LOGITS:
            raise UsageError(f"storage: {target.codec} is for logits, not for {target.name}")
    return targets


def _view_name(manifest: Manifest, plan: Plan, row: int) -> str:
    """The utterance's id, and which of its views where there are several."""
    utterance = int(plan.views.utterance[row])
    first = int(np.searchsorted(plan.views.utterance, utterance))
    return (
        manifest[utterance].id if len(plan.views) == len(manifest) else f"{manifest[utterance].id} view {row - first}"
    )


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
