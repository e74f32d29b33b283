"""`spkd calibrate`: train a calibration, or a fusion of several systems, on a labelled list of other speakers."""

from __future__ import annotations

from pathlib import Path

from spkd.errors import SpkdError, UsageError
from spkd.eval.calibration import FILE, Calibration, TrainedOn, fit
from spkd.eval.metrics import DEFAULT_POINTS, Point, compute, curve, eer, metrics_of, min_dcf, next_above, threshold_at
from spkd.eval.score import Scored
from spkd.eval.settings import CalibrateConfig
from spkd.files.atomic import check_writable
from spkd.registry import TEACHERS
from spkd.students.description import DESCRIPTION, Names

LEAST_TRIALS = 30  # trials of each kind: the mean of 30 scores has a standard error of a fifth of their deviation
FALSE_ALARMS = (0.1, 0.05, 0.01, 0.001)  # rates whose thresholds a calibration has, where its list is long enough
LEAST_ERRORS = 10  # false alarms expected on the list at a rate: with fewer, its threshold is too uncertain


def place(config: CalibrateConfig, of_files: bool) -> Path:
    """Path of the calibration to write.

    Args:
        config: settings.
        of_files: whether the scores are from files, so that no model is used.
    Raises:
        UsageError: no file is named and it cannot go into the folder of a student; or there is no such model.
        SpkdError: the file cannot be written.
    """
    if config.out:
        check_writable(config.out)
        return Path(config.out)
    if not of_files and config.model.name not in TEACHERS and not Path(config.model.name).exists():
        raise UsageError(
            f"{config.model.name}: no student there; train one with `spkd train`, or name one by model=FOLDER"
        )
    student = not of_files and (Path(config.model.name) / DESCRIPTION).is_file()
    plain = not config.quality and config.norm == "none" and config.backend == "cosine" and not config.subtract_mean
    if not plain or config.enrol.model.name is not None or not student:
        raise UsageError(
            "name the file to write (out=FILE): only the calibration of a student's plain cosines is kept in its folder"
        )
    check_writable(Path(config.model.name) / FILE)
    return Path(config.model.name) / FILE


def calibrate(config: CalibrateConfig, scored: Scored) -> Calibration:
    """Calibration trained on scored trials.

    Raises:
        SpkdError: trials without labels of both kinds, too few trials, or scores too large for the computation.
    """
    trials = scored.trials
    if trials.label is None or not trials.has_both_kinds:
        raise SpkdError(f"{trials.source}: a calibration needs labelled trials of both kinds")
    targets, non_targets = int(trials.label.sum()), int((1 - trials.label).sum())
    if min(targets, non_targets) < LEAST_TRIALS and not config.force:
        raise SpkdError(
            f"{trials.source}: {targets:,} target and {non_targets:,} non-target trials; a calibration takes at least "
            f"{LEAST_TRIALS} of each kind (force=true: with what there is)"
        )
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
    points = (
        (*DEFAULT_POINTS, Point(config.p_target)) if Point(config.p_target) not in DEFAULT_POINTS else DEFAULT_POINTS
    )
    thresholds = {"eer": eer(errors)[1]} | {f"min_dcf_{point.name}": min_dcf(errors, point)[1] for point in points}
    for rate in FALSE_ALARMS:
        if rate * trained_on.non_targets >= LEAST_ERRORS:
            thresholds[f"false_alarm_{rate:g}"] = threshold_at(errors, rate)
    highest = next_above(float(errors.threshold[1]))
    return Calibration(
        raw.features,
        raw.weights,
        offset,
        config.p_target,
        scored.system,
        trained_on,
        {name: min(value, highest) for name, value in thresholds.items()},
        compute(errors, metrics_of(tuple(points), llr=True)),
    )
