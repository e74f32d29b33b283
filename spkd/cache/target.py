"""Targets: what a teacher says at one level, and when."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn.functional import pad

from spkd.audio import SAMPLE_RATE
from spkd.features import HOP, MELS, WINDOW, fbank

EMBEDDING = "embedding"
LOGITS = "logits"


@dataclass(frozen=True)
class Target:
    """One vector of `dim` numbers per view, or, where `hop` is set, one per `hop` samples.

    Row i of a frame-level target was computed from samples [i * hop, i * hop + window) of the view (window 0:
    centred on sample i * hop). Views shorter than one window still give one row. `codec` says how the numbers lie on
    disk; spkd.cache.codec lists the choices.
    """

    name: str
    dim: int
    hop: int | None = None
    window: int = 0
    codec: str = "float16"

    @property
    def rate(self) -> float | None:
        """Rows per second (Hz), None at utterance level."""
        return None if self.hop is None else SAMPLE_RATE / self.hop

    def rows(self, samples: np.ndarray | int) -> np.ndarray:
        """How many rows views of so many samples have."""
        samples = np.asarray(samples, np.int64)
        if self.hop is None:
            return np.ones_like(samples)
        return np.maximum((samples - self.window) // self.hop + 1, 1)

    def count(self, samples: int) -> int:
        """`rows` of one view."""
        return 1 if self.hop is None else max((samples - self.window) // self.hop + 1, 1)

    def stored_as(self, codec: str) -> Target:
        """The same target under another codec."""
        return replace(self, codec=codec)

    def card(self) -> dict[str, Any]:
        return asdict(self) | {"rate_hz": self.rate}

    @classmethod
    def from_card(cls, card: dict[str, Any]) -> Target:
        return cls(**{k: v for k, v in card.items() if k != "rate_hz"})


FBANK = Target("fbank", MELS, HOP, WINDOW)
WAVE = Target("wave", HOP, HOP, HOP)  # the samples themselves, HOP in a row: a crop at whole hops takes exactly its own
FEATURES = {target.name: target for target in (FBANK, WAVE)}  # what a student hears


def features(target: Target, waves: Tensor) -> Tensor:
    """One of FEATURES of waveforms (B, samples): (B, rows, dim); what does not fill the last row is left."""
    if target.name == FBANK.name:
        return fbank(waves)
    rows = target.count(waves.shape[1])
    return pad(waves, (0, max(rows * HOP - waves.shape[1], 0)))[:, : rows * HOP].unflatten(1, (rows, HOP))
