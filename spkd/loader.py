"""Loading views: decode, cut, change speed, augment; in threads, ahead of need, in batches of equal length."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from spkd.audio import SAMPLE_RATE, SLACK, AudioError, Decoded, change_speed, decode
from spkd.augment import Augmentation
from spkd.manifest import Manifest
from spkd.view import Views, source_samples

MOST_SAMPLES = 600 * SAMPLE_RATE  # of audio in one batch


class ViewLoader:
    """The waveform of any view of a manifest.

    Args:
        min_seconds: shorter utterances are refused.
        notify: called once when audio is resampled, and once when channels are averaged.
        max_seconds: longer views are refused; None: none is.
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
        self._doubts: dict[str, set[int]] = {}

    def __call__(self, view: int) -> np.ndarray:
        """The waveform (samples,) of one view, float32.

        Where a view is longer than its utterance, the utterance is repeated, as is usual in the field.

        Raises:
            AudioError: the file is unusable, shorter than its manifest says, or shorter than the minimum.
        """
        views = self.views
        utterance = self.manifest[int(views.utterance[view])]
        start, samples = int(views.start[view]), int(views.samples[view])
        speed, planned = float(views.speed[view]), round((utterance.duration or 0.0) * SAMPLE_RATE)
        if planned < self._min_seconds * SAMPLE_RATE:
            raise AudioError(utterance.path, f"too short ({planned / SAMPLE_RATE:.2f} s < {self._min_seconds:g} s)")
        if self._max_seconds is not None and samples > self._max_seconds * SAMPLE_RATE:
            raise AudioError(
                utterance.path,
                f"{samples / SAMPLE_RATE:.0f} s are more than this model takes at once in bounded memory "
                f"({self._max_seconds:.0f} s); cut the utterance, or take view=windows:SECONDS/HOP",
            )
        span = min(int(source_samples(samples, speed)), planned - start)
        first, seconds = utterance.start + start / SAMPLE_RATE, span / SAMPLE_RATE
        decoded = decode(utterance.path, first, seconds, utterance.channel)
        if len(decoded.wave) < span - SLACK * SAMPLE_RATE:
            raise AudioError(utterance.path, _too_short(span, len(decoded.wave), utterance.duration or 0.0))
        if decoded.doubt:
            self._doubts.setdefault(decoded.doubt, set()).add(int(views.utterance[view]))
        wave = np.resize(change_speed(decoded.wave, round(speed, 2)), samples)
        self._note(decoded, utterance.channel)
        return self._augment(wave, int(views.seed[view]))

    def report_doubts(self) -> None:
        """Log, once per kind, how many of the utterances that were loaded are probably not speech."""
        for doubt, found in sorted(self._doubts.items()):
            if self._notify is not None:
                example = self.manifest[min(found)].id
                self._notify(
                    f"note: {len(found)} utterances {doubt} (for example {example}); they are used as they are"
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


def _too_short(wanted: int, found: int, duration: float) -> str:
    """Why a file that ended early was refused: its manifest may count in another unit."""
    reason = f"ends {(wanted - found) / SAMPLE_RATE:.2f} s before its manifest says"
    ratio = wanted / max(found, 1)
    for unit, factor in (("milliseconds", 1000.0), ("samples", float(SAMPLE_RATE))):
        if 0.5 * factor < ratio < 2 * factor:
            return f"{reason}: its duration of {duration:g} looks like {unit}; durations are in seconds"
    return reason


@dataclass(frozen=True)
class WaveBatch:
    """Views of equal length.

    Attributes:
        views: (B,) their numbers.
        waves: (B, samples) their waveforms.
    """

    views: np.ndarray
    waves: Tensor


def iterate_batches(
    loader: ViewLoader,
    views: np.ndarray,
    batch_size: int,
    workers: int,
    rejected: Callable[[int, str], None],
) -> Iterator[WaveBatch]:
    """Waveforms of `views`, decoded ahead by `workers` threads, batched by exact length.

    Only views of one length share a batch: padding changes the outputs of many teachers.

    Args:
        rejected: called with (view, reason) for every view that cannot be loaded.
    """
    lengths = loader.views.samples[views]
    order = np.argsort(lengths, kind="stable")
    groups = np.split(views[order], np.flatnonzero(np.diff(lengths[order])) + 1) if len(views) else []
    # Long views make smaller batches, so that memory stays bounded.
    sizes = [max(min(batch_size, MOST_SAMPLES // max(int(loader.views.samples[group[0]]), 1)), 1) for group in groups]
    batches = [group[i : i + n] for group, n in zip(groups, sizes, strict=True) for i in range(0, len(group), n)]

    def load(view: int) -> np.ndarray | str:
        try:
            return loader(view)
        except AudioError as error:
            return error.reason
        except MemoryError:
            return "does not fit into memory; take shorter views (view=windows:SECONDS/HOP or crops:COUNT,SECONDS)"

    def collect(batch: np.ndarray, loaded: Sequence[Future]) -> WaveBatch | None:
        kept, waves = [], []
        for view, future in zip(batch, loaded, strict=True):
            result = future.result()
            if isinstance(result, str):
                rejected(int(view), result)
            else:
                kept.append(view)
                waves.append(torch.from_numpy(np.ascontiguousarray(result)))
        return WaveBatch(np.array(kept), torch.stack(waves)) if kept else None

    pool = ThreadPoolExecutor(max(workers, 1))
    pending: deque[tuple[np.ndarray, list[Future]]] = deque()
    ahead = 0
    try:
        for batch in batches:
            pending.append((batch, [pool.submit(load, int(view)) for view in batch]))
            ahead += len(batch)
            while ahead > 2 * batch_size:
                done = pending.popleft()
                ahead -= len(done[0])
                if (result := collect(*done)) is not None:
                    yield result
        for done in pending:
            if (result := collect(*done)) is not None:
                yield result
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
