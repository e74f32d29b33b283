"""`spkd export`: write a student for another runtime, run what was written, and measure it there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spkd.corpus.manifest import Manifest
from spkd.errors import SpkdError, UsageError
from spkd.eval import trials as trial_lists
from spkd.eval.calibration import FILE, Calibration
from spkd.eval.embed import median_time
from spkd.eval.metrics import curve, eer
from spkd.eval.score import score
from spkd.eval.settings import EvalConfig
from spkd.export.graph import Embedder
from spkd.export.int8 import quantise, speech_inputs
from spkd.export.litert import load_litert, write_litert
from spkd.export.onnx import Session, metadata_of, write_onnx
from spkd.export.settings import ExportConfig
from spkd.export.torchscript import load_torchscript, write_torchscript
from spkd.export.wespeaker import write_wespeaker
from spkd.files import digest
from spkd.outputs.features import is_fbank
from spkd.progress import log
from spkd.students import load_student
from spkd.students.checkpoint import WEIGHTS
from spkd.teachers import load_teacher
from spkd.teachers.settings import ModelConfig, ScoredModelConfig
from spkd.version import __version__

FILES = {
    "onnx": "model.onnx",
    "onnx-int8": "model.int8.onnx",
    "torchscript": "model.torchscript.pt",
    "litert": "model.tflite",
    "wespeaker": "wespeaker",
}
CHECKED = (1.0, 2.5, 4.0, 8.0)  # s
LEAST = 0.9999  # cosine of what is written in floating point with the student
SECONDS, REPEATS = 4.0, 9  # of the latency
Run = Callable[[Tensor], np.ndarray]


@dataclass(frozen=True)
class Exported:
    """A model before or after the export.

    Attributes:
        name: for people.
        bytes: of its file.
        cosine: least one of its embeddings with the student's; None for the student itself.
        real_time_factor: processing time over audio time on one thread, without features that it does not compute.
        eer_percent: on the trials, if there are any.
    """

    name: str
    bytes: int
    cosine: float | None
    real_time_factor: float
    eer_percent: float | None = None


def export(folder: str, config: ExportConfig) -> tuple[Path, list[Exported]]:
    """Write the student of a folder. Returns the file, and the student beside what was written.

    Raises:
        UsageError: settings that the format does not have, or a missing package. SpkdError: no student there, or what
            was written does not give the student's embeddings.
    """
    checkpoint = load_student(folder)
    network, out = checkpoint.network, Path(config.out or Path(folder) / FILES[config.to])
    _check(config, is_fbank(network.input_kind))
    out.parent.mkdir(parents=True, exist_ok=True)
    if config.to == "wespeaker":
        write_wespeaker(network, out)
        return out, []
    embedder = Embedder(network, config.waveform or not is_fbank(network.input_kind))
    card = {
        "url": config.url,
        "licence": config.licence,
        "version": __version__,
        "network": type(network).__name__,
        "settings": network.settings,
        "training": checkpoint.training,
    }
    metadata = metadata_of(embedder, card, _calibration(folder, config))
    weights = Path(folder) / WEIGHTS
    rows = [Exported("student", weights.stat().st_size, None, _time(_torch(embedder), embedder, SECONDS))]
    if config.to == "torchscript":
        write_torchscript(embedder, out, metadata)
        graph = load_torchscript(out)
        rows.append(_checked(config.to, out, embedder, _torch(graph), CHECKED))
    elif config.to == "litert":
        write_litert(embedder, out, config.settings.seconds)
        rows.append(_checked(config.to, out, embedder, load_litert(out), (config.settings.seconds,)))
    else:
        rows += _export_onnx(config, embedder, out, metadata)
    if config.trials:
        rows = _with_error_rates(config, folder, out, rows)
    return out, rows


def _check(config: ExportConfig, takes_fbank: bool) -> None:
    if config.to == "onnx-int8" and not config.settings.manifest:
        raise UsageError(
            "to=onnx-int8: name a manifest of speech on which ranges are measured (onnx_int8.manifest=FILE)"
        )
    if config.trials and not config.trials_manifest:
        raise UsageError("trials: name the manifest of their audio (trials_manifest=FILE)")
    if config.to == "wespeaker" and (config.waveform or not takes_fbank):
        raise UsageError("to=wespeaker: its networks take fbank")


def _calibration(folder: str, config: ExportConfig) -> dict[str, Any] | None:
    """The calibration that goes with the model: without the names of its speakers, who are nobody's business there."""
    path = Path(config.calibration) if config.calibration else Path(folder) / FILE
    if not config.calibration and not path.is_file():
        return None
    tree = Calibration.of_student(path, digest.of_file(Path(folder) / WEIGHTS)).to_json()
    tree["trained_on"] = tree["trained_on"] | {"speakers": []}
    return tree


