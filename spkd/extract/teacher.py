"""What every teacher is: a frozen model that declares its targets before it is asked for them."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spkd.cache import Head, Target


class Teacher(ABC):
    """A frozen model on one device.

    Attributes:
        family: its name in the registry.
        targets: everything it can say, by name: dimension, frame rate and window are declared, not guessed.
        min_samples: shortest waveform it accepts (16 kHz).
        head: its own speaker classifier, where it has one.
    """

    family: str
    targets: dict[str, Target]
    min_samples: int = 400
    head: Head | None = None

    @abstractmethod
    def card(self) -> dict[str, Any]:
        """Family, weights' digest, licence, preprocessing: what a colleague needs to know."""

    @abstractmethod
    def run(self, waves: Tensor, names: list[str]) -> dict[str, Tensor]:
        """`waves` (B, samples) on the teacher's device -> (B, D) or (B, T, D) per target."""

    def say(self, waves: Tensor, names: list[str], halves: Collection[str] = ()) -> dict[str, np.ndarray]:
        """The named targets of a batch of equally long waveforms (B, samples): float32, or float16 those in `halves`,
        rounded on the teacher's device (half the bytes to carry, and no work for the writer)."""
        with torch.inference_mode():
            said = self.run(waves, names)
            types = {name: torch.float16 if name in halves else torch.float32 for name in names}
            return {name: said[name].to(types[name]).cpu().numpy() for name in names}


def digest_files(paths: list[Path]) -> str:
    """SHA-256 over the contents of weight files, in name order."""
    state = hashlib.sha256()
    for path in sorted(paths, key=lambda p: p.name):
        with open(path, "rb") as file:
            while block := file.read(1 << 24):
                state.update(block)
    return state.hexdigest()


def digest_tensors(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over named tensors, independent of the file they came in."""
    state = hashlib.sha256()
    for name in sorted(tensors):
        state.update(name.encode())
        state.update(tensors[name].detach().cpu().contiguous().numpy().tobytes())
    return state.hexdigest()
