"""ONNX: the graph, its metadata, and its use in onnxruntime."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from spkd.corpus.audio import SAMPLE_RATE
from spkd.errors import SpkdError, UsageError, first_line
from spkd.export.base import COMMENT, Export, Exported, checked, tagged
from spkd.export.beside import Runtime
from spkd.export.graph import Embedder, quiet, samples_of, toolkit_of, traced
from spkd.export.settings import ONNXSettings
from spkd.files.atomic import write_bytes
from spkd.outputs.features import FBANKS, is_fbank
from spkd.outputs.target import EMBEDDING
from spkd.progress import log
from spkd.teachers.onnx import CARD
from spkd.teachers.onnx_file import CALIBRATION, sealed

OPSET = 20
NAMES = {False: "feats", True: "wave"}  # name of the input, by whether it is the waveform; WeSpeaker's convention
OUTPUT = "embs"
IMPORTS = "import onnxruntime"
CODE = """
SESSION = onnxruntime.InferenceSession(str(MODEL), providers=["CPUExecutionProvider"])


def run(x):
    names = [node.name for node in SESSION.get_inputs()]  # the second, where there is one, takes the valid lengths
    return SESSION.run(None, dict(zip(names, [x, np.array([x.shape[1]])])))[0][0]
"""


class ONNX(Export):
    """ONNX, for any batch size and length."""

    Settings = ONNXSettings
    file = "model.onnx"
    mark = COMMENT.encode()
    lacks: ClassVar = {}

    def name(self, waveform: bool) -> str:
        return tagged(super().name(waveform), "lengths") if self.settings.lengths else super().name(waveform)

    def way_to_calibrate(self, out: Path, waveform: bool) -> str:
        return way_to_calibrate(out)

    def write(self, embedder: Embedder, out: Path, metadata: dict[str, str]) -> list[Exported]:
        samples = write_onnx(embedder, out, self.settings.lengths, metadata)
        self.runtime = runtime_of(embedder, "ONNX", samples)
        if not sherpa_metadata(embedder, self.settings.lengths):
            log(
                f"note: {out} is not for sherpa-onnx, which computes features in its own way: for phones train with "
                "student.features=sherpa, and export without waveform and lengths"
            )
        return [checked("onnx", out, embedder, Session(out))]


def way_to_calibrate(out: Path) -> str:
    """Phrase that says how a file gets a calibration of its own scores."""
    command = f"spkd calibrate TRIALS model=onnx model.weights={shlex.quote(out.name)} manifest=FILE"
    return f"run `{command}` beside it"


def runtime_of(embedder: Embedder, name: str, samples: tuple[int, int]) -> Runtime:
    """onnxruntime, for the files beside a graph; `name` is that of the format, and `samples` as of `samples_of`."""
    waveform = embedder.front_end is not None
    return Runtime(name, "numpy onnxruntime", IMPORTS, CODE, NAMES[waveform], OUTPUT, samples, batch=True)


def write_onnx(embedder: Embedder, out: Path, lengths: bool, metadata: dict[str, str]) -> tuple[int, int]:
    """Write the graph, for any batch size and length, with its metadata.

    Args:
        lengths: whether the graph has a second input `lengths` (B,).
    Returns:
        Least and greatest number of samples of a recording.
    Raises:
        UsageError: onnx or onnxscript is missing.
        SpkdError: the network cannot be exported.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UsageError("to=onnx needs onnx and onnxscript: pip install 'spkd[export]'") from error
    waveform = embedder.front_end is not None
    names = [NAMES[waveform], *(["lengths"] if lengths else [])]
    try:
        program = traced(embedder, lengths)
        with quiet(), torch.no_grad():
            exported = torch.onnx.export(
                program, dynamo=True, input_names=names, output_names=[OUTPUT], opset_version=OPSET, verbose=False
            )
    except Exception as error:  # the exporter raises many kinds
        raise SpkdError(f"{out.name}: the network cannot be exported ({first_line(error)})") from error
    assert exported is not None
    model = exported.model_proto
    _name_dimensions(model, ["batch", "samples" if waveform else "frames"])
    del model.metadata_props[:]
    for key, value in (metadata | sherpa_metadata(embedder, lengths)).items():
        model.metadata_props.add(key=key, value=value)
    onnx.checker.check_model(model)
    write_bytes(out, sealed(model))
    return samples_of(program, embedder)


def _name_dimensions(model: Any, names: list[str]) -> None:
    """Replace the exporter's symbols for the dimensions of the input by readable names, in the whole graph."""
    dimensions = model.graph.input[0].type.tensor_type.shape.dim
    renamed = {dim.dim_param: name for dim, name in zip(dimensions, names, strict=False) if dim.dim_param}
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in renamed:
                dim.dim_param = renamed[dim.dim_param]
    # Shapes within the graph have the exporter's symbols and are not needed.
    del model.graph.value_info[:]


def metadata_of(embedder: Embedder, model: dict[str, Any], calibration: dict[str, Any] | None) -> dict[str, str]:
    """Description of the file, for runtimes and people.

    Args:
        model: url, licence, and further descriptions of the student.
        calibration: content of calibration.json, with its thresholds; None without.
    """
    kind = embedder.network.input_kind
    toolkit = toolkit_of(kind) if is_fbank(kind) else "waveform"
    metadata = {
        "url": str(model.get("url") or "not stated"),
        "comment": COMMENT,
        "sample_rate": str(SAMPLE_RATE),
        "output_dim": str(embedder.network.levels[EMBEDDING].dim),
        "spkd_features": "waveform" if embedder.front_end is not None else toolkit,
        CARD: json.dumps(model, ensure_ascii=False),
    }
    if calibration is not None:
        metadata[CALIBRATION] = json.dumps(calibration, ensure_ascii=False)
    return metadata


def sherpa_metadata(embedder: Embedder, lengths: bool) -> dict[str, str]:
    """Metadata with which sherpa-onnx loads a graph; {} for graphs whose features or inputs sherpa-onnx lacks."""
    if embedder.network.input_kind != FBANKS["sherpa"] or embedder.front_end is not None or lengths:
        return {}
    return {
        "framework": "wespeaker",
        "language": "not stated",  # sherpa-onnx refuses empty values
        "normalize_samples": "0",  # 16-bit integers
        "feature_normalize_type": "global-mean",
    }


class Session:
    """Graph in onnxruntime, on one thread."""

    def __init__(self, path: Path) -> None:
        """Load a graph.

        Raises:
            UsageError: onnxruntime is missing.
            SpkdError: onnxruntime does not load the graph.
        """
        try:
            import onnxruntime
        except ImportError as error:
            raise UsageError("checking the file needs onnxruntime: pip install 'spkd[export]'") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own kinds
            raise SpkdError(f"{path}: onnxruntime does not load it ({first_line(error)})") from error
        self._inputs = [node.name for node in self._session.get_inputs()]

    def __call__(self, x: Tensor, lengths: Tensor | None = None) -> np.ndarray:
        """Embeddings (B, D) of inputs (B, ...) with `lengths` (B,) valid samples or frames; None: all are valid."""
        feed = {self._inputs[0]: x.numpy()}
        if len(self._inputs) > 1:
            valid = torch.full((len(x),), x.shape[1]) if lengths is None else lengths
            feed[self._inputs[1]] = valid.numpy()
        return self._session.run(None, feed)[0]
