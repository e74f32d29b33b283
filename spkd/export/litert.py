"""LiteRT (TensorFlow Lite), for Android and microcontrollers."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from spkd.corpus.audio import SAMPLE_RATE
from spkd.errors import SpkdError, UsageError, first_line
from spkd.export.base import Export, Exported, checked
from spkd.export.beside import Runtime
from spkd.export.graph import Embedder, quiet
from spkd.export.settings import LiteRTSettings
from spkd.files.atomic import write_bytes

IMPORTS = "from ai_edge_litert.interpreter import Interpreter"
CODE = """
GRAPH = Interpreter(str(MODEL))
GRAPH.allocate_tensors()


def run(x):
    GRAPH.set_tensor(GRAPH.get_input_details()[0]["index"], x)
    GRAPH.invoke()
    return GRAPH.get_tensor(GRAPH.get_output_details()[0]["index"])[0]
"""


class LiteRT(Export):
    """TensorFlow Lite, for a single view of a fixed length."""

    Settings = LiteRTSettings
    file = "model.tflite"
    mark = b"TFL3"  # of any file of the format, which has no metadata

    def one_length(self, waveform: bool) -> float | None:
        return float(self.settings.seconds)

    def write(self, embedder: Embedder, out: Path, metadata: dict[str, str]) -> list[Exported]:
        write_litert(embedder, out, self.settings.seconds)
        samples = round(self.settings.seconds * SAMPLE_RATE)
        names = "args_0", "output_0"
        self.runtime = Runtime(
            "LiteRT (TensorFlow Lite)", "numpy ai-edge-litert", IMPORTS, CODE, *names, (samples, samples)
        )
        return [checked("litert", out, embedder, load_litert(out), (self.settings.seconds,))]


def write_litert(embedder: Embedder, out: Path, seconds: float) -> None:
    """Write the graph for a single view of a fixed length.

    Raises:
        UsageError: litert-torch is missing.
        SpkdError: the network cannot be converted.
    """
    try:
        import litert_torch
    except ImportError as error:
        raise UsageError("to=litert needs litert-torch: pip install 'spkd[litert]'") from error
    try:
        with quiet(), torch.no_grad():
            model = litert_torch.convert(embedder, (embedder.example(seconds),))
        with tempfile.TemporaryDirectory() as folder:
            model.export(str(Path(folder) / out.name))
            data = (Path(folder) / out.name).read_bytes()
    except Exception as error:  # the converter raises many kinds
        raise SpkdError(f"{out}: the network cannot be converted ({first_line(error)})") from error
    write_bytes(out, data)


def load_litert(path: Path) -> Callable[[Tensor], np.ndarray]:
    """Function that runs the graph of a file on one thread: a single view -> embedding (1, D)."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), num_threads=1)
    interpreter.allocate_tensors()
    taken, given = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]

    def run(x: Tensor) -> np.ndarray:
        interpreter.set_tensor(taken, x.numpy())
        interpreter.invoke()
        return interpreter.get_tensor(given)

    return run
