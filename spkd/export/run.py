"""`spkd export`: write a student for another runtime, run what was written, and measure it there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from spkd.corpus.manifest import Manifest
from spkd.errors import UsageError
from spkd.eval import trials as trial_lists
from spkd.eval.calibration import FILE, Calibration
from spkd.eval.metrics import curve, eer
from spkd.eval.score import score
from spkd.eval.settings import EvalConfig
from spkd.export.base import Exported, in_torch, real_time_factor
from spkd.export.graph import Embedder
from spkd.export.onnx import metadata_of
from spkd.export.settings import ExportConfig
from spkd.files import digest
from spkd.outputs.features import is_fbank
from spkd.progress import log
from spkd.registry import EXPORTS
from spkd.students import load_student
from spkd.students.checkpoint import WEIGHTS
from spkd.teachers import load_teacher
from spkd.teachers.settings import ModelConfig, ScoredModelConfig
from spkd.version import __version__


def export(folder: str, config: ExportConfig) -> tuple[Path, list[Exported]]:
    """Write the student of a folder.

    Args:
        folder: of the student.
        config: format and place.
    Returns:
        The file, and the measures of the student and of what was written.
    Raises:
        UsageError: settings that the format does not have, or a missing package.
        SpkdError: no student there, or what was written does not give the student's embeddings.
    """
    checkpoint, weights = load_student(folder), Path(folder) / WEIGHTS
    network, written = checkpoint.network, EXPORTS[config.to](config.settings)
    if config.trials and not config.trials_manifest:
        raise UsageError("trials: name the manifest of their audio (trials_manifest=FILE)")
    written.check(network)
    out = Path(config.out or Path(folder) / written.name(config.waveform))
    out.parent.mkdir(parents=True, exist_ok=True)
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
    student = Exported("student", weights.stat().st_size, None, real_time_factor(in_torch(embedder), embedder))
    rows = [student, *written.write(embedder, out, metadata)]
    return out, _with_error_rates(config, folder, out, rows) if config.trials else rows


def _calibration(folder: str, config: ExportConfig) -> dict[str, Any] | None:
    """The calibration that goes with the model: without the names of its speakers and the place of its list, which are
    nobody's business there."""
    path = Path(config.calibration) if config.calibration else Path(folder) / FILE
    if not config.calibration and not path.is_file():
        return None
    tree = Calibration.of_student(path, digest.of_file(Path(folder) / WEIGHTS)).to_json()
    tree["trained_on"] = tree["trained_on"] | {"speakers": [], "trials": "its list"}
    return tree


def _with_error_rates(config: ExportConfig, folder: str, out: Path, rows: list[Exported]) -> list[Exported]:
    """The rows of the student and of the file, with their EERs."""
    audio = Manifest.load(config.trials_manifest)
    listed = trial_lists.read(config.trials, known=audio.index_of)
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
