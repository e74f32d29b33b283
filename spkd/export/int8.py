"""ONNX in 8-bit integers: static quantisation of convolutions and matrix products, with ranges measured on speech."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from spkd.corpus.audio import AudioError, decode
from spkd.corpus.manifest import Manifest, Utterance, measure, note_left_out
from spkd.errors import SpkdError, UsageError
from spkd.export.base import COMMENT, Export, Exported, checked, in_torch, least_cosine, real_time_factor
from spkd.export.graph import Embedder, quiet
from spkd.export.onnx import NAMES, Session, runtime_of, way_to_calibrate, write_onnx
from spkd.export.settings import Int8Settings
from spkd.files.atomic import write_bytes
from spkd.files.text import counted
from spkd.networks.network import Network
from spkd.progress import log
from spkd.teachers.onnx_file import DIGEST, sealed

CROP = 3.0  # length (s) taken of each utterance: whole utterances would take more memory for the same ranges
MEASURED = 60.0  # duration (s) of other speech, on which the cosine with the student is measured
QUANTISED = ("Conv", "MatMul", "Gemm")  # pooling and normalisation stay in floating point


class ONNXInt8(Export):
    """ONNX in 8-bit integers."""

    Settings = Int8Settings
    file = "model.int8.onnx"
    mark = COMMENT.encode()
    lacks: ClassVar = {
        "calibration": "its scores are not the student's: `spkd calibrate TRIALS model=onnx model.weights=FILE` "
        "calibrates the written file"
    }

    def way_to_calibrate(self, out: Path, waveform: bool) -> str:
        return way_to_calibrate(out)

    def changes_scores(self, network: Network) -> str:
        return self.lacks["calibration"]

    def check(self, network: Network) -> None:
        if not self.settings.manifest:
            raise UsageError("to=onnx-int8: name speech on which ranges are measured by onnx_int8.manifest=FILE")

    def write(self, embedder: Embedder, out: Path, metadata: dict[str, str]) -> list[Exported]:
        with tempfile.TemporaryDirectory() as folder:
            unquantised = Path(folder) / out.name
            samples = write_onnx(embedder, unquantised, False, metadata)
            self.runtime = runtime_of(embedder, "ONNX, in 8-bit integers", samples)
            rows = [checked("onnx", unquantised, embedder, Session(unquantised))]
            manifest, unreadable = measure(Manifest.load(self.settings.manifest))
            note_left_out(manifest, unreadable)
            held_out, speech = divided(manifest.utterances)
            ranged = speech_inputs(embedder, speech, manifest.source, self.settings.speech)
            quantise(embedder, unquantised, out, ranged)
        measured = speech_inputs(embedder, held_out, manifest.source, MEASURED)
        log(
            f"note: ranges are those of {counted(len(ranged), 'utterance')}, the cosine is the least of "
            f"{counted(len(measured), 'other utterance')}; calibrate {out} by `spkd calibrate TRIALS model=onnx "
            f"model.weights={shlex.quote(str(out))} manifest=FILE`"
        )
        session = Session(out)
        cosine = least_cosine(in_torch(embedder), session, [torch.from_numpy(x) for x in measured])
        return [*rows, Exported("onnx-int8", out.stat().st_size, cosine, real_time_factor(session, embedder))]


def divided(utterances: Sequence[Utterance]) -> tuple[list[Utterance], list[Utterance]]:
    """Utterances of a second or more, divided by speakers and shuffled.

    Where utterances have no speaker, or all have the same, each counts as a speaker.

    Returns:
        Utterances of a fifth of the speakers, on which the cosine is measured.
        Utterances of the other speakers, which determine the ranges.
    """
    random = np.random.RandomState(0)
    long = [utterance for utterance in utterances if (utterance.duration or 0) >= 1.0]
    names = [utterance.speaker or utterance.id for utterance in long]
    if len(set(names)) == 1:
        names = [utterance.id for utterance in long]
    groups = random.permutation(sorted(set(names))).tolist()
    held = set(groups[: max(len(groups) // 5, 1)])
    order = random.permutation(len(long)).tolist()
    return [long[i] for i in order if names[i] in held], [long[i] for i in order if names[i] not in held]


def speech_inputs(embedder: Embedder, utterances: Sequence[Utterance], source: str, seconds: float) -> list[np.ndarray]:
    """Inputs of the graph from the first utterances that have `seconds` seconds together.

    Args:
        utterances: utterances of a second or more.
    Raises:
        SpkdError: no utterance can be loaded.
    """
    total, inputs = 0.0, []
    for utterance in utterances:
        if total >= seconds:
            break
        try:
            wave = decode(
                utterance.path, utterance.start, min(CROP, utterance.duration or CROP), utterance.channel
            ).wave
        except AudioError as error:
            log(f"note: {utterance.id} is left out: {error.reason}")
            continue
        waves = torch.from_numpy(wave)[None]
        inputs.append((waves if embedder.front_end is not None else embedder.network.features(waves)).numpy())
        total += len(wave) / 16_000
    if not inputs:
        raise SpkdError(
            f"{source}: needs two utterances of a second or more that can be loaded, better of two speakers"
        )
    return inputs


def quantise(embedder: Embedder, source: Path, out: Path, inputs: list[np.ndarray]) -> None:
    """Quantise a graph.

    Args:
        inputs: inputs on which ranges are measured. The extremes of all of them count; the mean of each utterance's
            extremes would clip speech.
    Raises:
        UsageError: onnxruntime is missing.
    """
    try:
        import onnx
        from onnxruntime import quantization
        from onnxruntime.quantization.shape_inference import quant_pre_process
    except ImportError as error:
        raise UsageError("to=onnx-int8 needs onnx and onnxruntime: pip install 'spkd[export]'") from error
    name = NAMES[embedder.front_end is not None]

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self._feeds: Iterator[dict[str, Any]] = ({name: x} for x in inputs)

        def get_next(self) -> dict[str, Any] | None:
            return next(self._feeds, None)

    with tempfile.TemporaryDirectory() as folder, quiet():
        prepared, quantised = Path(folder) / "prepared.onnx", Path(folder) / "quantised.onnx"
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        quantization.quantize_static(
            str(prepared),
            str(quantised),
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=list(QUANTISED),
            per_channel=True,
            # Weights of 7 bits: the products of 8 bits overflow the 16-bit sums of x86 processors without VNNI.
            reduce_range=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            nodes_to_exclude=_of_features(onnx.load(str(prepared))),
            extra_options={"WeightSymmetric": True, "ActivationSymmetric": False},
        )
        model = onnx.load(str(quantised))
    del model.metadata_props[:]
    model.metadata_props.extend(p for p in onnx.load(str(source)).metadata_props if p.key != DIGEST)
    write_bytes(out, sealed(model))


def _of_features(model: Any) -> list[str]:
    """Names of the nodes that compute fbank: their values span ten orders of magnitude."""
    return [node.name for node in model.graph.node if any("front_end" in given for given in node.input)]
