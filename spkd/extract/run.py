"""`spkd extract`: one run of the teacher over every view of a manifest, which stores its outputs in a cache."""

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
from spkd.extract.settings import ContentConfig, ExtractConfig
from spkd.extract.targets import chosen_targets, extract_targets
from spkd.files.atomic import write_bytes
from spkd.meter import Meter
from spkd.outputs.target import LOGITS, Target
from spkd.progress import log, track
from spkd.teachers import load_teacher
from spkd.teachers.base import Teacher

REJECTED = "rejected.csv"
HALF = np.dtype("<f2")
WAIT = 0.5  # s between two checks of the units of other processes


@dataclass
class Report:
    """Report of an extraction.

    Attributes:
        views: number of views extracted by this process.
        rejected: name of each utterance or view that the cache lacks -> the reason.
        complete: whether the cache is complete now.
    """

    views: int
    rejected: dict[str, str]
    complete: bool


@dataclass
class Job:
    """Extraction of one teacher to one cache.

    Attributes:
        config: the settings; those of the jobs of one pass differ in cache, teacher and storage alone.
        teacher: the teacher.
    """

    config: ExtractConfig
    teacher: Teacher


def extract(config: ExtractConfig, teacher: Teacher, manifest: Manifest) -> Report:
    """Extract with one teacher, as `extract_jobs` does."""
    return extract_jobs([Job(config, teacher)], manifest)[0]


def load_and_extract(configs: Sequence[ExtractConfig], manifest: Manifest, rank: Rank | None = None) -> list[Report]:
    """Load the teachers that the settings name, and extract with them, as `extract_jobs` does.

    Args:
        configs: settings of each teacher, which differ in cache, teacher and storage alone.
        manifest: the utterances.
        rank: as of `extract_jobs`.
    Raises:
        UsageError: as of load_teacher and extract_jobs.
        SpkdError: as of load_teacher and extract_jobs.
    """
    device = resolve(configs[0].device)
    return extract_jobs([Job(config, load_teacher(config.teacher, device)) for config in configs], manifest, rank)


def extract_jobs(jobs: Sequence[Job], manifest: Manifest, rank: Rank | None = None) -> list[Report]:
    """Extract the chosen targets of every job to its cache, in one pass over the audio.

    An extraction continues where an earlier run of the same command stopped. Where the manifest has further utterances,
    they are added to the caches.

    Args:
        jobs: the teachers and their caches.
        manifest: the utterances.
        rank: rank of this process among several; None where it works alone. Each rank works until the caches are
            complete, and takes over units of ranks that stopped.
    Returns:
        A report of each job.
    Raises:
        UsageError: an unknown target, codec or view plan, or jobs with different views.
        SpkdError: a folder holds another cache, or cannot be written.
    """
    # Choose the targets, and measure the utterances.
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
    # Extract.
    loader, stores = _prepared(jobs, chosen, manifest, view_plan)
    views, meter = _extract(config, loader, stores, rank)
    loader.report_remarks()
    if rank is None:
        speed.report(meter, config.workers)
    # Complete the caches, and list what they lack.
    reports = []
    for store, count in zip(stores, views, strict=True):
        report = Report(count, store.rejected | unreadable, finalize(store.root, store.card, store.plan))
        if report.complete:
            report.rejected = _list_rejections(store, loader.manifest, unreadable)
        reports.append(report)
    return reports


