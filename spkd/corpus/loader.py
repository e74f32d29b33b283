"""Loading of views: decode, cut, change speed and formants, augment; in threads, with prefetching, in batches."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from spkd.corpus import expected, fetched
from spkd.corpus.audio import SAMPLE_RATE, SLACK, AudioError, Decoded, change_speed, decode
from spkd.corpus.formants import shift_formants
from spkd.corpus.manifest import Manifest
from spkd.corpus.order import by_place
from spkd.corpus.stored import read_ahead
from spkd.corpus.vad.base import joined
from spkd.corpus.view import ViewPlan, Views, source_samples
from spkd.files.text import counted

MOST_SAMPLES = 600 * SAMPLE_RATE  # of audio in one batch
AHEAD = 1 << 16  # views of a group whose containers are read ahead; more of them are drawn from everywhere
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
        self._notify, self._notified = notify, set[str]()
        self._remarks: dict[str, set[int]] = {}  # remark on the audio -> numbers of the utterances

    def __getstate__(self) -> dict[str, Any]:
        """What a spawned process needs: the states of containers and the folder of copies, which a forked one has."""
        return {**self.__dict__, "_expected": expected.states(), "_copies": fetched.copies()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for container, then in state.pop("_expected").items():
            expected.expect(container, then)
        fetched.use(state.pop("_copies"))
        self.__dict__.update(state)

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
            if note and self._notify is not None and kind not in self._notified:
                self._notified.add(kind)
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


@dataclass(frozen=True)
class _Loaded:
    """Loaded view.

    Attributes:
        wave: (samples,).
        features: its input features (T, F) by name.
        cores: time that a core took (s).
    """

    wave: Tensor
    features: Mapping[str, Tensor]
    cores: float


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
    features: Callable[[Tensor], Mapping[str, Tensor]] | None = None,
) -> Iterator[tuple[Group, WaveBatch | None]]:
    """Load the waveforms of groups of views in batches of similar length.

    Threads decode ahead, also across the boundary of two groups, each of them on one core: what takes time leaves
    Python's lock alone. A further thread puts batches together.

    Args:
        groups: each group, and the numbers of its views. The next group is taken when too few views are left to load.
        workers: number of threads.
        rejected: function of a view and the error, called for every view that cannot be loaded.
        mixed: whether views of different lengths may share a batch, since padding changes the outputs of some models.
        pinned: whether to put the waveforms in pinned memory.
        features: function of a waveform (1, samples) that gives its input features (1, T, F) by name; the threads that
            decode compute them.
    Yields:
        The batches of each group, and None at the end of each group.
    """

    def load(view: int) -> _Loaded | AudioError:
        """A view, or the error where it cannot be loaded."""
        start = time.thread_time()
        try:
            wave = torch.from_numpy(np.ascontiguousarray(loader(view)))
            computed = {} if features is None else features(wave[None])
            return _Loaded(wave, {name: values[0] for name, values in computed.items()}, time.thread_time() - start)
        except AudioError as error:
            return error
        except MemoryError:
            reason = "does not fit into memory; take shorter views (view=windows:SECONDS/HOP or crops:COUNT,SECONDS)"
            return AudioError(loader.manifest[int(loader.views.utterance[view])].path, reason)

    def collect(batch: np.ndarray, loaded: Sequence[Future]) -> tuple[WaveBatch | None, list[tuple[int, AudioError]]]:
        """The batch of the views that could be loaded, None where there are none; and the errors of the others."""
        results = {int(view): future.result() for view, future in zip(batch, loaded, strict=True)}
        start = time.thread_time()
        errors = [(view, result) for view, result in results.items() if isinstance(result, AudioError)]
        kept = {view: result for view, result in results.items() if not isinstance(result, AudioError)}
        if not kept:
            return None, errors
        lengths = torch.tensor([len(each.wave) for each in kept.values()])
        padded = pad_sequence([each.wave for each in kept.values()], True)
        if pinned:
            padded = padded.pin_memory()
        names = next(iter(kept.values())).features
        computed = {name: pad_sequence([each.features[name] for each in kept.values()], True).numpy() for name in names}
        cores = sum(each.cores for each in kept.values()) + time.thread_time() - start
        views, uneven = np.array(list(kept)), len(lengths.unique()) > 1
        return WaveBatch(views, padded, lengths if uneven else None, computed, cores), errors

    def finished(group: Group, views: int, collected: Future | None) -> Iterator[tuple[Group, WaveBatch | None]]:
        if collected is None:
            yield group, None
            return
        batch, errors = collected.result()
        for error in errors:
            rejected(*error)
        if batch is not None:
            yield group, batch

    def planned() -> Iterator[tuple[Group, np.ndarray | None]]:
        """The views of each batch, and None at the end of each group."""
        for group, views in groups:
            if len(views) <= AHEAD:
                utterances = loader.manifest.utterances
                read_ahead({utterances.path(index) for index in loader.views.utterance[views].tolist()})
            for batch in batched(views, loader.views.samples[views], batch_size, WASTE if mixed else 0.0):
                yield group, batch
            yield group, None

    # At most about two batches of views are decoded ahead.
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(max(workers, 1), "views", initializer=torch.set_num_threads, initargs=(1,))
    collector = ThreadPoolExecutor(1, "batches")
    pending: deque[tuple[Group, int, Future | None]] = deque()
    try:
        for group, batch in planned():
            if batch is None:
                pending.append((group, 0, None))
            else:
                loaded = [pool.submit(load, int(view)) for view in batch]
                pending.append((group, len(batch), collector.submit(collect, batch, loaded)))
            while sum(views for _, views, _ in pending) > 2 * batch_size:
                yield from finished(*pending.popleft())
        while pending:
            yield from finished(*pending.popleft())
    finally:
        # No thread may decode when this process is forked: the other one would have the locks that it holds, for ever.
        for executor in (pool, collector):
            executor.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(threads)  # for threads to come: torch keeps the number that any thread set last
