"""`spkd extract`: one run of the teacher over every view of a manifest, which stores its outputs in a cache."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from spkd.cache.background import Background
from spkd.cache.card import Card, Part
from spkd.cache.claims import changing, claim
from spkd.cache.codebook import Codebook
from spkd.cache.folder import CARD, CODEC, claim_path, commit_path, load_card, only_from_copy
from spkd.cache.owner import kept_alive
from spkd.cache.plan import Plan, part_of
from spkd.cache.read import Cache
from spkd.cache.verify import damage_that_stays, reopen_damaged, write_derived_again
from spkd.cache.write import UnitWriter, ViewsAway, check_folder, check_is_free, finalize, initialise
from spkd.corpus.audio import SAMPLE_RATE, AudioError
from spkd.corpus.fetched import copy_to
from spkd.corpus.loader import ViewLoader, WaveBatch, stream_batches
from spkd.corpus.manifest import Manifest, measure
from spkd.corpus.vad import finder_of
from spkd.corpus.view import ViewPlan
from spkd.device import resolve
from spkd.errors import SpkdError, UsageError
from spkd.extract import speed
from spkd.extract.again import can_be_extracted, reopen_rejected
from spkd.extract.fit_codecs import calibrate
from spkd.extract.ranks import Rank, Work
from spkd.extract.settings import ContentConfig, ExtractConfig
from spkd.extract.speech import forget, found_speech
from spkd.extract.targets import Outputs, begin_targets, features_of, targets_of_pass
from spkd.files.packed import PackedTexts
from spkd.files.text import counted
from spkd.meter import Meter
from spkd.outputs.features import FEATURES
from spkd.outputs.head import Head
from spkd.outputs.settings import StorageConfig
from spkd.outputs.target import LOGITS, Target
from spkd.progress import log, track
from spkd.teachers import load_teacher
from spkd.teachers.base import Teacher

HALF = np.dtype("<f2")
WAIT = 0.5  # s between two checks of the units of other processes
Begun = list[tuple[int, WaveBatch, Callable[[], Outputs]]]  # number of a cache, its views, function that waits
STUCK = 3600.0  # s without a batch, after which other workers may take the units of this one


@dataclass
class Report:
    """Report of an extraction.

    Attributes:
        views: number of views extracted by this process.
        rejected: name of each utterance or view that the cache lacks -> the reason.
        complete: whether the cache is complete now.
        damaged: lines that name units which are damaged, and were not extracted again as audio is away; "" for none.
    """

    views: int
    rejected: dict[str, str]
    complete: bool
    damaged: str

    @property
    def state(self) -> str:
        """Phrase that tells whether the cache is complete."""
        if self.damaged:
            return "damaged"
        return "complete" if self.complete else "other workers are still busy with the rest"


@dataclass
class Job:
    """Extraction of one teacher to one cache.

    Attributes:
        config: the settings; those of the jobs of one pass differ in cache, teacher and storage alone.
    """

    config: ExtractConfig
    teacher: Teacher


def extract(config: ExtractConfig, teacher: Teacher, manifest: Manifest) -> Report:
    """Extract with one teacher, as `extract_jobs` does."""
    return extract_jobs([Job(config, teacher)], manifest)[0]


def load_and_extract(configs: Sequence[ExtractConfig], manifest: Manifest, rank: Rank | None = None) -> list[Report]:
    """Load the teachers that the settings name, and extract with them; raises as load_teacher and `extract_jobs`.

    Args:
        configs: settings of each teacher, which differ in cache, teacher and storage alone.
    """
    device = resolve(configs[0].device)
    return extract_jobs([Job(config, load_teacher(config.teacher, device)) for config in configs], manifest, rank)


def extract_jobs(jobs: Sequence[Job], manifest: Manifest, rank: Rank | None = None) -> list[Report]:
    """Extract the chosen targets of every job to its cache, in one pass over the audio.

    An extraction continues where an earlier run of the same command stopped. Where the manifest has further utterances,
    they are added to the caches.

    Args:
        rank: rank of this process among several; None where it works alone. Each rank works until the caches are
            complete, and takes over units of ranks that stopped.
    Raises:
        UsageError: an unknown target, codec or view plan, or jobs with different views.
        SpkdError: a folder holds another cache, or cannot be written.
    """
    # Choose the targets, and measure the utterances.
    config = jobs[0].config
    view_plan = ViewPlan.parse(config.view)
    if note := view_plan.note:
        log(f"note: {note}")
    chosen = targets_of_pass([job.config for job in jobs], [job.teacher for job in jobs])
    copy_to(config, manifest)
    listed = manifest
    manifest, unreadable = measure(manifest, config.workers * 4)
    if (finder := finder_of(config.view.vad)) is not None:
        view_plan = replace(view_plan, vad=finder.card)
        for job in jobs:  # before the work
            _check_views(Path(job.config.cache), view_plan)
        manifest, silent = found_speech(Path(config.cache), manifest, finder, config.workers, rank)
        unreadable |= silent
    manifest, too_long = fitting(manifest, config)
    unreadable |= too_long
    if not len(manifest):
        raise SpkdError(
            f"{manifest.source}: none of {counted(len(unreadable), 'utterance')} can be used; "
            f"{_first(listed, unreadable)}"
        )
    # A bad response would end the extraction where it is drawn, and its folder without it is that of another cache.
    if not all(Path(job.config.cache, CARD).is_file() for job in jobs):
        view_plan.augmentation.check()
    # Extract.
    loader, stores = _prepared(jobs, chosen, manifest, view_plan)
    forget(Path(config.cache))
    for store in stores:
        root, card, plan = store.root, store.card, store.plan
        store.damaged = reopen_damaged(root, card, can_be_extracted(root, card, plan, loader, config.workers))
        if not store.damaged:
            reopen_rejected(root, card, plan, loader, store.limits, config.workers)
    views, meter = _extract(config, loader, stores, rank)
    loader.report_remarks()
    if rank is None:
        speed.report(meter, config.workers, any(job.teacher.family != "none" for job in jobs))
    # Complete the caches, and list what they lack.
    reports = []
    for store, count in zip(stores, views, strict=True):
        damaged = damage_that_stays(
            store.root, store.card, store.damaged, "the audio of all their views", store.not_filled
        )
        complete = not damaged and finalize(store.root, store.card, store.plan, unreadable)
        rejected = store.rejected
        if complete:
            lost = Cache.open(store.root).rejected
            known = len(store.plan.views)  # the others are of a growth by another process
            rejected = {store.plan.view_name(view): reason for view, reason in lost.items() if view < known}
        reports.append(Report(count, unreadable | rejected, complete, damaged))
    return reports


@dataclass
class _Store:
    """A cache that is being filled.

    Attributes:
        limits: shortest utterance and longest view that the teacher accepts (s); None for no longest.
        halves: names of the targets that are rounded to float16 on the device of the teacher.
        writers: number of each claimed unit -> its writer.
        rejected: name of each view that this run left out of committed units -> the reason.
        damaged: numbers of the damaged units that stay, since audio is away.
        not_filled: numbers of the units that stay as they were, since audio went away while they were filled again.
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
    damaged: list[int] = field(default_factory=list)
    not_filled: set[int] = field(default_factory=set)