@dataclass
class _Store:
    """A cache that is being filled.

    Attributes:
        root: its folder.
        teacher: the teacher whose outputs it stores.
        card: its card.
        plan: its plan.
        codebook: fitted codecs of its targets.
        limits: shortest utterance and longest view that the teacher accepts (s); None for no longest.
        halves: names of the targets that are rounded to float16 on the device of the teacher.
        writers: number of each claimed unit -> its writer.
        rejected: name of each view that this run left out of committed units -> the reason.
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
    """Phrase that names the first utterance that cannot be used, with the reason."""
    first = next((utterance for utterance in manifest if utterance.id in unreadable), None)
    return "it lists none" if first is None else f"the first, {first.path}: {unreadable[first.id]}"


def _prepared(
    jobs: Sequence[Job], chosen: list[list[Target]], manifest: Manifest, view_plan: ViewPlan
) -> tuple[ViewLoader, list[_Store]]:
    """Prepare an extraction.

    Args:
        jobs: the teachers and their caches.
        chosen: the targets of each job.
        manifest: the utterances, all measured.
        view_plan: plan of the views.
    Returns:
        The loader of the views, and the caches, with their metadata files written.
    Raises:
        UsageError: caches with different parts or units of different size.
        SpkdError: a folder holds another cache, or other files.
    """
    # Limits of the teachers, and the parts of the caches, which must be the same in all.
    limits = [job.teacher.limits(job.config.min_seconds) for job in jobs]
    longest = None if any(most is None for _, most in limits) else max(most for _, most in limits if most is not None)
    roots, storage = [Path(job.config.cache) for job in jobs], jobs[0].config.storage
    manifests = split_by_parts(roots[0], manifest)
    if len({(j.config.storage.unit_views, j.config.storage.unit_seconds) for j in jobs}) > 1:
        raise UsageError("teachers of one pass need units of one size (storage.unit_views, storage.unit_seconds)")
    for root in roots[1:]:
        if [m.utterances for m in split_by_parts(root, manifest)] != [m.utterances for m in manifests]:
            raise UsageError(f"{root}: has other parts than {roots[0]}; extract it by itself")
    # The plan and the loader of all parts together.
    plans = [Plan.make(m, view_plan.views(m), storage.unit_views, storage.unit_seconds) for m in manifests]
    plan, joined = Plan.join(plans), Manifest(tuple(u for m in manifests for u in m), manifest.source)
    loader = ViewLoader(joined, plan.views, view_plan.augmentation, min(least for least, _ in limits), log, longest)
    # The caches.
    parts = tuple(part_of(m, p) for m, p in zip(manifests, plans, strict=True))
    stores = []
    for job, root, targets, accepted in zip(jobs, roots, chosen, limits, strict=True):
        card, codebook = _laid_out(job, targets, parts, plans, view_plan, loader)
        halves = [target.name for target in card.targets if codebook.codecs[target.name].dtype == HALF]
        stores.append(_Store(root, job.teacher, card, plan, codebook, accepted, halves))
    return loader, stores


def _laid_out(
    job: Job, targets: list[Target], parts: tuple[Part, ...], plans: list[Plan], view_plan: ViewPlan, loader: ViewLoader
) -> tuple[Card, Codebook]:
    """Write the metadata files of a new cache, or check those of the cache that is there.

    Args:
        job: the teacher and its cache.
        targets: the targets to store.
        parts: the parts of the cache.
        plans: the plan of each part.
        view_plan: plan of the views.
        loader: loader of the views, to fit codecs.
    Returns:
        The card, and the fitted codecs.
    """
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
    """Fill every unit that no other process fills. Rows are written in the background.

    Args:
        config: settings of the extraction.
        loader: loader of the views.
        stores: the caches.
        rank: rank of this process among several; None where it works alone.
    Returns:
        Number of views extracted to each cache, and the meter of the time.
    """
    plan, counts, meter = stores[0].plan, [0] * len(stores), Meter()
    done = min(sum(len(s.plan.unit(u)) for u in range(plan.units) if commit_path(s.root, u).is_file()) for s in stores)
    mixed = all(store.teacher.takes_lengths for store in stores)
    pinned = stores[0].teacher.device.type == "cuda"

    def reject(view: int, reason: str) -> None:
        """Leave a view out of every cache that is filling its unit."""
        for store in stores:
            if (writer := store.writers.get(int(plan.unit_of[view]))) is not None:
                writer.reject(view, reason)
        bar.advance(1)

    def commit(store: _Store, unit: int, count: int) -> None:
        """Commit a unit, after a record of the work of this rank."""
        if rank is not None:
            work = Work(rank.run, rank.number, count, meter.done / 3600, meter.seconds, meter.share(speed.TEACHER))
            work.save(store.root)
        _commit(store, unit, loader.manifest)

    def fill() -> None:
        """Fill every unit that can be claimed now."""
        with Background() as background:
            units = _claimed(stores)
            stream = stream_batches(loader, units, config.batch_size, config.workers, reject, mixed, pinned)
            for unit, batch in meter.loading(stream):
                # The end of a unit: commit it.
                takers = [i for i, store in enumerate(stores) if unit in store.writers]
                if batch is None:
                    for i in takers:
                        background.commit(commit, stores[i], unit, counts[i])
                    continue
                # A batch: run every teacher whose cache takes the unit.
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
                # Keep the claims of all units alive.
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
            for writer in list(store.writers.values()):  # none, unless something failed
                writer.abandon()
    return counts, meter


def _all_committed(store: _Store) -> bool:
    return all(commit_path(store.root, unit).is_file() for unit in range(store.plan.units))


def _claimed(stores: list[_Store]) -> Iterator[tuple[int, np.ndarray]]:
    """Units that at least one cache lacks, with their views. Each is claimed for these caches before it is yielded."""
    plan = stores[0].plan
    for unit in range(plan.units):
        takers = [store for store in stores if claim(store.root, unit)]
        for store in takers:
            store.writers[unit] = UnitWriter(store.root, store.card, store.plan, unit, store.codebook.codecs)
        if takers:
            yield unit, np.array(plan.unit(unit))


def _commit(store: _Store, unit: int, manifest: Manifest) -> None:
    """Commit a unit, and note its rejected views."""
    lost = store.writers[unit].commit()
    del store.writers[unit]
    if lost is None:
        log(f"unit {unit} was taken over by another worker while this one was stopped; the other worker will finish it")
        return
    store.rejected |= {_view_name(manifest, store.plan, view): reason for view, reason in lost.items()}


def _taken(store: _Store, loader: ViewLoader, batch: WaveBatch) -> WaveBatch | None:
    """The views of a batch that a teacher accepts; None where it accepts none. The others are rejected in its cache."""
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


def fitting(manifest: Manifest, config: ContentConfig) -> tuple[Manifest, dict[str, str]]:
    """Leave out utterances whose views do not fit into a unit.

    Args:
        manifest: the utterances, all measured.
        config: settings of the extraction.
    Returns:
        The other utterances, and the id of each that was left out -> the reason.
    """
    most = config.storage.unit_seconds * min([1.0, *config.view.speeds])
    if not config.view.plan.startswith("full"):
        return manifest, {}
    reason = "{:.0f} s in one view; take view=windows:SECONDS/HOP, or raise storage.unit_seconds ({:g})"
    long = {u.id: reason.format(u.duration, most) for u in manifest if (u.duration or 0.0) > most}
    return Manifest(tuple(u for u in manifest if u.id not in long), manifest.source), long


def split_by_parts(root: Path, manifest: Manifest) -> list[Manifest]:
    """Divide a manifest into the parts of a cache, and a further part with the utterances that the cache lacks.

    Where there is no cache, or a different one (which `initialise` refuses), the manifest is the only part.

    Args:
        root: folder of the cache.
        manifest: the utterances, all measured.
    """
    if not (root / CARD).is_file():
        return [manifest]
    card = load_card(root)
    known = Plan.load(root, card).utterances
    parts = card.pick_parts(known, manifest)
    if parts is None:
        return [manifest]
    present = set(known)
    new = tuple(u for u in manifest if u.id not in present)
    return [*parts, *([Manifest(new, manifest.source)] if new else [])]


def _view_name(manifest: Manifest, plan: Plan, view: int) -> str:
    """Id of a view's utterance, followed by the number of the view where utterances have several."""
    utterance = int(plan.views.utterance[view])
    first = int(np.searchsorted(plan.views.utterance, utterance))
    return (
        manifest[utterance].id if len(plan.views) == len(manifest) else f"{manifest[utterance].id} view {view - first}"
    )


def _list_rejections(store: _Store, manifest: Manifest, unreadable: dict[str, str]) -> dict[str, str]:
    """List the utterances and views that a complete cache lacks, and write them to rejected.csv if there are any.

    Args:
        store: the cache.
        manifest: its utterances.
        unreadable: id of each utterance that cannot be used -> the reason.
    Returns:
        Name of each utterance or view -> the reason.
    """
    rejected = dict(unreadable)
    for view, reason in Cache.open(store.root).rejected.items():
        rejected[_view_name(manifest, store.plan, view)] = reason
    if rejected:
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([("utt", "reason"), *rejected.items()])
        write_bytes(store.root / REJECTED, out.getvalue().encode())
    return rejected
