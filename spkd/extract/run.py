"""`spkd extract`: run the teacher once over every view of a manifest and store its outputs."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from spkd.cache.background import Background
from spkd.cache.card import Card, Part
from spkd.cache.claims import claim_units, heartbeat
from spkd.cache.codebook import Codebook
from spkd.cache.folder import CARD, commit_path, load_card
from spkd.cache.plan import Plan
from spkd.cache.read import Cache
from spkd.cache.write import UnitWriter, check_folder, finalize, initialise
from spkd.config import ExtractConfig
from spkd.errors import SpkdError
from spkd.extract.calibrate import calibrate
from spkd.extract.targets import chosen_targets, extract_targets
from spkd.files import write_bytes
from spkd.loader import ViewLoader, iterate_batches
from spkd.manifest import Manifest, measure
from spkd.progress import log, track
from spkd.target import LOGITS
from spkd.teachers import Teacher
from spkd.view import ViewPlan

REJECTED = "rejected.csv"
HALF = np.dtype("<f2")


@dataclass
class Report:
    """What one run did.

    Attributes:
        views: extracted.
        rejected: what the cache lacks, with the reasons.
        complete: whether the cache is complete now.
    """

    views: int
    rejected: dict[str, str]
    complete: bool


def extract(config: ExtractConfig, teacher: Teacher, manifest: Manifest) -> Report:
    """Extract the chosen targets into `config.cache`; continue where an earlier run of the same command stopped, and
    add what a longer manifest brings to a cache that is there.

    Raises:
        UsageError: an unknown target, codec or view plan. SpkdError: the folder holds another cache, or cannot be
            written.
    """
    root, targets = Path(config.cache), chosen_targets(config, teacher)
    view_plan = ViewPlan.parse(config.view)
    manifest, unreadable = measure(manifest, config.workers * 4)
    manifest, too_long = fitting(manifest, config)
    unreadable |= too_long
    if not len(manifest):
        raise SpkdError(f"{manifest.source}: none of {len(unreadable)} utterances can be read")
    manifests = split_by_parts(root, manifest)
    storage = config.storage
    plans = [Plan.make(m, view_plan.views(m), storage.unit_views, storage.unit_seconds) for m in manifests]
    plan, manifest = Plan.join(plans), Manifest(tuple(u for m in manifests for u in m), manifest.source)
    loader = teacher.view_loader(manifest, plan.views, view_plan.augmentation, config.min_seconds)

    head = teacher.head if LOGITS in config.teacher.targets else None
    logits_stored = head is not None and LOGITS in [t.name for t in targets]
    parts = tuple(_part(m, p) for m, p in zip(manifests, plans, strict=True))
    head_card = None if head is None else head.card(logits_stored)
    card = Card(
        teacher.card(),
        tuple(targets),
        view_plan.card(),
        plan.unit_views,
        plan.unit_seconds,
        head_card,
        None,
        parts,
    )
    codebook = Codebook.load(root, targets, card.series) if root.is_dir() else None
    if codebook is None:
        check_folder(root, targets)
        codebook = calibrate(teacher, loader, targets, head, logits_stored, config).create(root, card.series, targets)
    card = replace(card, codecs=codebook.digest, errors=codebook.errors)
    initialise(root, card, plans, None if head is None or logits_stored else head.to_bytes())
    report = _extract(config, root, card, plan, codebook, teacher, loader)
    loader.report_doubts()
    report.rejected |= unreadable
    report.complete = finalize(root, card, plan)
    if report.complete:
        report.rejected = _list_rejections(root, manifest, plan, unreadable)
    return report


def _extract(
    config: ExtractConfig, root: Path, card: Card, plan: Plan, codebook: Codebook, teacher: Teacher, loader: ViewLoader
) -> Report:
    """Fill every unit that is nobody else's; the rows are written in the background."""
    report = Report(0, {}, False)
    open_units = (unit for unit in range(plan.units) if not commit_path(root, unit).is_file())
    done = len(plan.views) - sum(len(plan.unit(unit)) for unit in open_units)
    halves = [target.name for target in card.targets if codebook.codecs[target.name].dtype == HALF]
    writers: dict[int, UnitWriter] = {}

    def commit(unit: int) -> None:
        lost = writers[unit].commit()
        del writers[unit]
        if lost is None:
            log(f"unit {unit} was taken over by another worker while this one was stopped; it is left to that one")
            return
        report.rejected |= {_view_name(loader.manifest, plan, view): reason for view, reason in lost.items()}

    try:
        with track("extracting", len(plan.views), "views", done) as bar, Background() as background:
            for unit in claim_units(root, plan.units):
                writer = writers[unit] = UnitWriter(root, card, plan, unit, codebook.codecs)

                def reject(view: int, reason: str, writer: UnitWriter = writer) -> None:
                    writer.reject(view, reason)
                    bar.advance(1)

                views = np.array(plan.unit(unit))
                for batch in iterate_batches(loader, views, config.batch_size, config.workers, reject):
                    for name, values in extract_targets(teacher, batch, card.targets, halves).items():
                        background(writer.put, name, batch.views, values)
                    heartbeat(root, unit)
                    bar.advance(len(batch.views))
                    report.views += len(batch.views)
                background.commit(commit, unit)
    finally:
        for writer in writers.values():  # empty unless something failed
            writer.abandon()
    return report


