"""Loading of views: decode, cut, change speed and formants, augment; in threads, with prefetching, in batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from spkd.corpus.audio import SAMPLE_RATE, SLACK, AudioError, Decoded, change_speed, decode
from spkd.corpus.augment import Augmentation
from spkd.corpus.formants import shift_formants
from spkd.corpus.manifest import Manifest
from spkd.corpus.view import Views, source_samples

MOST_SAMPLES = 600 * SAMPLE_RATE  # of audio in one batch
WASTE = 0.2  # share of the longest view's length that may be padding in the shortest view of the same batch


class ViewLoader:
    """Loader of the waveforms of views.

    Args:
        manifest: the utterances, all measured.
        views: their views.
        augmentation: augmentation of the views.
        min_seconds: duration below which an utterance is refused (s).
        notify: function of a text, called once when audio is resampled, and once when channels are averaged.
        max_seconds: duration above which a view is refused (s); None refuses none.
    """

    def __init__(
        self,
        manifest: Manifest,
        views: Views,
        augmentation: Augmentation,
        min_seconds: float = 0.0,
        notify: Callable[[str], None] | None = None,
        max_seconds: float | None = None,
    ) -> None:
        self.manifest, self.views = manifest, views
        self._augment, self._min_seconds, self._max_seconds = augmentation, min_seconds, max_seconds
        self._notify, self._notified = notify, set[str]()
        self._remarks: dict[str, set[int]] = {}  # remark on the audio -> numbers of the utterances

    def __call__(self, view: int) -> np.ndarray:
        """The waveform of a view.

        Where a view is longer than its utterance, the utterance is repeated, as is usual in the field.

        Args:
            view: number of the view.
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
        first, seconds = utterance.start + start / SAMPLE_RATE, span / SAMPLE_RATE
        decoded = decode(utterance.path, first, seconds, utterance.channel)
        if len(decoded.wave) < span - SLACK * SAMPLE_RATE:
            raise AudioError(utterance.path, _too_short(span, len(decoded.wave), utterance.duration or 0.0))
        if decoded.remark:
            self._remarks.setdefault(decoded.remark, set()).add(int(views.utterance[view]))
        wave = change_speed(decoded.wave, round(speed, 2))
        wave = np.resize(shift_formants(wave, round(float(views.formants[view]), 2)), samples)
        self._note(decoded, utterance.channel)
        return self._augment(wave, int(views.seed[view]))

    def refusal(self, view: int, min_seconds: float, max_seconds: float | None) -> str | None:
        """Reason why a view is too short or too long for a model; None where it is not.

        Args:
            view: number of the view.
            min_seconds: duration below which an utterance is refused (s).
            max_seconds: duration above which a view is refused (s); None refuses none.
        """
        seconds = self.manifest[int(self.views.utterance[view])].duration or 0.0
        samples = int(self.views.samples[view])
        if round(seconds * SAMPLE_RATE) < min_seconds * SAMPLE_RATE:
            return f"too short ({seconds:.2f} s < {min_seconds:g} s)"
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
                example = self.manifest[min(utterances)].id
                self._notify(
                    f"note: {len(utterances)} utterances {remark} (for example {example}); they are used as they are"
                )

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
        duration: duration of the utterance in the manifest.
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
    """

    views: np.ndarray
    waves: Tensor
    lengths: Tensor | None = None


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
    rejected: Callable[[int, str], None],
    mixed: bool = False,
) -> Iterator[WaveBatch]:
    """`stream_batches` of one group."""
    for _, batch in stream_batches(loader, [(None, views)], batch_size, workers, rejected, mixed):
        if batch is not None:
            yield batch


def stream_batches(
    loader: ViewLoader,
    groups: Iterable[tuple[Group, np.ndarray]],
    batch_size: int,
    workers: int,
    rejected: Callable[[int, str], None],
    mixed: bool = False,
    pinned: bool = False,
) -> Iterator[tuple[Group, WaveBatch | None]]:
    """Load the waveforms of groups of views in batches of similar length.

    Threads decode ahead, also across the boundary of two groups.

    Args:
        loader: loader of the views.
        groups: each group, and the numbers of its views. The next group is taken when too few views are left to load.
        batch_size: most views in a batch.
        workers: number of threads.
        rejected: function of (view, reason), called for every view that cannot be loaded.
        mixed: whether views of different lengths may share a batch, since padding changes the outputs of some models.
        pinned: whether to put the waveforms in pinned memory.
    Yields:
        The batches of each group, and None at the end of each group.
    """

    def load(view: int) -> np.ndarray | str:
        """The waveform of a view, or the reason why it cannot be loaded."""
        try:
            return loader(view)
        except AudioError as error:
            return error.reason
        except MemoryError:
            return "does not fit into memory; take shorter views (view=windows:SECONDS/HOP or crops:COUNT,SECONDS)"

    def collect(batch: np.ndarray, loaded: Sequence[Future]) -> WaveBatch | None:
        """The batch of the views that could be loaded; None where there are none."""
        kept, waves = [], []
        for view, future in zip(batch, loaded, strict=True):
            result = future.result()
            if isinstance(result, str):
                rejected(int(view), result)
            else:
                kept.append(view)
                waves.append(torch.from_numpy(np.ascontiguousarray(result)))
        if not kept:
            return None
        lengths = torch.tensor([len(wave) for wave in waves])
        padded = pad_sequence(waves, True)
        if pinned:
            padded = padded.pin_memory()
        return WaveBatch(np.array(kept), padded, lengths if len(lengths.unique()) > 1 else None)

    def planned() -> Iterator[tuple[Group, np.ndarray | None]]:
        """The views of each batch, and None at the end of each group."""
        for group, views in groups:
            for batch in batched(views, loader.views.samples[views], batch_size, WASTE if mixed else 0.0):
                yield group, batch
            yield group, None

    # At most about two batches of views are decoded ahead.
    pool = ThreadPoolExecutor(max(workers, 1))
    pending: deque[tuple[Group, np.ndarray | None, list[Future]]] = deque()
    try:
        for group, batch in planned():
            pending.append((group, batch, [] if batch is None else [pool.submit(load, int(view)) for view in batch]))
            while sum(len(futures) for _, _, futures in pending) > 2 * batch_size:
                yield from _finished(pending.popleft(), collect)
        while pending:
            yield from _finished(pending.popleft(), collect)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _finished(
    entry: tuple[Group, np.ndarray | None, list[Future]],
    collect: Callable[[np.ndarray, Sequence[Future]], WaveBatch | None],
) -> Iterator[tuple[Group, WaveBatch | None]]:
    group, batch, futures = entry
    if batch is None:
        yield group, None
    elif (loaded := collect(batch, futures)) is not None:
        yield group, loaded
