"""`spkd export`: write a student for another runtime, run the file there, and measure it."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from spkd.config import without_unused
from spkd.errors import UsageError, listed, public_address
from spkd.eval.calibration import Calibration, file_of
from spkd.eval.run import run_trials
from spkd.eval.settings import EvalConfig
from spkd.export.base import Exported, in_torch, real_time_factor, tagged
from spkd.export.beside import Decision, check_beside, description, write_beside
from spkd.export.graph import Embedder, check_traceable
from spkd.export.onnx import metadata_of
from spkd.export.settings import ExportConfig
from spkd.outputs.features import is_fbank
from spkd.progress import log
from spkd.registry import EXPORTS
from spkd.students import Checkpoint, Training, load_student
from spkd.students.description import WEIGHTS
from spkd.teachers.bundled import FOLDER, LICENCE, SOURCE
from spkd.teachers.settings import BUNDLED, ScoredModelConfig
from spkd.version import __version__


def export(folder: str, config: ExportConfig) -> tuple[Path, list[Exported]]:
    """Write the student of a folder.

    Returns:
        The file, and the measures of the student and of the written models.
    Raises:
        UsageError: invalid settings, or a missing package.
        SpkdError: the folder has no student, or the written model does not give the student's embeddings.
    """
    if folder == BUNDLED:
        if not config.out:
            raise UsageError(f"{BUNDLED}: is no folder of yours; name the file to write (out=FILE)")
        folder = str(FOLDER)
        config = replace(config, licence=config.licence or LICENCE, url=config.url or SOURCE)
    checkpoint, weights = load_student(folder, config.model.dimension), Path(folder) / WEIGHTS
    network, written = checkpoint.network, EXPORTS[config.to](config.settings)
    if config.trials and not config.trials_manifest:
        raise UsageError("trials: name the manifest of their audio (trials_manifest=FILE)")
    for name, text in (("url", config.url), ("licence", config.licence)):
        if (shown := public_address(text)) != text:
            raise UsageError(f"{name}={shown}: everybody who has the file could read what stands for ***; leave it out")
    written.check(network)
    check_traceable(network)
    if other := written.changes_scores(network):
        config = without_unused(config, {"calibration": other})
    if not (has_choice := is_fbank(network.input_kind)):
        config = without_unused(config, {"waveform": "the student takes the waveform in any case"})
    waveform = config.waveform or written.takes_waveform or not has_choice
    seconds = written.one_length(waveform)
    calibration = None if other else _calibration(folder, config, checkpoint, seconds)
    if calibration is not None:
        written.check_calibration(calibration)
    if vad := checkpoint.training.facts.vad:
        log(
            f"note: the student was trained with vad={listed(vad)}: what runs the file has to leave silence out as well"
        )
    name = written.name(config.waveform)
    out = Path(config.out or Path(folder) / (name if checkpoint.part is None else tagged(name, str(checkpoint.part))))
    # Runtimes know a file by its suffix.
    if out.suffix != (suffix := Path(written.file).suffix) and suffix:
        raise UsageError(f"out={out}: to={config.to} writes {suffix} files")
    written.check_out(out, bool(config.out))
    check_beside(out)
    embedder = Embedder(network, waveform)
    card = {
        "url": config.url,
        "licence": config.licence,
        "version": __version__,
        "weights_sha256": checkpoint.weights_sha256,
        "network": type(network).__name__,
        "settings": network.settings,
        **({} if checkpoint.part is None else {"dimension": checkpoint.part}),
        "training": _public(checkpoint.training),
    }
    decision = Decision(
        None if calibration is None else calibration.decision(),
        not (other or seconds or config.calibration),
        written.way_to_calibrate(out, waveform),
    )
    metadata = metadata_of(embedder, card, None if calibration is None else calibration.to_json())
    measured = written.write(embedder, out, metadata)
    if written.runtime:
        write_beside(out, description(embedder, out, config.to, written.runtime, card, decision), written.runtime)
    if not measured:
        return out, []
    student = Exported("student", weights.stat().st_size, None, real_time_factor(in_torch(embedder), embedder))
    rows = [student, *measured]
    return out, _with_error_rates(config, folder, out, rows) if config.trials else rows


def _calibration(
    folder: str, config: ExportConfig, checkpoint: Checkpoint, seconds: float | None
) -> Calibration | None:
    """Calibration for the exported model, without its speakers, utterances and the path of its list (private).

    Args:
        seconds: length to which recordings are repeated or cut, for which the student's calibration does not hold.
    """
    path = Path(config.calibration) if config.calibration else Path(folder) / file_of(checkpoint.part)
    if not config.calibration and not path.is_file():
        return None
    if not config.calibration and seconds:
        log(
            f"note: {path} does not go with the model: it is of whole recordings, and the model takes {seconds:g} s, "
            f"to which they are repeated or cut; calibration=FILE names one of such recordings"
        )
        return None
    return Calibration.of_student(path, checkpoint.digest, Path(folder)).public()


def _public(training: Training) -> dict[str, Any]:
    """Description of the training for an exported model, without the speakers, which are private."""
    return {
        name: value
        for name, value in asdict(training).items()
        if value and name not in ("people", "teacher_people", "valid_people")
    }


def _with_error_rates(config: ExportConfig, folder: str, out: Path, rows: list[Exported]) -> list[Exported]:
    """Measures of the student and of the written model, with their EERs."""
    models = ScoredModelConfig(folder, dimension=config.model.dimension), ScoredModelConfig("onnx", str(out))
    student, exported = (
        run_trials(EvalConfig(model=model, manifest=config.trials_manifest, device="cpu"), config.trials)
        for model in models
    )
    if not student.trials.has_both_kinds:
        log(f"note: {config.trials} holds no labels of both kinds: no error rates")
        return rows
    return [
        replace(rows[0], eer_percent=student.eer_percent),
        *rows[1:-1],
        replace(rows[-1], eer_percent=exported.eer_percent),
    ]
