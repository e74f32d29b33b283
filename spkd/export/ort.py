"""onnxruntime's own format (.ort), for its builds of phones, which do not read ONNX."""

from __future__ import annotations

import tempfile
from pathlib import Path

from spkd.errors import SpkdError, UsageError, first_line
from spkd.export.base import Export, Exported, checked, lengths_within
from spkd.export.graph import Embedder
from spkd.export.onnx import Session, runtime_of, write_onnx
from spkd.files.atomic import write_bytes


class ORT(Export):
    """Graph in onnxruntime's format, for any batch size and length."""

    file = "model.ort"
    mark = b"ORTM"  # of any file of the format

    def write(self, embedder: Embedder, out: Path, metadata: dict[str, str]) -> list[Exported]:
        with tempfile.TemporaryDirectory() as folder:
            graph, converted = Path(folder) / "model.onnx", Path(folder) / out.name
            samples = write_onnx(embedder, graph, False, metadata)
            convert(graph, converted)
            write_bytes(out, converted.read_bytes())
        self.runtime = runtime_of(embedder, "ORT (onnxruntime's own, for its builds of phones)", samples)
        return [checked("ort", out, embedder, Session(out), lengths_within(samples))]


def convert(graph: Path, out: Path) -> None:
    """Write an ONNX graph in onnxruntime's format, after the optimisations that suit every processor.

    Raises:
        UsageError: onnxruntime is missing.
        SpkdError: onnxruntime does not convert the graph.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UsageError("to=ort needs onnxruntime: pip install 'spkd[export]'") from error
    options = onnxruntime.SessionOptions()
    # Those above it are for the processor of this machine.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath, options.log_severity_level = str(out), 3
    options.add_session_config_entry("session.save_model_format", "ORT")
    try:
        onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own kinds
        raise SpkdError(f"{out.name}: onnxruntime does not convert it ({first_line(error)})") from error
