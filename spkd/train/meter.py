"""How fast a run is, and what holds it up."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

Item = TypeVar("Item")
SHORT = 2.0  # s of a run that is too short to be measured
HELD_UP = 0.1  # share of the time from which waiting for data is worth a remedy
WARM_UP = 5  # steps that are not counted: caches, compilers and workers start in them


class Meter:
    """Views per second, and the share of the time in which the next batch was waited for."""

    def __init__(self) -> None:
        self._start, self._waited, self._views, self._batches = time.perf_counter(), 0.0, 0, 0

    def loading(self, batches: Iterable[Item]) -> Iterator[Item]:
        """Count the time until each batch is there."""
        iterator = iter(batches)
        while True:
            before = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self._waited += time.perf_counter() - before
            yield item

    def count(self, views: int) -> None:
        """Views of a step that is done."""
        self._batches += 1
        if self._batches == WARM_UP:
            self._start, self._waited, self._views = time.perf_counter(), 0.0, 0
        else:
            self._views += views

    def summary(self, device: torch.device) -> dict[str, float]:
        """views_per_second, waited (share of the time), memory_gb; {} where the run was too short."""
        seconds = time.perf_counter() - self._start
        if self._batches <= WARM_UP or seconds < SHORT:
            return {}
        return {
            "views_per_second": round(self._views / seconds, 1),
            "waited": round(self._waited / seconds, 3),
            "memory_gb": round(peak_gb(device), 2),
        }


def peak_gb(device: torch.device) -> float:
    """Most memory of the GPU, or of this process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def describe(summary: dict[str, float]) -> str:
    """The speed of a run in a line."""
    waited = f"waited {100 * summary['waited']:.0f} % of the time for data"
    return f"{summary['views_per_second']:,.0f} utterances/s; {waited}; {summary['memory_gb']:.1f} GB"


def in_words(summary: dict[str, float], from_audio: bool, workers: int) -> list[str]:
    """The lines that end a run: its speed, and a remedy where data was waited for.

    Args:
        from_audio: whether audio is decoded during training, by so many workers.
    """
    if not summary:
        return []
    lines = [describe(summary)]
    if summary["waited"] > HELD_UP:
        remedy = (
            f"audio is decoded during training: raise workers={workers}, or extract with fbank=true"
            if from_audio
            else "the cache comes slowly: copy it to a local disk (spkd cache pull), or store it uncompressed"
        )
        lines.append(f"note: the device waited for data: {remedy}")
    return lines
