"""Base class of export formats, and the comparison of an exported model with the student."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from spkd.corpus.audio import SAMPLE_RATE
from spkd.errors import SpkdError
from spkd.eval.calibration import Calibration
from spkd.eval.embed import median_time
from spkd.export.beside import Runtime
from spkd.export.graph import Embedder
from spkd.files.atomic import check_holds_no_other, check_is_own, check_replaces_none, check_writable, writable_folder
from spkd.files.text import format_bytes
from spkd.networks.network import Network

CHECKED = (1.0, 2.5, 4.0, 8.0)  # lengths of the inputs of the comparison (s)
LEAST = 0.9999  # least cosine of embeddings of an export in floating point with the student's
SECONDS, REPEATS = 4.0, 9  # length of the view (s) and number of repetitions for the latency
COMMENT = "trained by spkd"  # in the metadata of files that have any
Run = Callable[[Tensor], np.ndarray]


@dataclass(frozen=True)
class Exported:
    """Measures of a model before or after the export.

    Attributes:
        cosine: least cosine of its embeddings with the student's; None for the student itself.
        real_time_factor: processing time over audio time on one thread; features count only where the model computes
            them. None where the model cannot be run on this machine.
        eer_percent: EER (%) on the trials; None without trials.
    """

    name: str
    bytes: int
    cosine: float | None
    real_time_factor: float | None
    eer_percent: float | None = None

    def line(self) -> str:
        """The measures in a line."""
        cosine = "" if self.cosine is None else f"   cosine with the student {self.cosine:.6f}"
        rate = "" if self.eer_percent is None else f"   EER {self.eer_percent:.3f} %"
        factor = self.real_time_factor
        speed = "not run here" if factor is None else f"real-time factor {factor:.5f} on one thread"
        return f"{self.name:12} {format_bytes(self.bytes):>9}   {speed}{cosine}{rate}"


class Export(ABC):
    """Base class of formats of exported students.

    A new format is a subclass in a file of its own and its name in spkd.registry.EXPORTS.

    Attributes:
        Settings: dataclass of the settings of the format, where it has any.
        file: name of the file, or folder, in the student's folder; see `name`.
        folder: of a format that writes a folder: names of its files, and records as of `check_replaces_none`.
        mark: bytes in each file of the format, by which one in the student's folder is known; empty: there are none.
        takes_waveform: whether the graph takes the waveform in any case.
        lacks: name of each key of `spkd export` that has no effect with the format -> the reason.
        runtime: what the files beside the model say of its runtime, from `write` on; None: there are no such files.
    """

    file: ClassVar[str]
    folder: ClassVar[tuple[Sequence[str], Mapping[str, str]]] = ((), {})
    mark: ClassVar[bytes] = b""
    takes_waveform: ClassVar[bool] = False
    lacks: ClassVar[Mapping[str, str]] = {"trials": "spkd scores ONNX models alone"}

    def __init__(self, settings: Any) -> None:
        self.settings = settings
        self.runtime: Runtime | None = None

    def check(self, network: Network) -> None:  # noqa: B027  most formats take every network
        """Check settings and network. Raises UsageError for missing settings, or a network that the format lacks."""

    def check_calibration(self, calibration: Calibration) -> None:  # noqa: B027  most formats carry any
        """Check the calibration that goes with the model. Raises UsageError for one that the format lacks."""

    def name(self, waveform: bool) -> str:
        """Name of the file in the student's folder, which depends on the input.

        Args:
            waveform: whether the graph takes the waveform where it could take features.
        """
        return tagged(self.file, "wave") if waveform else self.file

    def check_out(self, out: Path, is_named: bool) -> None:
        """Check that the file or folder can be written.

        Args:
            is_named: whether the user named it, who may want a file replaced.
        Raises:
            UsageError: something would be replaced that is no export.
            SpkdError: it cannot be written.
        """
        if not Path(self.file).suffix:
            check_holds_no_other(out, "an export")
            check_replaces_none(out, *self.folder)
            writable_folder(out)
            return
        check_writable(out)
        if self.mark and not is_named:
            check_is_own(out, self.mark, "out=FILE")

    def changes_scores(self, network: Network) -> str:
        """Reason why the scores of the written model are not the student's, so that it gets no calibration; or ""."""
        return ""

    def one_length(self, waveform: bool) -> float | None:
        """Length (s) to which recordings are repeated or cut, as the graph takes no other; None: it takes others.

        Scores of such recordings are not those of whole ones, so that their calibration is to be named.

        Args:
            waveform: whether the graph takes the waveform.
        """
        return None

    def way_to_calibrate(self, out: Path, waveform: bool) -> str:
        """Phrase that says how the written model gets a calibration."""
        if seconds := self.one_length(waveform):
            return (
                f"run `spkd calibrate TRIALS model=STUDENT manifest=FILE out=OTHER.json` on recordings repeated or cut "
                f"to {seconds:g} s, and `spkd export` with calibration=OTHER.json"
            )
        return "run `spkd calibrate TRIALS model=STUDENT manifest=FILE`, then `spkd export` again"

    @abstractmethod
    def write(self, embedder: Embedder, out: Path, metadata: dict[str, str]) -> list[Exported]:
        """Write the file, run it, and compare it with the student.

        Returns:
            Measures of the written models.
        Raises:
            UsageError: a package is missing.
            SpkdError: the network cannot be exported, or its embeddings differ from the student's.
        """


def tagged(file: str, tag: str) -> str:
    """Name of a file with a tag before its suffixes: model.onnx -> model.wave.onnx."""
    stem, dot, suffixes = file.partition(".")
    return f"{stem}.{tag}{dot}{suffixes}"


def lengths_within(samples: tuple[int, int]) -> tuple[float, ...]:
    """Lengths (s) for the comparison: those of CHECKED that a graph takes, or the nearest one.

    Args:
        samples: least and greatest number of samples of a recording.
    """
    least, most = (count / SAMPLE_RATE for count in samples)
    return tuple(s for s in CHECKED if least <= s <= most) or (min(max(CHECKED[0], least), most),)


def checked(name: str, out: Path, embedder: Embedder, run: Run, seconds: Sequence[float] = CHECKED) -> Exported:
    """Measures of an export in floating point. Raises SpkdError where its embeddings differ from the student's.

    Args:
        seconds: lengths of the inputs of the comparison (s).
    """
    cosine = least_cosine(in_torch(embedder), run, [embedder.example(s, seed=i) for i, s in enumerate(seconds)])
    if not cosine >= LEAST:
        raise SpkdError(f"{out}: its embeddings differ from the student's (cosine {cosine:.6f})")
    timed = SECONDS if SECONDS in seconds else seconds[-1]
    return Exported(name, out.stat().st_size, cosine, real_time_factor(run, embedder, timed))


def in_torch(module: Callable[[Tensor], Tensor]) -> Run:
    """Function from input to embeddings (B, D) that runs a module."""

    def run(x: Tensor) -> np.ndarray:
        with torch.inference_mode():
            return module(x).numpy()

    return run


def least_cosine(first: Run, second: Run, inputs: Sequence[Tensor]) -> float:
    """Least cosine between two models' embeddings of the same inputs, in float64."""
    cosines = []
    for x in inputs:
        a, b = (run(x).astype(np.float64) for run in (first, second))
        cosines.append(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())
    return float(min(cosines))


def real_time_factor(run: Run, embedder: Embedder, seconds: float = SECONDS) -> float:
    """Median processing time of a view over its length, on one thread."""
    example = embedder.example(seconds)
    return median_time(lambda: run(example), REPEATS) / seconds
