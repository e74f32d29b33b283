"""Loading of views: decode, cut, change speed and formants, augment; in threads or processes, ahead, in batches."""

from __future__ import annotations

import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from spkd.cores import usable
from spkd.corpus import augment, expected, fetched, remote
from spkd.corpus.address import ROW, is_elsewhere, parse
from spkd.corpus.audio import SAMPLE_RATE, SLACK, AudioError, Decoded, change_speed, decode
from spkd.corpus.formants import shift_formants
from spkd.corpus.manifest import Manifest
from spkd.corpus.order import by_place
from spkd.corpus.processes import Passed, Processes, check_is_guarded, failure, note_threads
from spkd.corpus.stored import read_ahead
from spkd.corpus.utterance import Utterance
from spkd.corpus.vad.base import joined
from spkd.corpus.view import ViewPlan, Views, source_samples
from spkd.files.text import counted

MOST_SAMPLES = 600 * SAMPLE_RATE  # of audio in one batch
AHEAD = 1 << 16  # views of a group whose containers are read ahead; more of them are drawn from everywhere
# s of cores that loading takes before processes are started: what they save of as much again pays for their start.
AFTER = 10.0
JOB = 16  # views; batches of fewer are passed by a process together, until they have so many
WAVES = ""  # in place of the name of input features
WASTE = 0.2  # share of the longest view's length that may be padding in the shortest view of the same batch