def _first(manifest: Manifest, unreadable: dict[str, str]) -> str:
    """Phrase that names the first utterance that cannot be used, with the reason."""
    first = next((utterance for utterance in manifest if utterance.id in unreadable), None)
    return "it lists none" if first is None else f"the first, {first.path}: {unreadable[first.id]}"


def _prepared(
    jobs: Sequence[Job], chosen: list[list[Target]], manifest: Manifest, view_plan: ViewPlan
) -> tuple[ViewLoader, list[_Store]]:
    """Prepare an extraction. Returns the loader of the views, and the caches, with their metadata files written."""
    # Limits of the teachers, and units, which must be the same in all.
    limits = [job.teacher.limits(job.config.min_seconds) for job in jobs]
    longest = None if any(most is None for _, most in limits) else max(most for _, most in limits if most is not None)
    roots, storage = [Path(job.config.cache) for job in jobs], jobs[0].config.storage
    if len({(j.config.storage.unit_views, j.config.storage.unit_seconds) for j in jobs}) > 1:
        raise UsageError("teachers of one pass need units of one size (storage.unit_views, storage.unit_seconds)")
    while True:
        for root in roots:
            write_derived_again(root)
        # The parts, which must be the same in all caches; the plan and the loader of all of them together.
        present = [_card_in(root) for root in roots]
        manifests = split_by_parts(roots[0], present[0], manifest)
        for root, there in zip(roots[1:], present[1:], strict=True):
            if [m.utterances for m in split_by_parts(root, there, manifest)] != [m.utterances for m in manifests]:
                raise UsageError(f"{root}: has other parts than {roots[0]}; extract it by itself")
        view_plan = next((view_plan.as_in(card.views) for card in present if card is not None), view_plan)
        plans = [Plan.make(m, view_plan.views(m), storage.unit_views, storage.unit_seconds) for m in manifests]
        plan, joined = Plan.join(plans), Manifest.join(manifests, manifest.source)
        loader = ViewLoader(joined, plan.views, view_plan, min(least for least, _ in limits), log, longest)
        parts = tuple(part_of(m, p) for m, p in zip(manifests, plans, strict=True))
        cards = [_card(job, targets, parts, storage, view_plan) for job, targets in zip(jobs, chosen, strict=True)]
        for root, card in zip(roots, cards, strict=True):
            check_folder(root, card)
        # The caches. They are held alone while they change, and are planned again where another process changed them.
        are_there = all(card is not None and card.parts[: len(parts)] == parts for card in present)
        with contextlib.nullcontext() if are_there else changing(*roots):
            if [_card_in(root) for root in roots] != present:
                continue
            laid_out = [_laid_out(job, card, plans, loader) for job, card in zip(jobs, cards, strict=True)]
        break
    for root, there in zip(roots, present, strict=True):
        if more := sum(part.utterances for part in there.parts[len(parts) :]) if there else 0:
            log(f"{root}: has grown since by {counted(more, 'utterance')}, which stay")
    stores = []
    for job, root, (card, codebook), accepted in zip(jobs, roots, laid_out, limits, strict=True):
        halves = [target.name for target in card.targets if codebook.codecs[target.name].dtype == HALF]
        stores.append(_Store(root, job.teacher, card, plan, codebook, accepted, halves))
    return loader, stores