def _export_onnx(config: ExportConfig, embedder: Embedder, out: Path, metadata: dict[str, str]) -> list[Exported]:
    if config.to == "onnx":
        write_onnx(embedder, out, config.settings.lengths, metadata)
        return [_checked("onnx", out, embedder, Session(out), CHECKED)]
    whole = out.with_name(f"{out.stem}.fp32{out.suffix}")
    try:
        write_onnx(embedder, whole, False, metadata)
        rows = [_checked("onnx", whole, embedder, Session(whole), CHECKED)]
        speech = speech_inputs(embedder, Manifest.load(config.settings.manifest), config.settings.speech)
        quantise(embedder, whole, out, speech)
    finally:
        whole.unlink(missing_ok=True)
    session, inputs = Session(out), [torch.from_numpy(x) for x in speech[:: max(len(speech) // 20, 1)]]
    cosine = _least_cosine(_torch(embedder), session, inputs)
    return [*rows, Exported("onnx-int8", out.stat().st_size, cosine, _time(session, embedder, SECONDS))]


def _checked(name: str, out: Path, embedder: Embedder, run: Run, seconds: Sequence[float]) -> Exported:
    """Raises SpkdError where what was written differs from the student."""
    cosine = _least_cosine(_torch(embedder), run, [embedder.example(s, seed=i) for i, s in enumerate(seconds)])
    if not cosine >= LEAST:
        raise SpkdError(f"{out}: its embeddings differ from the student's (cosine {cosine:.6f})")
    return Exported(
        name, out.stat().st_size, cosine, _time(run, embedder, seconds[0] if len(seconds) == 1 else SECONDS)
    )


def _torch(module: Callable[[Tensor], Tensor]) -> Run:
    def run(x: Tensor) -> np.ndarray:
        with torch.inference_mode():
            return module(x).numpy()

    return run


def _least_cosine(one: Run, other: Run, inputs: Sequence[Tensor]) -> float:
    found = []
    for x in inputs:
        a, b = (run(x).astype(np.float64) for run in (one, other))
        found.append(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())
    return float(min(found))


def _time(run: Run, embedder: Embedder, seconds: float) -> float:
    """Median real-time factor on one thread."""
    example = embedder.example(seconds)
    return median_time(lambda: run(example), REPEATS) / seconds


def _with_error_rates(config: ExportConfig, folder: str, out: Path, rows: list[Exported]) -> list[Exported]:
    """The rows of the student and of the file, with their EERs."""
    listed = trial_lists.read(config.trials)
    audio = Manifest.load(config.trials_manifest)
    settings, device = EvalConfig(model=ScoredModelConfig(folder)), torch.device("cpu")
    found = []
    for row in rows:
        if row is rows[0] or row is rows[-1]:
            of = ModelConfig("checkpoint", folder) if row is rows[0] else ModelConfig("onnx", str(out))
            scored = score(settings, load_teacher(of, device), audio, listed)
            if scored.trials.label is None or not scored.trials.has_both_kinds:
                log(f"note: {config.trials} holds no labels of both kinds: no error rates")
                return rows
            row = replace(row, eer_percent=100 * eer(curve(scored.scores[0], scored.trials.label))[0])
        found.append(row)
    return found