class ViewLoader:
    """Loader of the waveforms of views.

    Args:
        manifest: the utterances, all measured.
        plan: the augmentation of the views, and the versions of its formulas.
        min_seconds: duration below which an utterance is refused (s).
        notify: function of a text, called once when audio is resampled, and once when channels are averaged.
        max_seconds: duration above which a view is refused (s); None refuses none.
    """

    def __init__(
        self,
        manifest: Manifest,
        views: Views,
        plan: ViewPlan,
        min_seconds: float = 0.0,
        notify: Callable[[str], None] | None = None,
        max_seconds: float | None = None,
    ) -> None:
        self.manifest, self.views = manifest, views
        self._plan, self._min_seconds, self._max_seconds = plan, min_seconds, max_seconds
        self._notify, self._notified = notify, dict[str, str]()  # kind of a note -> the note
        self._remarks: dict[str, set[int]] = {}  # remark on the audio -> numbers of the utterances

    def __getstate__(self) -> dict[str, Any]:
        """What a spawned process needs: states of containers, the folder of copies and the files of augmentation, which
        a forked one has. It notifies nobody."""
        of_process = {
            "_expected": expected.states(),
            "_copies": fetched.copies(),
            "_banks": augment.banks(self._plan.augmentation),
        }
        return {**self.__dict__, "_notify": None, **of_process}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for container, then in state.pop("_expected").items():
            expected.expect(container, then)
        fetched.use(state.pop("_copies"))
        augment.use(state.pop("_banks"))
        self.__dict__.update(state)

    def part(self, views: np.ndarray) -> tuple[tuple[Utterance, ...], Views]:
        """The utterances of views (N,), and the table of the views, which counts these utterances: a few kB."""
        table = self.views[views]
        numbers, places = np.unique(table.utterance, return_inverse=True)
        return tuple(self.manifest[int(number)] for number in numbers), replace(table, utterance=places)

    def of(self, utterances: tuple[Utterance, ...], views: Views) -> ViewLoader:
        """A loader of the same kind of what `part` gives, which notifies nobody."""
        return ViewLoader(Manifest(utterances), views, self._plan, self._min_seconds, None, self._max_seconds)

    @property
    def noted(self) -> tuple[dict[str, str], dict[str, set[int]]]:
        """Notes by their kinds, and the numbers of utterances by the remarks on them, so far."""
        return self._notified, self._remarks

    def note(self, views: np.ndarray, notes: Mapping[str, str], remarks: Mapping[str, set[int]]) -> None:
        """Add what a loader of a `part` noted.

        Args:
            views: (N,) numbers of the views of the part.
        """
        for kind, text in notes.items():
            self._notify_once(kind, text)
        numbers = np.unique(self.views.utterance[views])
        for remark, utterances in remarks.items():
            self._remarks.setdefault(remark, set()).update(numbers[list(utterances)].tolist())

    def __call__(self, view: int) -> np.ndarray:
        """The waveform of a view.

        Where a view is longer than its utterance, the utterance is repeated, as is usual in the field.

        Returns:
            (samples,), float32.
        Raises:
            AudioError: the file is unusable, shorter than its manifest says, or shorter than the minimum.
        """
        views = self.views
        utterance = self.manifest[int(views.utterance[view])]
        start, samples = int(views.start[view]), int(views.samples[view])
        speed, planned = float(views.speed[view]), round((utterance.duration or 0.0) * SAMPLE_RATE)
        if (reason := self.refusal(view, self._min_seconds, self._max_seconds)) is not None:
            raise AudioError(utterance.path, reason)
        span = min(int(source_samples(samples, speed)), planned - start)
        places = utterance.places(start, start + span)
        begin, end = places[0][0], places[-1][1]
        first, seconds = utterance.start + begin / SAMPLE_RATE, (end - begin) / SAMPLE_RATE
        decoded = decode(utterance.path, first, seconds, utterance.channel)
        if len(decoded.wave) < end - begin - SLACK * SAMPLE_RATE:
            reason = _too_short(end - begin, len(decoded.wave), utterance.whole or 0.0)
            raise AudioError(utterance.path, reason, decoded.state)
        if decoded.remark:
            self._remarks.setdefault(decoded.remark, set()).add(int(views.utterance[view]))
        # A file may end a little before its manifest says; its beginning there would be a jump within the view.
        missing = end - begin - len(decoded.wave)
        wave = np.pad(decoded.wave, (0, missing)) if missing > 0 else decoded.wave
        if len(places) > 1:
            wave = joined(wave, [(first - begin, last - begin) for first, last in places])
        wave = change_speed(wave, round(speed, 2))
        wave = shift_formants(wave, round(float(views.formants[view]), 2), self._plan.formants_version)
        wave = wave[:samples] if len(wave) >= samples else np.resize(wave, samples)
        self._note(decoded, utterance.channel)
        return self._plan.augmentation(wave, int(views.seed[view]))

    def refusal(self, view: int, min_seconds: float, max_seconds: float | None) -> str | None:
        """Reason why a view is too short or too long for a model; None where it is not."""
        utterance, samples = self.manifest[int(self.views.utterance[view])], int(self.views.samples[view])
        seconds = utterance.duration or 0.0
        if round(seconds * SAMPLE_RATE) < min_seconds * SAMPLE_RATE:
            what = "" if utterance.speech is None else " of speech"
            return f"too short ({seconds:.2f} s{what} < {min_seconds:g} s)"
        if max_seconds is not None and samples > max_seconds * SAMPLE_RATE:
            return (
                f"{samples / SAMPLE_RATE:.0f} s are more than this model takes at once in bounded memory "
                f"({max_seconds:.0f} s); cut the utterance, or take view=windows:SECONDS/HOP"
            )
        return None

    def report_remarks(self) -> None:
        """Log, for each remark, the number of loaded utterances that are probably not speech."""
        for remark, utterances in sorted(self._remarks.items()):
            if self._notify is not None:
                count, example = counted(len(utterances), "utterance"), self.manifest[min(utterances)].id
                self._notify(f"note: samples of {count} {remark} (for example {example}), used as they are")

    def _note(self, decoded: Decoded, channel: int | None) -> None:
        averaged = decoded.channels > 1 and channel is None
        notes = {
            "rate": decoded.rate != SAMPLE_RATE and f"audio at {decoded.rate} Hz is resampled to {SAMPLE_RATE} Hz",
            "channels": averaged and f"audio with {decoded.channels} channels is averaged to one",
        }
        for kind, note in notes.items():
            if note:
                self._notify_once(kind, note)

    def _notify_once(self, kind: str, note: str) -> None:
        if kind not in self._notified:
            self._notified[kind] = note
            if self._notify is not None:
                self._notify(f"note: {note} (this note is not repeated)")


