"""ExecuTorch (.pte) with XNNPACK, for phones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from spkd.errors import SpkdError, UsageError, first_line
from spkd.export.base import Export, Exported, Run, checked, lengths_within
from spkd.export.beside import Runtime
from spkd.export.graph import Embedder, quiet, samples_of, simplified, traced_alone, unchecked
from spkd.export.settings import LongestSettings
from spkd.files.atomic import write_bytes

IMPORTS = """
import torch
from executorch.runtime import Runtime
"""
CODE = """
GRAPH = Runtime.get().load_program(str(MODEL)).load_method("forward")


def run(x):
    return GRAPH.execute([torch.from_numpy(x)])[0][0].numpy()
"""


class PTE(Export):
    """ExecuTorch's program, for a single view."""

    Settings = LongestSettings
    file = "model.pte"
    mark = b"ET12"  # of any file of the format, which has no metadata

    def one_length(self, waveform: bool) -> float | None:
        return float(self.settings.seconds) if waveform else None

    def write(self, embedder: Embedder, out: Path, metadata: dict[str, str]) -> list[Exported]:
        samples = write_pte(embedder, out, self.settings.seconds)
        self.runtime = Runtime("ExecuTorch with XNNPACK", "numpy executorch", IMPORTS, CODE, "x", "embedding", samples)
        return [checked("pte", out, embedder, load_pte(out), lengths_within(samples))]


def write_pte(embedder: Embedder, out: Path, seconds: float) -> tuple[int, int]:
    """Write the program for a single view.

    Args:
        seconds: as of `traced_alone`.
    Returns:
        Least and greatest number of samples of a recording.
    Raises:
        UsageError: executorch is missing.
        SpkdError: the network cannot be converted.
    """
    try:
        with quiet():
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.exir import to_edge_transform_and_lower
    except ImportError as error:
        raise UsageError("to=pte needs executorch: pip install 'spkd[executorch]'") from error
    try:
        program = traced_alone(embedder, seconds)
        samples = samples_of(program, embedder)
        with unchecked(), torch.no_grad():
            data = (
                to_edge_transform_and_lower(simplified(program), partitioner=[XnnpackPartitioner()])
                .to_executorch()
                .buffer
            )
    except Exception as error:  # the converter raises many kinds
        raise SpkdError(f"{out}: the network cannot be converted ({first_line(error)})") from error
    write_bytes(out, bytes(data))
    return samples


def load_pte(path: Path) -> Run:
    """Function that runs the program of a file: a single view -> embedding (1, D).

    It raises SpkdError where ExecuTorch fails.
    """
    from executorch.runtime import Runtime as Machine

    program = Machine.get().load_program(path)
    method = program.load_method("forward")

    def run(x: Tensor) -> np.ndarray:
        try:
            return method.execute([x])[0].numpy()
        except RuntimeError as error:
            raise SpkdError(f"{path}: ExecuTorch does not run it ({first_line(error)})") from error

    return run