def _check_views(root: Path, view_plan: ViewPlan) -> None:
    """Check that a folder can hold a cache of these views. Raises SpkdError: it holds another, or other files."""
    if (present := _card_in(root)) is None:
        check_is_free(root)
    elif present.views != (views := view_plan.as_in(present.views).card()):
        check_folder(root, replace(present, views=views))


def _head(job: Job) -> Head | None:
    """The classifier of the teacher, where logits are asked for."""
    return job.teacher.head if LOGITS in job.config.teacher.targets else None


def _card_in(root: Path) -> Card | None:
    """The card of the cache in a folder; None where there is none."""
    return load_card(root) if (root / CARD).is_file() else None


def _card(
    job: Job, targets: list[Target], parts: tuple[Part, ...], storage: StorageConfig, view_plan: ViewPlan
) -> Card:
    """The card of a cache, without its codecs."""
    head = _head(job)
    return Card(
        job.teacher.described(),
        tuple(targets),
        view_plan.card(),
        job.config.min_seconds,
        storage.unit_views,
        storage.unit_seconds,
        None if head is None else head.card(LOGITS in [target.name for target in targets]),
        None,
        parts,
        teacher_people=job.teacher.people,
    )


def _laid_out(job: Job, card: Card, plans: list[Plan], loader: ViewLoader) -> tuple[Card, Codebook]:
    """Write the metadata files of a new cache or a further part, or check those that are there.

    Args:
        card: the card of the cache, without its codecs.
    """
    root, head, targets = Path(job.config.cache), _head(job), list(card.targets)
    logits_stored = LOGITS in [target.name for target in targets]
    try:
        codebook = Codebook.load(root, targets, card.series) if root.is_dir() else None
    except SpkdError:  # damaged: it is made again
        codebook = None
    if codebook is None:
        codebook = calibrate(job.teacher, loader, targets, head, logits_stored, job.config)
        if (present := _card_in(root)) is not None:
            if present.codecs != codebook.digest:
                raise SpkdError(f"{root / CODEC}: missing or damaged; {only_from_copy(root)}")
            codebook = replace(codebook, errors=present.errors)  # of another run, whose sums had another order
        codebook.save(root, card.series)
    card = replace(card, codecs=codebook.digest, errors=codebook.errors)
    return initialise(root, card, plans, None if head is None or logits_stored else head.to_bytes()), codebook