def _too_short(wanted: int, decoded: int, duration: float) -> str:
    """Reason for refusing a file that ended early; its manifest may give durations in another unit.

    Args:
        wanted: samples that the manifest claims.
        decoded: samples that were decoded.
    """
    reason = f"ends {(wanted - decoded) / SAMPLE_RATE:.2f} s before its manifest says"
    ratio = wanted / max(decoded, 1)
    for unit, factor in (("milliseconds", 1000.0), ("samples", float(SAMPLE_RATE))):
        if 0.5 * factor < ratio < 2 * factor:
            return f"{reason}: its duration of {duration:g} looks like {unit}; durations are in seconds"
    return reason


@dataclass(frozen=True)
class WaveBatch:
    """Batch of views for a model.

    Attributes:
        views: (B,) numbers of the views.
        waves: (B, samples) their waveforms, with zeros after the end of shorter ones.
        lengths: (B,) samples of each waveform; None where all are equally long.
        features: input features (B, T, F) by name, where they are computed already.
        cores: time that cores took to load it (s).
    """

    views: np.ndarray
    waves: Tensor
    lengths: Tensor | None = None
    features: Mapping[str, np.ndarray] = field(default_factory=dict)
    cores: float = 0.0


def batched(views: np.ndarray, samples: np.ndarray, batch_size: int, waste: float) -> list[np.ndarray]:
    """Divide views into batches of similar length, shortest first.

    Args:
        views: (N,) numbers of the views.
        samples: (N,) their lengths.
        batch_size: most views in a batch.
        waste: share of the longest view's length that may be padding in the shortest view of a batch; 0 allows equal
            lengths only.
    Returns:
        Numbers of the views of each batch.
    """
    order = np.argsort(samples, kind="stable")
    views, samples = views[order], samples[order]
    batches, first = [], 0
    while first < len(views):
        last = int(np.searchsorted(samples, samples[first] / (1 - waste), "right"))
        last = min(last, first + batch_size)
        # Batches of long views are smaller, so that memory stays bounded.
        while last > first + 1 and (last - first) * int(samples[last - 1]) > MOST_SAMPLES:
            last -= 1
        batches.append(views[first:last])
        first = last
    return batches


Features = Callable[[Tensor], Mapping[str, Tensor]]


@dataclass(frozen=True)
class _Loaded:
    """Loaded view.

    Attributes:
        wave: (samples,).
        features: its input features (T, F) by name.
        cores: time that a core took (s).
    """

    wave: np.ndarray
    features: Mapping[str, np.ndarray]
    cores: float


def _load(loader: ViewLoader, features: Features | None, view: int) -> _Loaded | AudioError:
    """A view, or the error where it cannot be loaded."""
    start = time.thread_time()
    try:
        wave = np.ascontiguousarray(loader(view))
        computed = {} if features is None else features(torch.from_numpy(wave)[None])
        return _Loaded(wave, {name: values[0].numpy() for name, values in computed.items()}, time.thread_time() - start)
    except AudioError as error:
        return error
    except MemoryError:
        reason = "does not fit into memory; take shorter views (view=windows:SECONDS/HOP or crops:COUNT,SECONDS)"
        return AudioError(loader.manifest[int(loader.views.utterance[view])].path, reason)


@dataclass(frozen=True)
class _Collected:
    """Views of a batch that were loaded.

    Attributes:
        views: (B,) numbers of those that could be loaded.
        arrays: WAVES -> (B, samples) their waveforms, and the name of each kind of input features -> (B, T, F); with
            zeros after the end of shorter ones. `Passed` on their way from a process.
        lengths: (B,) samples of each waveform.
        errors: number and error of each other view.
        cores: time that cores took (s).
    """

    views: np.ndarray
    arrays: Mapping[str, Any]
    lengths: np.ndarray
    errors: Sequence[tuple[int, AudioError]]
    cores: float


def _padded(values: Sequence[np.ndarray]) -> np.ndarray:
    """(B, longest, ...): arrays (length, ...) with zeros after their ends."""
    made = np.zeros((len(values), max(map(len, values)), *values[0].shape[1:]), values[0].dtype)
    for row, value in zip(made, values, strict=True):
        row[: len(value)] = value
    return made


