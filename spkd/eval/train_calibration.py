"""`spkd calibrate`: train a calibration, or a fusion of several systems, on a labelled list of other speakers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from spkd.corpus.people import Names
from spkd.errors import SpkdError, UsageError
from spkd.eval.calibration import FALSE_ALARMS, FILE, FORMAT, Calibration, TrainedOn, file_of, fit, how_mapped
from spkd.eval.metrics import (
    DEFAULT_POINTS,
    Point,
    compute,
    curve,
    eer,
    least_non_targets,
    metrics_of,
    min_dcf,
    next_above,
    threshold_at,
)
from spkd.eval.run import check_both_kinds, check_inputs, in_use, in_use_with, run_trials
from spkd.eval.score import Scored, how_embedded
from spkd.eval.settings import CalibrateConfig
from spkd.files import digest
from spkd.files.atomic import check_not_among, check_replaces_none, check_writable, write_bytes, write_json
from spkd.files.reading import parse_json, read_json
from spkd.mapping.embedding_map import load_map
from spkd.progress import log
from spkd.students.description import (
    CALIBRATION_OF,
    DESCRIPTION,
    EXPORT_KEY,
    EXPORT_RECORD,
    OTHER,
    STUDENT,
    Description,
    beside,
)
from spkd.teachers import resolved
from spkd.teachers.onnx_file import calibration_text, is_exported, with_calibration

MAP = ("weight", "offset", "thresholds")  # of a calibration, what decides in an export
LEAST_TRIALS = 30  # trials of each kind: the mean of 30 scores has a standard error of a fifth of their deviation


def place(config: CalibrateConfig, of_files: bool) -> Path:
    """Path of the calibration to write.

    Args:
        of_files: whether the scores are from files, so that no model is used.
    Raises:
        UsageError: no file is named and it cannot go into the folder of a student.
        SpkdError: the file cannot be written.
    """
    if config.out:
        check_writable(config.out)
        return Path(config.out)
    # A folder may have the name of a family whose weights are named.
    is_of_folder = resolved(config.model).weights == config.model.name
    student = not of_files and is_of_folder and (Path(config.model.name) / DESCRIPTION).is_file()
    weights = Path(config.model.weights or "") if config.model.name == "onnx" and not of_files else None
    exported = weights if weights is not None and is_exported(weights) else None
    the_map = None if of_files or config.enrol.map_by is None else load_map(config.enrol.map_by)
    name = FILE
    if student:
        described = Description.read(Path(config.model.name) / DESCRIPTION)
        name = file_of(described.part(config.model.dimension, config.model.name))
    plain = config.norm == "none" and config.backend == "cosine" and not config.subtract_mean and not config.quality
    if the_map is not None and plain and how_embedded(config, the_map) == [*how_mapped(the_map.fingerprint)]:
        kept = Path(str(config.enrol.map_by)) / FILE
        check_writable(kept)
        return kept
    if not ((student or exported) and plain and not how_embedded(config, the_map)):
        raise UsageError(
            "name the file to write (out=FILE): the calibration of a student's plain cosines alone, of single "
            "recordings and with the settings by which it is loaded, is kept in its folder or exported file, and that "
            "of mapped enrolments with the map"
        )
    kept = exported or Path(config.model.name) / name
    check_writable(kept)
    return kept


def calibrate_trials(config: CalibrateConfig, trials: str | None, scores: Sequence[Path]) -> tuple[Path, Calibration]:
    """Score trials, train a calibration on them and write it. Arguments and errors as of run_trials and calibrate."""
    config = in_use(config, trials, len(scores))
    if "enrolments" in config.quality and config.enrol.map is None:
        raise UsageError("quality=enrolments: one utterance in every trial, without an enrolment map (enrol.map=FILE)")
    check_inputs(config, trials, scores)
    out = place(config, bool(scores))
    check_not_among([out], [trials, *scores, config.manifest, config.enrol.map, config.cohort.source])
    in_export = not config.out and out.suffix == ".onnx"
    if not in_export:
        check_replaces_none(out.parent, [out.name], {out.name: FORMAT.key})  # a model, for example
    scored = run_trials(config, trials, scores)
    calibration = calibrate(in_use_with(config, scored), scored)
    _note_replaced(out, _in_export(out) if in_export else _kept(out), calibration)
    if in_export:
        write_bytes(out, with_calibration(out, json.dumps(calibration.public().to_json(), ensure_ascii=False)))
        _describe(out, calibration)
    else:
        calibration.save(out)
        if (out.parent / DESCRIPTION).is_file():
            described = Description.read(out.parent / DESCRIPTION)
            part = described.digests.get(calibration.system.models[-1]) if calibration.system.models else None
            if out.name == file_of(part):
                _note_exports(out.parent, calibration, part)
    return out, calibration


def _describe(out: Path, calibration: Calibration) -> None:
    """Bring the description beside an exported model up to date, where `spkd export` left one."""
    path = beside(out)
    if path.is_file() and (about := _kept_of(path)):
        changed = {"calibration": calibration.decision(), CALIBRATION_OF: OTHER}
        write_json(path, about | changed | {"sha256": {out.name: digest.of_file(out)}})


def _kept(path: Path) -> Calibration | None:
    """The calibration in a file; None where there is none that can be read."""
    try:
        return Calibration.load(path)
    except SpkdError:
        return None


def _in_export(path: Path) -> Calibration | None:
    """The calibration in an exported ONNX model; None where there is none that can be read."""
    try:
        return Calibration.from_json(parse_json(calibration_text(path) or "", str(path)), str(path))
    except SpkdError:
        return None


def _note_replaced(out: Path, earlier: Calibration | None, new: Calibration) -> None:
    """Log the list of the calibration that is replaced, where that is another one."""
    if earlier is None or earlier.trained_on.sha256 == new.trained_on.sha256:
        return
    known = earlier.trained_on
    name = known.trials if earlier.names_speakers else "another list"
    log(
        f"note: {out}: the calibration on {name} ({known.targets:,} target and {known.non_targets:,} non-target "
        "trials) is replaced"
    )


def _note_exports(folder: Path, calibration: Calibration, part: int | None) -> None:
    """Log the exports in a student's folder that have another calibration than the student's, though its scores.

    Args:
        part: dimension of the embeddings, whose exports alone are looked at; None: the whole one.
    """
    try:
        current = calibration.decision()
    except UsageError:  # it takes more than cosines, and goes with no model
        return
    for record in sorted((*folder.glob("*.json"), *folder.glob(f"*/{EXPORT_RECORD}"))):
        about = _kept_of(record)
        if about.get(CALIBRATION_OF, STUDENT) != STUDENT or "calibration" not in about:
            continue
        described = about.get("card", about.get("model"))  # of a page, and of other exports
        if not isinstance(described, dict) or described.get("dimension") != part:
            continue
        held = about["calibration"]
        exported = record.parent if record.name == EXPORT_RECORD else record.with_suffix("")
        is_same = isinstance(held, dict) and all(held.get(name) == current[name] for name in MAP)
        if exported.exists() and not is_same:
            which = "another calibration than the student" if held else "no calibration"
            log(f"note: {exported}: holds {which}; export the student again")


def _kept_of(record: Path) -> dict[str, Any]:
    """Content of the JSON that `spkd export` wrote with a model; {} of other files."""
    try:
        about = read_json(record)
    except SpkdError:
        return {}
    return about if isinstance(about, dict) and EXPORT_KEY in about else {}


def calibrate(config: CalibrateConfig, scored: Scored) -> Calibration:
    """Calibration trained on scored trials.

    Raises:
        SpkdError: trials without labels of both kinds, too few trials, or scores too large for the computation.
    """
    trials = scored.trials
    check_both_kinds(trials)
    assert trials.label is not None
    targets, non_targets = int(trials.label.sum()), int((1 - trials.label).sum())
    if min(targets, non_targets) < LEAST_TRIALS and not config.force:
        raise SpkdError(
            f"{trials.source}: {targets:,} target and {non_targets:,} non-target trials; a calibration takes at least "
            f"{LEAST_TRIALS} of each kind (force=true: with what there is)"
        )
    if min(targets, non_targets) >= LEAST_TRIALS and config.force:
        log(f"note: force=true was not needed: {trials.source} has at least {LEAST_TRIALS} trials of each kind")
    # Weights.
    columns = scored.columns(config.quality)
    try:
        weights, offset = fit(list(columns.values()), trials.label, config.p_target)
    except ValueError as error:
        raise SpkdError(f"{trials.source}: {error}") from error
    enrolment, test, _ = scored.speakers()
    trained_on = TrainedOn(
        trials.source,
        trials.sha256,
        targets,
        non_targets,
        tuple(sorted({*enrolment.values(), *test.values()})),
        Names.of(scored.utterances()),
    )
    raw = Calibration(
        tuple(columns), tuple(map(float, weights)), offset, config.p_target, scored.system, trained_on, {}, {}
    )
    # Thresholds of the calibrated scores on this list.
    errors = curve(raw(columns), trials.label)
    points = tuple(dict.fromkeys((*DEFAULT_POINTS, Point(config.p_target))))
    thresholds = {"eer": eer(errors)[1]} | {f"min_dcf_{point.name}": min_dcf(errors, point)[1] for point in points}
    for rate in FALSE_ALARMS:
        if trained_on.non_targets >= least_non_targets(rate):
            thresholds[f"false_alarm_{rate:g}"] = threshold_at(errors, rate)
    highest = next_above(float(errors.threshold[1]))
    thresholds = {name: min(value, highest) for name, value in thresholds.items()}
    return replace(raw, thresholds=thresholds, results=compute(errors, metrics_of(points, llr=True)))
