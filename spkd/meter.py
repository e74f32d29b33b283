"""Meter of a run: what was done, and what the time was spent on."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")
SHORT = 2.0  # s of a run that is too short to say anything


class Meter:
    """What was done in a run, and the seconds that were spent on each of its parts.

    Args:
        warm_up: first counts that are not measured: caches, compilers and workers start in them.
    Attributes:
        done: what was counted: views, or seconds of audio.
    """

    def __init__(self, warm_up: int = 0) -> None:
        self._warm_up, self._counts = warm_up, 0
        self._begin()

    def _begin(self) -> None:
        self._start, self.done = time.perf_counter(), 0.0
        self._spent: dict[str, float] = {}

    @contextmanager
    def spending(self, part: str) -> Iterator[None]:
        """Count the time of the block for a part."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._spent[part] = self._spent.get(part, 0.0) + time.perf_counter() - start

    def loading(self, items: Iterable[Item]) -> Iterator[Item]:
        """Count the time until each item is there for the part `loading`."""
        iterator = iter(items)
        while True:
            with self.spending("loading"):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def count(self, amount: float) -> None:
        """Something was done."""
        self._counts += 1
        if self._counts == self._warm_up:
            self._begin()
        else:
            self.done += amount

    @property
    def seconds(self) -> float:
        """Time since the warm-up."""
        return time.perf_counter() - self._start

    @property
    def rate(self) -> float:
        """What was done a second."""
        return self.done / max(self.seconds, 1e-9)

    @property
    def is_short(self) -> bool:
        """Whether there is too little to say anything."""
        return self._counts <= self._warm_up or self.seconds < SHORT

    def share(self, part: str) -> float:
        """Share of the time that was spent on a part."""
        return self._spent.get(part, 0.0) / max(self.seconds, 1e-9)