def _collected(views: Sequence[int], results: Sequence[_Loaded | AudioError]) -> _Collected:
    """The views of a batch together, of which `_load` gave the results."""
    start = time.thread_time()
    errors, kept, loaded = [], [], []
    for view, result in zip(views, results, strict=True):
        if isinstance(result, AudioError):
            errors.append((view, result))
        else:
            kept.append(view)
            loaded.append(result)

    arrays: dict[str, np.ndarray] = {}
    if loaded:
        arrays[WAVES] = _padded([each.wave for each in loaded])
        arrays |= {name: _padded([each.features[name] for each in loaded]) for name in loaded[0].features}
    lengths = np.array([len(each.wave) for each in loaded], np.int64)
    cores = sum(each.cores for each in loaded) + time.thread_time() - start
    return _Collected(np.array(kept, np.int64), arrays, lengths, errors, cores)


def _batch_of(found: _Collected, pinned: bool) -> WaveBatch | None:
    """The batch of the views that could be loaded; None where there are none."""
    if not len(found.views):
        return None
    arrays = dict(found.arrays)
    waves, lengths = torch.from_numpy(arrays.pop(WAVES)), torch.from_numpy(found.lengths)
    uneven = len(lengths.unique()) > 1
    pinned_waves = waves.pin_memory() if pinned else waves
    return WaveBatch(found.views, pinned_waves, lengths if uneven else None, arrays, found.cores)


@dataclass(frozen=True)
class _Job:
    """Batches that a process loads.

    Attributes:
        utterances: as of `ViewLoader.part`.
        views: as of `ViewLoader.part`.
        sizes: number of views of each batch.
    """

    utterances: tuple[Utterance, ...]
    views: Views
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class _Done:
    """Batches of a job, whose views are counted from 0; and what the loader noted."""

    batches: Sequence[_Collected]
    notes: Mapping[str, str]
    remarks: Mapping[str, set[int]]


