"""Speed of a training, and what holds it up."""

from __future__ import annotations

import resource
import sys

import torch

from spkd.meter import Meter

HELD_UP = 0.1  # share of the time from which waiting for data is worth a remedy
LONG_ENOUGH = 60.0  # s of a run after which the start of its workers no longer shows
WARM_UP = 5  # steps that are not measured


def summary(meter: Meter, device: torch.device) -> dict[str, float]:
    """views_per_second, waited (share of the time), memory_gb; {} where the run was too short.

    Args:
        meter: counts views.
    """
    if meter.is_short:
        return {}
    return {
        "views_per_second": round(meter.rate, 1),
        "waited": round(meter.share("loading"), 3),
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


def in_words(summary: dict[str, float], seconds: float, from_audio: bool, workers: int) -> list[str]:
    """The lines that end a run: its speed, and a remedy where data was waited for.

    Args:
        seconds: that the summary was measured over.
        from_audio: whether audio is decoded during training, by so many workers.
    """
    if not summary:
        return []
    lines = [describe(summary)]
    if summary["waited"] > HELD_UP and seconds >= LONG_ENOUGH:
        remedy = (
            f"audio is decoded during training: raise workers={workers}, or extract with fbank=true"
            if from_audio
            else f"the cache comes slowly: raise workers={workers}, copy it to a local disk if it is not on one "
            "(spkd cache pull), or store it uncompressed"
        )
        lines.append(f"note: the device waited for data: {remedy}")
    return lines