def _extract(
    config: ExtractConfig, loader: ViewLoader, stores: list[_Store], rank: Rank | None
) -> tuple[list[int], Meter]:
    """Fill every unit that no other process fills. Rows are written in the background.

    Returns:
        Number of views extracted to each cache, and the meter of the time.
    """
    plan, counts, meter = stores[0].plan, [0] * len(stores), Meter()
    done = min(sum(len(s.plan.unit(u)) for u in range(plan.units) if commit_path(s.root, u).is_file()) for s in stores)
    mixed = all(store.teacher.takes_lengths for store in stores)
    kinds = {target.name: target for store in stores for target in store.card.targets if target.name in FEATURES}
    pinned = stores[0].teacher.device.type == "cuda"

    def reject(view: int, error: AudioError) -> None:
        """Leave a view out of every cache that is filling its unit."""
        for store in stores:
            if (writer := store.writers.get(int(plan.units_of(np.array(view))))) is not None:
                writer.reject(view, error.reason, error.state)
        bar.advance(1)

    def commit(store: _Store, unit: int, count: int) -> None:
        """Commit a unit, after a record of the work of this rank."""
        if rank is not None:
            work = Work(rank.run, rank.number, count, meter.done / 3600, meter.seconds, meter.share(speed.TEACHER))
            work.save(store.root)
        _commit(store, unit)

    def claims() -> list[Path]:
        return [claim_path(store.root, unit) for store in stores for unit in list(store.writers)]

    def begin(batch: WaveBatch, takers: list[int]) -> Begun:
        """Run every teacher whose cache takes the unit of a batch."""
        begun = []
        for i in takers:
            store = stores[i]
            if (taken := _taken(store, loader, batch)) is not None:
                with meter.spending(speed.TEACHER):
                    begun.append((i, taken, begin_targets(store.teacher, taken, store.card.targets, store.halves)))
        return begun

    def finish(background: Background, unit: int, batch: WaveBatch, begun: Begun) -> None:
        """Hand the outputs of a batch to the writing thread."""
        for i, taken, outputs_of in begun:
            with meter.spending(speed.TEACHER):
                outputs = outputs_of()
            with meter.spending(speed.WRITING):
                for name, values in outputs.items():
                    background(stores[i].writers[unit].put, name, taken.views, values)
            counts[i] += len(taken.views)
        meter.count(loader.views.samples[batch.views].sum(dtype=np.int64) / SAMPLE_RATE)
        bar.advance(len(batch.views), speed.note(meter))

    def fill() -> None:
        """Fill every unit that can be claimed now. A batch is finished when the next one has begun: a GPU goes on."""
        with kept_alive(claims, STUCK) as progress, Background() as background:
            units, features = _claimed(stores), partial(features_of, kinds=list(kinds.values()))
            stream = stream_batches(loader, units, config.batch_size, config.workers, reject, mixed, pinned, features)
            last: tuple[int, WaveBatch, Begun] | None = None
            for unit, batch in meter.loading(stream):
                takers = [i for i, store in enumerate(stores) if unit in store.writers]
                begun = None if batch is None else (unit, batch, begin(batch, takers))
                meter.spend(speed.CORES, 0.0 if batch is None else batch.cores)
                if last is not None:
                    finish(background, *last)
                    progress()
                last = begun
                # The end of a unit: commit it.
                for i in takers if batch is None else ():
                    background.commit(commit, stores[i], unit, counts[i])

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
    left = (unit for unit in range(store.plan.units) if unit not in store.not_filled)
    return all(commit_path(store.root, unit).is_file() for unit in left)


