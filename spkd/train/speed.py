"""Speed of a training run, and its bottleneck."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass, field

import torch

from spkd.cores import usable
from spkd.meter import Meter

HELD_UP = 0.1  # fraction of the time spent waiting for data from which a remedy is printed
LONG_ENOUGH = 60.0  # s of a run after which the start of its workers no longer matters
WARM_UP = 5  # steps that are not measured


@dataclass(frozen=True)
class Speed:
    """Speed of a run, as measured by its meter.

    Attributes:
        waited: fraction of the time spent waiting for data.
        memory_gb: peak memory of the GPU, or of the process (GB).
    """

    views_per_second: float = field(metadata={"low": 0})
    waited: float = field(metadata={"low": 0, "high": 1})
    memory_gb: float = field(metadata={"low": 0})

    @classmethod
    def of(cls, meter: Meter, device: torch.device) -> Speed | None:
        """Speed so far; None where the run was too short."""
        if meter.is_short:
            return None
        return cls(round(meter.rate, 1), round(meter.share("loading"), 3), round(peak_gb(device), 2))

    def __str__(self) -> str:
        waited = f"waited {100 * self.waited:.0f} % of the time for data"
        return f"{self.views_per_second:,.0f} utterances/s; {waited}; {self.memory_gb:.1f} GB"


def peak_gb(device: torch.device) -> float:
    """Peak memory (GB) of the GPU, or of this process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def in_words(speed: Speed | None, seconds: float, from_audio: bool, workers: int) -> list[str]:
    """Last lines of a run: its speed, and a remedy where it waited for data.

    Args:
        seconds: duration over which it was measured (s).
    """
    if speed is None:
        return []
    lines = [str(speed)]
    if speed.waited > HELD_UP and seconds >= LONG_ENOUGH:
        more = f"raise workers={workers}" if workers < usable() else "take more cores"
        remedy = (
            f"audio is decoded during training: {more}, or extract with fbank=true"
            if from_audio
            else "the cache comes slowly: copy it to a local disk if it is not on one (spkd cache pull), or store it "
            "uncompressed"
        )
        lines.append(f"note: the device waited for data: {remedy}")
    return lines
