"""Where the time of an extraction goes: hours of audio per hour, how busy the teacher is, and what holds it up."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

import numpy as np

from spkd.corpus.audio import SAMPLE_RATE
from spkd.progress import log

Item = TypeVar("Item")
SHORT = 2.0  # s of a run that is too short to say anything
HELD_UP = 0.15  # share of the time from which waiting is named


class Meter:
    """Seconds of a run by what they were spent on.

    Args:
        workers: threads that load, for the advice.
    """

    def __init__(self, workers: int) -> None:
        self._workers, self._start = workers, time.perf_counter()
        self._spent = {"loading": 0.0, "teacher": 0.0, "writing": 0.0}
        self.audio = 0.0  # s

    def loading(self, items: Iterable[Item]) -> Iterator[Item]:
        """Count the time until each item is there."""
        iterator = iter(items)
        while True:
            with self._counted("loading"):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    @contextmanager
    def _counted(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._spent[what] += time.perf_counter() - start

    def teacher(self) -> AbstractContextManager[None]:
        return self._counted("teacher")

    def writing(self) -> AbstractContextManager[None]:
        return self._counted("writing")

    def count(self, samples: np.ndarray) -> None:
        """Views that were extracted."""
        self.audio += float(samples.sum(dtype=np.int64)) / SAMPLE_RATE

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def note(self) -> str:
        """Speed so far, for the progress bar."""
        return f"{self.audio / max(self.seconds, 1e-9):.0f} h/h"

    def shares(self) -> dict[str, float]:
        """Share of the time spent on each."""
        return {what: spent / max(self.seconds, 1e-9) for what, spent in self._spent.items()}

    def report(self) -> None:
        """Log the speed, and what holds the teacher up."""
        if not self.audio or self.seconds < SHORT:
            return
        shares = self.shares()
        log(
            f"{self.audio / 3600:.2f} h of audio in {self.seconds:.0f} s: {self.audio / self.seconds:.0f} hours per "
            f"hour; the teacher was busy {shares['teacher']:.0%} of the time, waited {shares['loading']:.0%} for audio "
            f"and {shares['writing']:.0%} for the disk"
        )
        if shares["loading"] > HELD_UP:
            cores = os.cpu_count() or 1
            more = f"raise workers={self._workers}" if self._workers < cores else "take faster storage or more cores"
            log(f"bottleneck: decoding and augmentation; {more} (this machine has {cores} cores)")
        elif shares["writing"] > HELD_UP:
            log("bottleneck: writing the cache; take faster storage, fewer targets or a smaller codec")