class _InProcess:
    """What a process does with a job. It holds nothing of the manifest, of which a job has its own utterances.

    Args:
        count: number of such processes, which share the requests for audio elsewhere.
    """

    def __init__(self, loader: ViewLoader, features: Features | None, count: int) -> None:
        self._loader, self._features = loader.of(*loader.part(np.zeros(0, np.int64))), features
        self._requests = max(remote.REQUESTS // count, 1)

    def __call__(self, job: _Job) -> _Done:
        remote.limit_requests(self._requests)
        loader, first, batches = self._loader.of(job.utterances, job.views), 0, []
        for size in job.sizes:
            start, numbers = time.process_time(), range(first, first + size)
            results = [_load(loader, self._features, number) for number in numbers]
            found = _collected(numbers, results)
            arrays = {name: Passed(array) for name, array in found.arrays.items()}
            batches.append(replace(found, arrays=arrays, cores=time.process_time() - start))
            first += size
        return _Done(batches, *loader.noted)


Group = TypeVar("Group")


def iterate_batches(
    loader: ViewLoader,
    views: np.ndarray,
    batch_size: int,
    workers: int,
    rejected: Callable[[int, AudioError], None],
    mixed: bool = False,
) -> Iterator[WaveBatch]:
    """`stream_batches` of one group; of several where audio lies in containers, each of which is read once."""
    places = by_place(loader.manifest.utterances, loader.views.utterance[views])
    groups = ((None, views[group]) for group in places)
    for _, batch in stream_batches(loader, groups, batch_size, workers, rejected, mixed):
        if batch is not None:
            yield batch


def stream_batches(
    loader: ViewLoader,
    groups: Iterable[tuple[Group, np.ndarray]],
    batch_size: int,
    workers: int,
    rejected: Callable[[int, AudioError], None],
    mixed: bool = False,
    pinned: bool = False,
    features: Features | None = None,
) -> Iterator[tuple[Group, WaveBatch | None]]:
    """Load the waveforms of groups of views in batches of similar length.

    Workers decode ahead, also across the boundary of two groups, each of them on one core. They are threads, and
    processes once loading has taken `AFTER` seconds of cores, where `processes_pay`. One more thread puts together what
    threads have loaded; a process puts its batches together itself, in memory that this process maps. Batches and their
    order are the same.

    Args:
        groups: each group, and the numbers of its views. The next group is taken when too few views are left to load:
            about two batches, of processes two for each.
        workers: number of threads or processes.
        rejected: function of a view and the error, called for every view that cannot be loaded.
        mixed: whether views of different lengths may share a batch, since padding changes the outputs of some models.
        pinned: whether to put the waveforms in pinned memory.
        features: function of a waveform (1, samples) that gives its input features (1, T, F) by name; the workers
            compute them. It can be pickled.
    Yields:
        The batches of each group, and None at the end of each group.
    Raises:
        SpkdError: a file of the augmentation cannot be used, or a process was killed.
    """
    with _Workers(loader, batch_size, workers, pinned, features) as pool:
        pending: deque[tuple[Group, int, Future[_Finished] | None]] = deque()

        def finished(group: Group, _: int, batch: Future[_Finished] | None) -> Iterator[tuple[Group, WaveBatch | None]]:
            if batch is None:
                yield group, None
                return
            waves, errors = pool.result(batch)
            for error in errors:
                rejected(*error)
            if waves is not None:
                yield group, waves

        for stretch in pool.stretches(_planned(loader, groups, batch_size, mixed)):
            begun = iter(pool.begin([views for _, views in stretch if views is not None]))
            for group, views in stretch:
                pending.append((group, 0, None) if views is None else (group, len(views), next(begun)))
            while sum(views for _, views, _ in pending) > pool.most_ahead:
                yield from finished(*pending.popleft())
        while pending:
            yield from finished(*pending.popleft())


_Finished = tuple[WaveBatch | None, Sequence[tuple[int, AudioError]]]  # a batch, and the errors of its other views
_Planned = tuple[Group, np.ndarray | None]  # a group and the views of a batch; None at its end


def _planned(
    loader: ViewLoader, groups: Iterable[tuple[Group, np.ndarray]], batch_size: int, mixed: bool
) -> Iterator[_Planned[Group]]:
    """The views of each batch, and None at the end of each group."""
    for group, views in groups:
        if len(views) <= AHEAD:
            utterances = loader.manifest.utterances
            read_ahead({utterances.path(index) for index in loader.views.utterance[views].tolist()})
        for batch in batched(views, loader.views.samples[views], batch_size, WASTE if mixed else 0.0):
            yield group, batch
        yield group, None


def processes_pay(loader: ViewLoader, workers: int) -> bool:
    """Whether processes load faster than threads, once they have started.

    They do not on one core, nor where audio comes from elsewhere or from tables without `fetch.cache`: what takes time
    there is to wait, and each process would ask for the same parts of containers, or decompress the same rows.
    """
    if workers < 2 or usable() < 2 or multiprocessing.current_process().daemon:
        return False
    columns = loader.manifest.utterances
    if fetched.copies() is not None or not any(name.endswith("#") or is_elsewhere(name) for name in columns.folders):
        return True
    _, firsts = np.unique(columns.folder, return_index=True)
    addresses = [address for number in firsts if (address := parse(columns.path(int(number)))) is not None]
    return not any(is_elsewhere(address.container) or address.storage == ROW for address in addresses)


class _Workers:
    """Threads, and later processes, that load batches; to be left by `with`.

    Attributes:
        most_ahead: number of views up to which further batches are begun.
    """

    def __init__(
        self, loader: ViewLoader, batch_size: int, workers: int, pinned: bool, features: Features | None
    ) -> None:
        self._loader, self._features, self._pinned = loader, features, pinned
        self._batch_size, self._workers = batch_size, workers
        self._spent = 0.0  # s of cores
        self._processes: Processes[_Job, _Done] | None = None
        self._may_start = workers > 1

    def __enter__(self) -> _Workers:
        check_is_guarded()
        self._of_torch = torch.get_num_threads()
        one_core: dict[str, Any] = {"initializer": torch.set_num_threads, "initargs": (1,)}
        self._threads = ThreadPoolExecutor(max(self._workers, 1), "views", **one_core)
        self._collector = ThreadPoolExecutor(1, "batches")
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """End all of them, processes at once where something failed.

        Raises:
            SpkdError: a process was killed, which is found when a job is begun or done.
            OSError: what it loaded could not be received, for want of descriptors.
        """
        if self._processes is not None and error is not None and not isinstance(error, BrokenExecutor):
            self._processes.kill()  # one that is stopped would be waited for, for ever
        # No thread may decode when this process is forked: the other one would have the locks that it holds, for ever.
        for executor in (self._threads, self._collector):
            executor.shutdown(wait=True, cancel_futures=True)
        codes = [] if self._processes is None else self._processes.close()
        torch.set_num_threads(self._of_torch)  # for threads to come: torch keeps the number that any thread set last
        if isinstance(error, BrokenExecutor):
            raise failure(error, codes, self._workers, self._batch_size) from error

    @property
    def _ready(self) -> Processes[_Job, _Done] | None:
        return self._processes if self._processes is not None and self._processes.are_ready else None

    @property
    def most_ahead(self) -> int:
        return 2 * self._batch_size if self._ready is None else 2 * max(self._batch_size, JOB) * self._workers

    def stretches(self, planned: Iterator[_Planned[Group]]) -> Iterator[list[_Planned[Group]]]:
        """Batches that are begun together: small ones of processes, as to pass one takes time; else each by itself."""
        stretch, views, samples = list[_Planned[Group]](), 0, 0
        for group, batch in planned:
            stretch.append((group, batch))
            if batch is not None:
                views += len(batch)
                samples += int(self._loader.views.samples[batch].sum(dtype=np.int64))
            if self._ready is None or views >= JOB or samples > MOST_SAMPLES // 2:
                yield stretch
                stretch, views, samples = [], 0, 0
        if stretch:
            yield stretch

    def begin(self, batches: Sequence[np.ndarray]) -> list[Future[_Finished]]:
        """Begin to load batches, each of the numbers of its views (B,)."""
        if self._may_start and self._spent > AFTER:
            self._may_start = False
            if processes_pay(self._loader, self._workers):
                function = _InProcess(self._loader, self._features, self._workers)
                try:
                    self._processes = Processes(self._workers, function)
                except OSError as error:  # no room in /dev/shm, in which they share locks
                    note_threads(error)
        if (processes := self._ready) is not None and batches:
            sizes, views = tuple(map(len, batches)), np.concatenate(batches)
            done = processes.submit(_Job(*self._loader.part(views), sizes))
            firsts = accumulate(sizes[:-1], initial=0)
            return [
                self._collector.submit(self._received, views, first, number, done)
                for number, first in enumerate(firsts)
            ]
        load = partial(_load, self._loader, self._features)
        return [
            self._collector.submit(self._put_together, batch, [self._threads.submit(load, int(v)) for v in batch])
            for batch in batches
        ]

    def result(self, batch: Future[_Finished]) -> _Finished:
        """A batch that was begun, and the errors of its views that could not be loaded."""
        waves, errors = batch.result()
        self._spent += 0.0 if waves is None else waves.cores
        return waves, errors

    def _put_together(self, views: np.ndarray, loaded: Sequence[Future[_Loaded | AudioError]]) -> _Finished:
        results = [each.result() for each in loaded]
        found = _collected(views.tolist(), results)
        return _batch_of(found, self._pinned), found.errors

    def _received(self, views: np.ndarray, first: int, number: int, job: Future[_Done]) -> _Finished:
        """A batch of a job.

        Args:
            views: (N,) numbers of the views of the job.
            first: place of the batch's first view in them.
            number: number of the batch in the job.
        """
        done = job.result()
        if number == 0:
            self._loader.note(views, done.notes, done.remarks)
        found = done.batches[number]
        errors = [(int(views[place]), error) for place, error in found.errors]
        return _batch_of(replace(found, views=views[found.views]), self._pinned), errors
