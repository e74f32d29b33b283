"""`spkd extract`: run the teacher once over every view of a manifest and store its outputs."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from spkd.cache.background import Background
from spkd.cache.card import Card, Part
from spkd.cache.claims import claim, heartbeat
from spkd.cache.codebook import Codebook
from spkd.cache.folder import CARD, commit_path, load_card
from spkd.cache.plan import Plan, part_of
from spkd.cache.read import Cache
from spkd.cache.write import UnitWriter, check_folder, finalize, initialise
from spkd.corpus.audio import SAMPLE_RATE
from spkd.corpus.loader import ViewLoader, WaveBatch, stream_batches
from spkd.corpus.manifest import Manifest, measure
from spkd.corpus.view import ViewPlan
from spkd.device import resolve
from spkd.errors import SpkdError, UsageError
from spkd.extract import speed
from spkd.extract.fit_codecs import calibrate
from spkd.extract.ranks import Rank, Work
from spkd.extract.settings import ExtractConfig
from spkd.extract.targets import chosen_targets, extract_targets
from spkd.files.atomic import write_bytes
from spkd.meter import Meter
from spkd.outputs.target import LOGITS, Target
from spkd.progress import log, track
from spkd.teachers import load_teacher
from spkd.teachers.base import Teacher

REJECTED = "rejected.csv"
HALF = np.dtype("<f2")
WAIT = 0.5  # s between two looks at what other processes do


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


@dataclass
class Job:
    """A teacher and the cache that its outputs go to.

    Attributes:
        config: its settings; jobs of one pass differ in cache, teacher and storage alone.
    """

    config: ExtractConfig
    teacher: Teacher


def extract(config: ExtractConfig, teacher: Teacher, manifest: Manifest) -> Report:
    """`extract_jobs` with one teacher."""
    return extract_jobs([Job(config, teacher)], manifest)[0]


def load_and_extract(configs: Sequence[ExtractConfig], manifest: Manifest, rank: Rank | None = None) -> list[Report]:
    """`extract_jobs` with the teachers that the settings name.

    Raises:
        UsageError, SpkdError: as load_teacher and extract_jobs.
    """
    device = resolve(configs[0].device)
    return extract_jobs([Job(config, load_teacher(config.teacher, device)) for config in configs], manifest, rank)


def extract_jobs(jobs: Sequence[Job], manifest: Manifest, rank: Rank | None = None) -> list[Report]:
    """Extract the chosen targets of every job into its cache, in one pass over the audio; continue where an earlier run
    of the same command stopped, and add what a longer manifest brings to caches that are there.

    Args:
        rank: which of several processes this is; each stays until the caches are complete, and takes over what others
            leave.
    Raises:
        UsageError: an unknown target, codec or view plan, or jobs over other views. SpkdError: a folder holds another
            cache, or cannot be written.
    """
    config = jobs[0].config
    view_plan = ViewPlan.parse(config.view)
    chosen = [chosen_targets(job.config, job.teacher) for job in jobs]
    listed = manifest
    manifest, unreadable = measure(manifest, config.workers * 4)
    manifest, too_long = fitting(manifest, config)
    unreadable |= too_long
    if not len(manifest):
        raise SpkdError(
            f"{manifest.source}: none of {len(unreadable)} utterances can be read; {_first(listed, unreadable)}"
        )
    loader, stores = _prepared(jobs, chosen, manifest, view_plan)
    views, meter = _extract(config, loader, stores, rank)
    loader.report_doubts()
    if rank is None:
        speed.report(meter, config.workers)
    reports = []
    for store, count in zip(stores, views, strict=True):
        report = Report(count, store.rejected | unreadable, finalize(store.root, store.card, store.plan))
        if report.complete:
            report.rejected = _list_rejections(store, loader.manifest, unreadable)
        reports.append(report)
    return reports


@dataclass
class _Store:
    """One cache that is being filled.

    Attributes:
        limits: seconds of the shortest utterance and the longest view that the teacher takes.
        halves: targets that are rounded on the teacher's device.
        writers: of the units that are claimed, by their number.
        rejected: views that this run left out of committed units, with reasons.
    """

    root: Path
    teacher: Teacher
    card: Card
    plan: Plan
    codebook: Codebook
    limits: tuple[float, float | None]
    halves: list[str]
    writers: dict[int, UnitWriter] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)


def _first(manifest: Manifest, unreadable: dict[str, str]) -> str:
    """The first utterance that cannot be used, with its reason."""
    one = next((utterance for utterance in manifest if utterance.id in unreadable), None)
    return "it lists none" if one is None else f"the first, {one.path}: {unreadable[one.id]}"


def _prepared(
    jobs: Sequence[Job], chosen: list[list[Target]], manifest: Manifest, view_plan: ViewPlan
) -> tuple[ViewLoader, list[_Store]]:
    """The loader of the views, and every cache laid out. chosen: the targets of each job."""
    limits = [job.teacher.limits(job.config.min_seconds) for job in jobs]
    longest = None if any(most is None for _, most in limits) else max(most for _, most in limits if most is not None)
    roots, storage = [Path(job.config.cache) for job in jobs], jobs[0].config.storage
    manifests = split_by_parts(roots[0], manifest)
    if len({(j.config.storage.unit_views, j.config.storage.unit_seconds) for j in jobs}) > 1:
        raise UsageError("teachers of one pass need units of one size (storage.unit_views, storage.unit_seconds)")
    for root in roots[1:]:
        if [m.utterances for m in split_by_parts(root, manifest)] != [m.utterances for m in manifests]:
            raise UsageError(f"{root}: has other parts than {roots[0]}; extract it by itself")
    plans = [Plan.make(m, view_plan.views(m), storage.unit_views, storage.unit_seconds) for m in manifests]
    plan, joined = Plan.join(plans), Manifest(tuple(u for m in manifests for u in m), manifest.source)
    loader = ViewLoader(joined, plan.views, view_plan.augmentation, min(least for least, _ in limits), log, longest)
    parts = tuple(part_of(m, p) for m, p in zip(manifests, plans, strict=True))
    stores = []
    for job, root, targets, own in zip(jobs, roots, chosen, limits, strict=True):
        card, codebook = _laid_out(job, targets, parts, plans, view_plan, loader)
        halves = [target.name for target in card.targets if codebook.codecs[target.name].dtype == HALF]
        stores.append(_Store(root, job.teacher, card, plan, codebook, own, halves))
    return loader, stores


def _laid_out(
    job: Job, targets: list[Target], parts: tuple[Part, ...], plans: list[Plan], view_plan: ViewPlan, loader: ViewLoader
) -> tuple[Card, Codebook]:
    """A new cache, or the one that is there."""
    root, teacher, config = Path(job.config.cache), job.teacher, job.config
    head = teacher.head if LOGITS in config.teacher.targets else None
    logits_stored = head is not None and LOGITS in [t.name for t in targets]
    card = Card(
        teacher.described(),
        tuple(targets),
        view_plan.card(),
        plans[0].unit_views,
        plans[0].unit_seconds,
        None if head is None else head.card(logits_stored),
        None,
        parts,
    )
    codebook = Codebook.load(root, targets, card.series) if root.is_dir() else None
    if codebook is None:
        check_folder(root, targets)
        codebook = calibrate(teacher, loader, targets, head, logits_stored, config).create(root, card.series, targets)
    card = replace(card, codecs=codebook.digest, errors=codebook.errors)
    initialise(root, card, plans, None if head is None or logits_stored else head.to_bytes())
    return card, codebook


def _extract(
    config: ExtractConfig, loader: ViewLoader, stores: list[_Store], rank: Rank | None
) -> tuple[list[int], Meter]:
    """Fill every unit that is nobody else's; the rows are written in the background.

    Returns:
        Views extracted into each cache, and where the time went.
    """
    plan, counts, meter = stores[0].plan, [0] * len(stores), Meter()
    done = min(sum(len(s.plan.unit(u)) for u in range(plan.units) if commit_path(s.root, u).is_file()) for s in stores)
    mixed = all(store.teacher.takes_lengths for store in stores)
    pinned = stores[0].teacher.device.type == "cuda"

    def reject(view: int, reason: str) -> None:
        for store in stores:
            if (writer := store.writers.get(int(plan.unit_of[view]))) is not None:
                writer.reject(view, reason)
        bar.advance(1)

    def commit(store: _Store, unit: int, count: int) -> None:
        if rank is not None:
            work = Work(rank.run, rank.number, count, meter.done / 3600, meter.seconds, meter.share(speed.TEACHER))
            work.save(store.root)
        _commit(store, unit, loader.manifest)

    def fill() -> None:
        """Every unit that can be claimed now."""
        with Background() as background:
            units = _claimed(stores)
            stream = stream_batches(loader, units, config.batch_size, config.workers, reject, mixed, pinned)
            for unit, batch in meter.loading(stream):
                takers = [i for i, store in enumerate(stores) if unit in store.writers]
                if batch is None:
                    for i in takers:
                        background.commit(commit, stores[i], unit, counts[i])
                    continue
                for i in takers:
                    store = stores[i]
                    if (taken := _taken(store, loader, batch)) is None:
                        continue
                    with meter.spending(speed.TEACHER):
                        outputs = extract_targets(store.teacher, taken, store.card.targets, store.halves)
                    with meter.spending(speed.WRITING):
                        for name, values in outputs.items():
                            background(store.writers[unit].put, name, taken.views, values)
                    counts[i] += len(taken.views)
                for store in stores:
                    for claimed in list(store.writers):
                        heartbeat(store.root, claimed)
                meter.count(loader.views.samples[batch.views].sum(dtype=np.int64) / SAMPLE_RATE)
                bar.advance(len(batch.views), speed.note(meter))

    try:
        with track("extracting", len(plan.views), "views", done) as bar:
            fill()
            while rank is not None and not all(_all_committed(store) for store in stores):
                time.sleep(WAIT)
                fill()
    finally:
        for store in stores:
            for writer in list(store.writers.values()):  # empty unless something failed
                writer.abandon()
    return counts, meter


def _all_committed(store: _Store) -> bool:
    return all(commit_path(store.root, unit).is_file() for unit in range(store.plan.units))


def _claimed(stores: list[_Store]) -> Iterator[tuple[int, np.ndarray]]:
    """Units that at least one cache lacks, claimed for those caches, with their views."""
    plan = stores[0].plan
    for unit in range(plan.units):
        takers = [store for store in stores if claim(store.root, unit)]
        for store in takers:
            store.writers[unit] = UnitWriter(store.root, store.card, store.plan, unit, store.codebook.codecs)
        if takers:
            yield unit, np.array(plan.unit(unit))


def _commit(store: _Store, unit: int, manifest: Manifest) -> None:
    lost = store.writers[unit].commit()
    del store.writers[unit]
    if lost is None:
        log(f"unit {unit} was taken over by another worker while this one was stopped; it is left to that one")
        return
    store.rejected |= {_view_name(manifest, store.plan, view): reason for view, reason in lost.items()}


def _taken(store: _Store, loader: ViewLoader, batch: WaveBatch) -> WaveBatch | None:
    """What a teacher takes of a batch; the rest is rejected in its cache."""
    unit = int(store.plan.unit_of[batch.views[0]])
    kept = []
    for i, view in enumerate(batch.views.tolist()):
        if (reason := loader.refusal(view, *store.limits)) is None:
            kept.append(i)
        else:
            store.writers[unit].reject(view, reason)
    if len(kept) == len(batch.views):
        return batch
    if not kept:
        return None
    lengths = None if batch.lengths is None else batch.lengths[kept]
    waves = batch.waves[kept] if lengths is None else batch.waves[kept, : int(lengths.max())]
    return WaveBatch(batch.views[kept], waves, lengths)


def fitting(manifest: Manifest, config: ExtractConfig) -> tuple[Manifest, dict[str, str]]:
    """The utterances whose views fit into a unit, and the reason for each of the others."""
    most = config.storage.unit_seconds * min([1.0, *config.view.speeds])
    if not config.view.plan.startswith("full"):
        return manifest, {}
    reason = "{:.0f} s in one view; take view=windows:SECONDS/HOP, or raise storage.unit_seconds ({:g})"
    long = {u.id: reason.format(u.duration, most) for u in manifest if (u.duration or 0.0) > most}
    return Manifest(tuple(u for u in manifest if u.id not in long), manifest.source), long


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


def _list_rejections(store: _Store, manifest: Manifest, unreadable: dict[str, str]) -> dict[str, str]:
    """Every utterance or view left out of a complete cache, with the reason; kept as rejected.csv if there is one."""
    rejected = dict(unreadable)
    for view, reason in Cache.open(store.root).rejected.items():
        rejected[_view_name(manifest, store.plan, view)] = reason
    if rejected:
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([("utt", "reason"), *rejected.items()])
        write_bytes(store.root / REJECTED, out.getvalue().encode())
    return rejected