def fitting(manifest: Manifest, config: ExtractConfig) -> tuple[Manifest, dict[str, str]]:
    """The utterances whose views fit into a unit, and the reason for each of the others."""
    most = config.storage.unit_seconds * min(config.view.speeds, default=1.0)
    if config.view.plan != "full":
        return manifest, {}
    reason = "{:.0f} s in one view; take view=windows:SECONDS/HOP, or raise storage.unit_seconds ({:g})"
    long = {u.id: reason.format(u.duration, most) for u in manifest if (u.duration or 0.0) > most}
    return Manifest(tuple(u for u in manifest if u.id not in long), manifest.source), long


def _part(manifest: Manifest, plan: Plan) -> Part:
    """The card's entry of one part: its manifest, and the plan made of it."""
    hours = round(manifest.seconds / 3600, 3)
    return Part(manifest.digest, len(manifest), hours, len(plan.views), plan.units)


def split_by_parts(root: Path, manifest: Manifest) -> list[Manifest]:
    """A manifest as the parts of the cache at `root`, then what that cache lacks; whole where there is none, or one of
    something else (which `initialise` refuses)."""
    if not (root / CARD).is_file():
        return [manifest]
    card = load_card(root)
    known = Plan.load(root, card).utterances
    parts = card.pick_parts(known, manifest)
    if parts is None:
        return [manifest]
    there = set(known)
    new = tuple(u for u in manifest if u.id not in there)
    return [*parts, *([Manifest(new, manifest.source)] if new else [])]


def _view_name(manifest: Manifest, plan: Plan, view: int) -> str:
    """The utterance's id, and which of its views where there are several."""
    utterance = int(plan.views.utterance[view])
    first = int(np.searchsorted(plan.views.utterance, utterance))
    return (
        manifest[utterance].id if len(plan.views) == len(manifest) else f"{manifest[utterance].id} view {view - first}"
    )


def _list_rejections(root: Path, manifest: Manifest, plan: Plan, unreadable: dict[str, str]) -> dict[str, str]:
    """Every utterance or view left out of a complete cache, with the reason; kept as rejected.csv if there is one."""
    rejected = dict(unreadable)
    for view, reason in Cache.open(root).rejected.items():
        rejected[_view_name(manifest, plan, view)] = reason
    if rejected:
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([("utt", "reason"), *rejected.items()])
        write_bytes(root / REJECTED, out.getvalue().encode())
    return rejected
