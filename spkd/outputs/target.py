"""Targets: outputs of a teacher at one level, with their width and rate."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from spkd.corpus.audio import SAMPLE_RATE

EMBEDDING = "embedding"
LOGITS = "logits"
CODES = ".codes"  # end of the name of a target's codes, which a cache gives beside the target where it stores codes


@dataclass(frozen=True)
class Target:
    """One vector of `dim` numbers per view; or, at frame level, one per `hop` samples.

    Frame i of a frame-level target is centred on sample i * hop + centre of the view. A view has as many frames as
    windows fit, `hop` samples apart: 1 + (samples - window) // hop, and at least one.

    Attributes:
        name: unique name within a teacher; also the name of a folder.
        dim: numbers in a vector.
        hop: samples between frames; None at utterance level.
        window: samples of the first frame's window; 0 where windows are centred on their first sample.
        codec: name of the codec; spkd.registry.CODECS lists the choices.
        centre: sample on which the first frame is centred, below 0 in causal networks; None takes the middle of its
            window.
    """

    name: str
    dim: int = field(metadata={"low": 1, "high": 10**8})
    hop: int | None = field(default=None, metadata={"low": 1, "high": 10**9})
    window: int = field(default=0, metadata={"low": 0, "high": 10**9})
    codec: str = "float16"
    centre: int | None = field(default=None, metadata={"low": -(10**9), "high": 10**9})

    @property
    def middle(self) -> float:
        """Sample on which the first frame is centred."""
        return self.window / 2 if self.centre is None else self.centre

    @property
    def rate(self) -> float | None:
        """Frames per second (Hz), None at utterance level."""
        return None if self.hop is None else SAMPLE_RATE / self.hop

    @overload
    def num_frames(self, samples: int) -> int: ...
    @overload
    def num_frames(self, samples: np.ndarray) -> np.ndarray: ...
    @overload
    def num_frames(self, samples: Tensor) -> Tensor: ...
    def num_frames(self, samples: int | np.ndarray | Tensor) -> int | np.ndarray | Tensor:
        """Number of vectors of a view.

        Args:
            samples: length of the view, or (N,) lengths of several.
        Returns:
            The number, or (N,) numbers; 1 at utterance level.
        """
        if isinstance(samples, int):
            return 1 if self.hop is None else max((samples - self.window) // self.hop + 1, 1)
        if isinstance(samples, Tensor):
            ones = torch.ones_like(samples)
            return ones if self.hop is None else ((samples - self.window) // self.hop + 1).maximum(ones)
        samples = np.asarray(samples, np.int64)
        if self.hop is None:
            return np.ones_like(samples)
        return np.maximum((samples - self.window) // self.hop + 1, 1)

    def stored_as(self, codec: str) -> Target:
        """The same target under another codec."""
        return replace(self, codec=codec)

    def after(self, taken: Target, given: Target) -> Target:
        """The target of the same network with other input features.

        Args:
            taken: the input features for which this target describes the output.
            given: the input features that the network is given instead.
        """
        if self.hop is None:
            return self
        centre = self.middle + given.middle - taken.middle
        window = self.window + given.window - taken.window
        return replace(self, window=window, centre=None if centre == window / 2 else round(centre))

    def to_json(self) -> dict[str, Any]:
        """The target as JSON, with its rate."""
        return {k: v for k, v in asdict(self).items() if v is not None or k == "hop"} | {"rate_hz": self.rate}
