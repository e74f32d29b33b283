"""ONNX: the graph, what goes with it, and how onnxruntime runs it."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spkd.corpus.audio import SAMPLE_RATE
from spkd.errors import SpkdError, UsageError, first_line
from spkd.export.graph import Embedder, toolkit_of
from spkd.files.atomic import write_bytes
from spkd.outputs.features import is_fbank
from spkd.outputs.target import EMBEDDING

OPSET = 20
BATCH = torch.export.Dim("batch", min=1, max=65_536)
LEAST = {False: 256, True: 8000}  # frames or samples that the exporter assumes; shorter inputs work as well
NAMES = {False: "feats", True: "wave"}  # of the input, by whether it is the waveform; WeSpeaker's convention
OUTPUT = "embs"


def write_onnx(embedder: Embedder, out: Path, lengths: bool, metadata: dict[str, str]) -> None:
    """Write the graph, of any batch and length, with its metadata.

    Args:
        lengths: whether it has a second input `lengths` (B,).
    Raises:
        UsageError: onnx or onnxscript is missing. SpkdError: the network cannot be exported.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UsageError("to=onnx needs onnx and onnxscript: pip install 'spkd[export]'") from error
    example = embedder.example(4.0, batch=2)
    inputs: tuple[Tensor, ...] = (example,)
    waveform = embedder.front_end is not None
    length = torch.export.Dim("length", min=LEAST[waveform], max=10**7)
    dynamic: tuple[dict[int, Any], ...] = ({0: BATCH, 1: length},)
    names = [NAMES[waveform]]
    if lengths:
        inputs += (torch.tensor([example.shape[1], example.shape[1] // 2]),)
        dynamic, names = (*dynamic, {0: BATCH}), [*names, "lengths"]
    try:
        with _quiet(), torch.no_grad():
            program = torch.export.export(
                embedder, inputs, dynamic_shapes=dynamic, strict=False, prefer_deferred_runtime_asserts_over_guards=True
            )
            found = torch.onnx.export(
                program, dynamo=True, input_names=names, output_names=[OUTPUT], opset_version=OPSET, verbose=False
            )
    except Exception as error:  # the exporter raises many kinds
        raise SpkdError(f"{out}: the network cannot be exported ({first_line(error)})") from error
    assert found is not None
    model = found.model_proto
    _name_dimensions(model, ["batch", "samples" if waveform else "frames"])
    del model.metadata_props[:]
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    onnx.checker.check_model(model)
    write_bytes(out, model.SerializeToString())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on what is no fault here."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _name_dimensions(model: Any, names: list[str]) -> None:
    """Give the exporter's symbols of the input's dimensions names that people know, wherever they are."""
    dimensions = model.graph.input[0].type.tensor_type.shape.dim
    renamed = {dim.dim_param: name for dim, name in zip(dimensions, names, strict=False) if dim.dim_param}
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in renamed:
                dim.dim_param = renamed[dim.dim_param]
    # Shapes within the graph are in the exporter's symbols, and nobody needs them.
    del model.graph.value_info[:]


def metadata_of(embedder: Embedder, model: dict[str, Any], calibration: dict[str, Any] | None) -> dict[str, str]:
    """What a runtime and a person need to know of the file: sherpa-onnx's keys, and spkd's own.

    Args:
        model: url, licence, and whatever describes the student.
        calibration: of calibration.json, with its thresholds.
    """
    kind = embedder.network.input_kind
    toolkit = toolkit_of(kind) if is_fbank(kind) else "waveform"
    found = {
        "framework": "3d-speaker" if toolkit == "3d-speaker" else "wespeaker",
        "language": "not stated",  # sherpa-onnx refuses empty values
        "url": str(model.get("url") or "not stated"),
        "comment": "trained by spkd",
        "sample_rate": str(SAMPLE_RATE),
        "output_dim": str(embedder.network.levels[EMBEDDING].dim),
        # Whether samples are in [-1, 1] rather than 16-bit integers.
        "normalize_samples": "1" if toolkit == "3d-speaker" else "0",
        "feature_normalize_type": "global-mean",
        "spkd_features": "waveform" if embedder.front_end is not None else toolkit,
        "spkd_card": json.dumps(model, ensure_ascii=False),
    }
    if calibration is not None:
        found["spkd_calibration"] = json.dumps(calibration, ensure_ascii=False)
    return found


class Session:
    """A graph in onnxruntime, on one thread."""

    def __init__(self, path: Path) -> None:
        """Raises UsageError: onnxruntime is missing. SpkdError: it does not load the graph."""
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
        self._inputs = [one.name for one in self._session.get_inputs()]

    def __call__(self, x: Tensor, lengths: Tensor | None = None) -> np.ndarray:
        """Embeddings (B, D); without lengths, all of the batch is valid."""
        feed = {self._inputs[0]: x.numpy()}
        if len(self._inputs) > 1:
            every = torch.full((len(x),), x.shape[1]) if lengths is None else lengths
            feed[self._inputs[1]] = every.numpy()
        return self._session.run(None, feed)[0]
