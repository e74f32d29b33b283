"""Speed of a training run, and its bottleneck."""

from __future__ import annotations

import resource
import sys

import torch

from spkd.meter import Meter

HELD_UP = 0.1  # fraction of the time spent waiting for data from which a remedy is printed
LONG_ENOUGH = 60.0  # s of a run after which the start of its workers no longer matters
WARM_UP = 5  # steps that are not measured


def summary(meter: Meter, device: torch.device) -> dict[str, float]:
    """Speed by name: views_per_second, waited (fraction of the time), memory_gb; {} where the run was too short.

    Args:
        meter: meter that counts views.
        device: device of the run.
    """
    if meter.is_short:
        return {}
    return {
        "views_per_second": round(meter.rate, 1),
        "waited": round(meter.share("loading"), 3),
        "memory_gb": round(peak_gb(device), 2),
    }


def peak_gb(device: torch.device) -> float:
    """Peak memory (GB) of the GPU, or of this process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def describe(summary: dict[str, float]) -> str:
    """Speed of a run in a line."""
    waited = f"waited {100 * summary['waited']:.0f} % of the time for data"
    return f"{summary['views_per_second']:,.0f} utterances/s; {waited}; {summary['memory_gb']:.1f} GB"


def in_words(summary: dict[str, float], seconds: float, from_audio: bool, workers: int) -> list[str]:
    """Last lines of a run: its speed, and a remedy where it waited for data.

    Args:
        summary: result of `summary`.
        seconds: duration over which it was measured (s).
        from_audio: whether audio is decoded during training.
        workers: number of worker processes.
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
