"""Base class of formats, and the comparison of what is written with the student."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from spkd.errors import SpkdError
from spkd.eval.embed import median_time
from spkd.export.graph import Embedder
from spkd.networks.network import Network

CHECKED = (1.0, 2.5, 4.0, 8.0)  # s
LEAST = 0.9999  # cosine of what is written in floating point with the student
SECONDS, REPEATS = 4.0, 9  # of the latency
Run = Callable[[Tensor], np.ndarray]


@dataclass(frozen=True)
class Exported:
    """A model before or after the export.

    Attributes:
        name: for people.
        bytes: size of its file.
        cosine: least cosine of its embeddings with the student's; None for the student itself.
        real_time_factor: processing time over audio time on one thread, without features that it does not compute.
        eer_percent: on the trials, if there are any.
    """

    name: str
    bytes: int
    cosine: float | None
    real_time_factor: float
    eer_percent: float | None = None


class Export(ABC):
    """A format of exported students.

    A new format is a subclass in a file of its own and its name in spkd.registry.EXPORTS.

    Args:
        settings: its own; see `Settings`.
    Attributes:
        Settings: dataclass of its own settings, where it has any.
        file: name of the file, or folder, in the student's folder; see `name`.
    """

    file: ClassVar[str]

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    def check(self, network: Network) -> None:  # noqa: B027  most formats take every network
        """Raises UsageError for settings that are missing, or a network that the format does not have."""

    def name(self, waveform: bool) -> str:
        """Name of the file in the student's folder, another one for another input.

        Args:
            waveform: whether the graph takes the waveform where it could take features.
        """
        return tagged(self.file, "wave") if waveform else self.file

    @abstractmethod
    def write(self, embedder: Embedder, out: Path, metadata: dict[str, str]) -> list[Exported]:
        """Write the file, run it, and compare it with the student.

        Args:
            embedder: input -> embedding.
            out: the file.
            metadata: what a runtime and a person need to know of it.
        Raises:
            UsageError: a package is missing.
            SpkdError: the network cannot be exported, or its embeddings differ from the student's.
        """


def tagged(file: str, tag: str) -> str:
    """The name of a file with a tag before its suffixes: model.onnx -> model.wave.onnx."""
    stem, dot, suffixes = file.partition(".")
    return f"{stem}.{tag}{dot}{suffixes}"


def checked(name: str, out: Path, embedder: Embedder, run: Run, seconds: Sequence[float] = CHECKED) -> Exported:
    """The measures of a file in floating point. Raises SpkdError where its embeddings differ from the student's.

    Args:
        name: for people.
        out: the file.
        embedder: of the student.
        run: of the file.
        seconds: lengths of the inputs on which they are compared.
    """
    cosine = least_cosine(in_torch(embedder), run, [embedder.example(s, seed=i) for i, s in enumerate(seconds)])
    if not cosine >= LEAST:
        raise SpkdError(f"{out}: its embeddings differ from the student's (cosine {cosine:.6f})")
    timed = seconds[0] if len(seconds) == 1 else SECONDS
    return Exported(name, out.stat().st_size, cosine, real_time_factor(run, embedder, timed))


def in_torch(module: Callable[[Tensor], Tensor]) -> Run:
    """A module as a function from input to embeddings (B, D)."""

    def run(x: Tensor) -> np.ndarray:
        with torch.inference_mode():
            return module(x).numpy()

    return run


def least_cosine(first: Run, second: Run, inputs: Sequence[Tensor]) -> float:
    """The least cosine between two models' embeddings of the same inputs, in float64."""
    cosines = []
    for x in inputs:
        a, b = (run(x).astype(np.float64) for run in (first, second))
        cosines.append(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())
    return float(min(cosines))


def real_time_factor(run: Run, embedder: Embedder, seconds: float = SECONDS) -> float:
    """Median processing time of a view over its length, on one thread."""
    example = embedder.example(seconds)
    return median_time(lambda: run(example), REPEATS) / seconds
