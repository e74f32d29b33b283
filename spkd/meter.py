"""Meter of a run: the amount of work, and the time spent on each activity."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")
SHORT = 2.0  # s below which a run is too short for a rate


class Meter:
    """Meter of the work done in a run, and of the time spent on each activity.

    Args:
        warm_up: number of first counts that are not measured, since caches, compilers and workers start in them.
    Attributes:
        done: amount that was counted, in views or in seconds of audio.
    """

    def __init__(self, warm_up: int = 0) -> None:
        self._warm_up, self._counts = warm_up, 0
        self._begin()

    def _begin(self) -> None:
        self._start, self.done = time.perf_counter(), 0.0
        self._spent: dict[str, float] = {}

    @contextmanager
    def spending(self, activity: str) -> Iterator[None]:
        """Add the time of the block to an activity."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.spend(activity, time.perf_counter() - start)

    def spend(self, activity: str, seconds: float) -> None:
        """Add time to an activity, which may be that of several cores together."""
        self._spent[activity] = self._spent.get(activity, 0.0) + seconds

    def loading(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items, and add the time of waiting for each to the activity `loading`."""
        iterator = iter(items)
        while True:
            with self.spending("loading"):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def count(self, amount: float) -> None:
        """Add an amount of work, in views or in seconds of audio."""
        self._counts += 1
        if self._counts == self._warm_up:
            self._begin()
        else:
            self.done += amount

    @property
    def seconds(self) -> float:
        """Time since the warm-up (s)."""
        return time.perf_counter() - self._start

    @property
    def rate(self) -> float:
        """Amount of work per second."""
        return self.done / max(self.seconds, 1e-9)

    @property
    def is_short(self) -> bool:
        """Whether the run is too short for a rate."""
        return self._counts <= self._warm_up or self.seconds < SHORT

    def share(self, activity: str) -> float:
        """Share of the time that was spent on an activity."""
        return self._spent.get(activity, 0.0) / max(self.seconds, 1e-9)