def _claimed(stores: list[_Store]) -> Iterator[tuple[int, np.ndarray]]:
    """Units that at least one cache lacks, with their views. Each is claimed for these caches before it is yielded."""
    plan = stores[0].plan
    for unit in range(plan.units):
        takers = [store for store in stores if unit not in store.not_filled and claim(store.root, unit)]
        for store in takers:
            store.writers[unit] = UnitWriter(store.root, store.card, store.plan, unit, store.codebook.codecs)
        if takers:
            yield unit, np.array(plan.unit(unit))


def _commit(store: _Store, unit: int) -> None:
    """Commit a unit, and note its rejected views. Where it would lack views that it had, it stays as it was."""
    try:
        lost = store.writers[unit].commit()
    except ViewsAway as error:
        store.writers[unit].abandon()
        store.not_filled.add(unit)
        log(f"note: {store.root}: {error} now; it stays as it was: run the same command again where all audio is there")
        return
    finally:
        del store.writers[unit]
    if lost is None:
        log(f"unit {unit} was taken over by another worker while this one was stopped; the other worker will finish it")
        return
    store.rejected |= {store.plan.view_name(view): reason for view, reason in lost.items()}


def _taken(store: _Store, loader: ViewLoader, batch: WaveBatch) -> WaveBatch | None:
    """The views of a batch that a teacher accepts; None where it accepts none. The others are rejected in its cache."""
    unit = int(store.plan.units_of(batch.views[0]))
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

    Returns:
        The other utterances, and the id of each that was left out -> the reason.
    """
    most = config.storage.unit_seconds * min([1.0, *config.view.speeds])
    if not config.view.plan.startswith("full"):
        return manifest, {}
    reason = "{:.0f} s in one view; take view=windows:SECONDS/HOP, or raise storage.unit_seconds ({:g})"
    is_long = manifest.utterances.duration > most
    long = {manifest.ids[i]: reason.format(manifest.utterances.duration[i], most) for i in np.flatnonzero(is_long)}
    return (manifest.take(~is_long) if long else manifest), long


def split_by_parts(root: Path, card: Card | None, manifest: Manifest) -> list[Manifest]:
    """Divide a manifest into the parts of a cache, and a further part with the utterances that the cache lacks.

    Where the manifest is that of the cache before it grew, its parts are those of then. Where there is no cache, or a
    different one (which `initialise` refuses), the manifest is the only part.

    Args:
        card: its card; None where there is no cache.
    """
    if card is None:
        return [manifest]
    ends = np.cumsum([part.utterances for part in card.parts])
    damaged: SpkdError | None = None
    try:
        known = Plan.load(root, card).utterances
    except SpkdError as error:  # it follows from the manifest, if that has the utterances in the order of the parts
        known, damaged = manifest.ids.take(np.arange(min(ends[-1], len(manifest)))), error
    if len(manifest) in ends:
        card = card.with_parts(card.parts[: int(np.searchsorted(ends, len(manifest))) + 1])
    parts = card.pick_parts(known, manifest)
    if parts is None:
        if damaged is not None:
            raise SpkdError(f"{damaged}; {only_from_copy(root)}") from damaged
        return [manifest]
    present = PackedTexts.of(known).places
    new = manifest.take(np.fromiter((name not in present for name in manifest.ids), bool, len(manifest)))
    return [*parts, *([new] if len(new) else [])]
