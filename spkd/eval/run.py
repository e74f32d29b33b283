"""`spkd eval`: score a trial list, or read scores from files, compute metrics, and write the report."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from spkd.config import without_unused
from spkd.corpus.manifest import Manifest
from spkd.device import resolve
from spkd.errors import SpkdError, UsageError
from spkd.eval import page
from spkd.eval import trials as trial_lists
from spkd.eval.bootstrap import SpeakerTrials, intervals
from spkd.eval.breakdown import Group, groups
from spkd.eval.calibration import Calibration
from spkd.eval.efficiency import efficiency
from spkd.eval.metrics import Curve, Metric, Point, compute, curve, metrics_of
from spkd.eval.report import (
    PAGE,
    REPORT,
    SCORES,
    SPEAKERS,
    CalibrationSummary,
    ModelSummary,
    Report,
    TrialSummary,
    Worst,
    WorstTrial,
)
from spkd.eval.score import Scored, check_cohort, config_columns, score, score_from_files
from spkd.eval.settings import EvalConfig, ScoringConfig
from spkd.eval.speakers import numbered
from spkd.eval.training import TrainingSummary
from spkd.eval.trials import Trials, as_written
from spkd.files import digest
from spkd.files.atomic import check_writable, part_path, sync_folder, writable_folder, write_bytes, write_json
from spkd.progress import log
from spkd.teachers import load_model
from spkd.teachers.base import Teacher
from spkd.teachers.checkpoint import CheckpointTeacher
from spkd.version import __version__

AT_ONCE = 1 << 16  # lines that are written together
LABELS = ("nontarget", "target")
LEAST_ERRORS = 5  # misses, and false alarms, at the EER: with fewer, its interval holds the true value too rarely
# Settings, and sections of settings, that only the scores of a model need.
OF_MODELS = (
    *("model", "enrol.model", "backend", "subtract_mean", "norm", "cohort"),
    *("batch_size", "workers", "min_seconds", "device"),
)
OF_MANIFESTS = ("by", "audio", "enrol.map")  # settings that only a manifest gives an effect
Scoring = TypeVar("Scoring", bound=ScoringConfig)


@dataclass(frozen=True)
class Evaluation:
    """Scored trials and their results.

    Attributes:
        scored: the trials.
        scores: (N,) scores, calibrated where there is a calibration.
        metrics: metrics that are computed.
        curve: error rates at all thresholds; None where the trials are of one kind, or have no labels.
        results: value of each metric.
        intervals: 95 % confidence interval of the metrics that have one.
        speakers: number of speakers, and the source of their identity.
        breakdown: groups of trials, by column of the manifest.
        worst: places of the target trials with the lowest scores, and of the non-target trials with the highest.
        calibration: calibration that was applied, if any.
        notes: limits of the numbers that a reader has to know, in sentences.
    """

    scored: Scored
    scores: np.ndarray
    metrics: tuple[Metric, ...]
    curve: Curve | None = None
    results: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    speakers: tuple[int, str] = (0, "")
    breakdown: dict[str, list[Group]] = field(default_factory=dict)
    worst: tuple[np.ndarray, np.ndarray] = (np.empty(0, np.int64), np.empty(0, np.int64))
    calibration: Calibration | None = None
    notes: tuple[str, ...] = ()


def in_use(config: Scoring, trials: str | None, systems: int) -> Scoring:
    """Settings without those that have no effect on scores from files, or on those of a model.

    Args:
        config: settings.
        trials: file of the trial list, if any.
        systems: number of score files; 0: a model gives the scores.
    Raises:
        UsageError: a setting without effect was typed.
    """
    unused = dict.fromkeys(OF_MODELS, "--scores come from files, not from a model") if systems else {}
    if not systems:
        unused["llr"] = "only for --scores that are log-likelihood ratios already"
    if trials is None:
        unused["format"] = "there is no trial list"
    return without_unused(config, unused)


def in_use_with(config: Scoring, scored: Scored) -> Scoring:
    """Settings without those that need a manifest, where the utterances of the trials are not known.

    Raises:
        UsageError: one of them was typed.
    """
    if scored.people is not None:
        return config
    return without_unused(
        config, dict.fromkeys(OF_MANIFESTS, "it needs the manifest of the trials' audio (manifest=FILE)")
    )


def check(config: EvalConfig, systems: int) -> None:
    """Check the settings before anything is scored.

    Args:
        config: settings.
        systems: number of score files.
    Raises:
        UsageError: settings that exclude one another.
        SpkdError: `out` cannot be written.
    """
    if config.calibration is not None:
        Calibration.load(config.calibration)
    elif systems > 1:
        raise UsageError("several --scores are fused by a calibration: train one with `spkd calibrate`, and name it")
    if config.llr and config.calibration:
        raise UsageError("llr=true: only for --scores that are log-likelihood ratios already")
    for text in config.points:
        Point.parse(text)
    check_writable(Path(config.out) / REPORT)


def run_trials(config: ScoringConfig, trials: str | None, scores: Sequence[Path] = ()) -> Scored:
    """Trials scored by the model that the settings name, or by the files of other systems.

    Args:
        config: settings.
        trials: file of the list, `-` for standard input; None: the trials of the first score file.
        scores: score files of other systems.
        es:
        UsageError: neither trials nor scores, or settings that exclude one another.
        SpkdError: as `score`.
    """
    if trials is None and not scores:
        raise UsageError("name a trial list, or score files with --scores")
    check_cohort(config)
    if scores:
        files = [trial_lists.read_scores(path, lambda: _known(config, trials)) for path in scores]
        listed = None if trials is None else _read_trials(config, trials, files[0][0].names)
        scored = score_from_files(config, files, listed)
    else:
        assert trials is not None
        audio, device = Manifest.load(config.manifest, config_columns(config)), resolve(config.device)
        listed = _read_trials(config, trials, audio.index_of)
        model, enrol_config = load_model(config.model, device), config.enrol.model
        scored = score(
            config, model, audio, listed, None if enrol_config.name is None else load_model(enrol_config, device)
        )
    for note in scored.notes:
        log(f"note: {note}")
    return scored


def _known(config: ScoringConfig, trials: str | None) -> Collection[str]:
    """Names of utterances, from the trial list or from the manifest; () where there is neither."""
    if trials is not None and trials != trial_lists.STDIN:
        return set(trial_lists.read(trials, config.format).names)
    return Manifest.load(config.manifest).index_of if Path(config.manifest).exists() else ()


def _read_trials(config: ScoringConfig, trials: str, known: Collection[str]) -> Trials:
    """Read a trial list. Where it allows no error rates, this is logged before the work.

    Args:
        config: settings.
        trials: file of the list.
        known: names of utterances, which distinguish a first trial from a header.
    """
    listed = trial_lists.read(trials, config.format, known)
    _note_one_kind(listed.source, listed.label)
    return listed


def assess(config: EvalConfig, scored: Scored) -> Evaluation:
    """Assess scored trials: calibration, metrics, confidence intervals and breakdown.

    Raises:
        SpkdError: the calibration is for another system, or was trained on these speakers.
    """
    trials = scored.trials
    enrolment, test, how = scored.speakers()
    # Calibration.
    calibration = None if config.calibration is None else Calibration.load(config.calibration)
    if calibration is None:
        scores = scored.scores[0]
    else:
        speakers = {*enrolment.values(), *test.values()}
        calibration.check(scored.system, speakers, scored.utterances(), trials.sha256, str(config.calibration))
        scores = calibration(scored.columns(calibration.quality))
        if not np.isfinite(scores).all():
            raise SpkdError(f"{config.calibration}: gives log-likelihood ratios of {trials.source} that are not finite")
    # Metrics.
    points = tuple(Point.parse(text) for text in config.points)
    metrics = metrics_of(points, config.false_accept, calibration is not None or config.llr or scored.llr)
    left, right = numbered(trials, enrolment, test)
    count = len({*enrolment.values(), *test.values()})
    if not trials.has_both_kinds or trials.label is None:
        return Evaluation(scored, scores, metrics, speakers=(count, how), calibration=calibration)
    errors = curve(scores, trials.label)
    results = compute(errors, metrics)
    # Confidence intervals.
    known = SpeakerTrials(left, right, trials.label)
    limits, notes = {}, list[str]()
    if config.bootstrap:
        try:
            limits = intervals(scores, known, metrics, config.bootstrap, config.seed)
        except ValueError:
            notes.append("There are too few speakers for confidence intervals.")
        if limits and (note := _note_on_errors(results, trials.label)):
            notes.append(note)
    for note in notes:
        log(f"note: {note}")
    return Evaluation(
        scored,
        scores,
        metrics,
        errors,
        results,
        limits,
        (count, how),
        _breakdown(config, scored, scores, results["eer_threshold"]),
        _worst(scores, trials.label, config.worst),
        calibration,
        tuple(notes),
    )


def _note_on_errors(results: Mapping[str, float], labels: np.ndarray) -> str:
    """Sentence on intervals that are too narrow, since few trials are errors; "" where there are enough.

    Args:
        results: value of each metric.
        labels: (N,) 1 target, 0 non-target.
    """
    targets = int(labels.sum())
    errors = round(results["eer_percent"] / 100 * min(targets, len(labels) - targets), 6)
    if errors >= LEAST_ERRORS:
        return ""
    return (
        f"The intervals are too narrow: they rest on {errors:.1f} errors of one kind at the equal error rate; take a "
        f"list with at least {LEAST_ERRORS}."
    )


def _breakdown(config: EvalConfig, scored: Scored, scores: np.ndarray, threshold: float) -> dict[str, list[Group]]:
    trials, people = scored.trials, scored.people
    if not config.by or trials.label is None or people is None:
        return {}
    by_column = {}
    for column in config.by:
        left, right = ([""] * len(trials.names) for _ in range(2))
        for index, name in enumerate(trials.names):
            if name in people.enrolment:
                left[index] = people.enrolment[name][0].attribute(column)
            if name in people.test:
                right[index] = people.test[name].attribute(column)
        by_column[column] = groups(scores, trials.label, left, right, (trials.enrolment, trials.test), threshold)
    return by_column


def _worst(scores: np.ndarray, labels: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Places of the lowest target scores and of the highest non-target scores, the worst first."""
    worst = []
    for label, sign in ((1, 1.0), (0, -1.0)):
        places = np.flatnonzero(labels == label)
        values = sign * scores[places]
        few = np.argpartition(values, count - 1)[:count] if count < len(values) else np.arange(len(values))
        worst.append(places[few[np.argsort(values[few], kind="stable")]][:count])
    return worst[0], worst[1]


def evaluate(config: EvalConfig, scored: Scored, started: float) -> Report:
    """Assess scored trials; write scores.txt, utt2spk, report.json and report.html into `config.out`.

    Args:
        config: settings.
        scored: scored trials.
        started: start of the command (s since the epoch).
    Raises:
        SpkdError: as `assess`, or `out` cannot be written.
    """
    config, out = in_use_with(config, scored), writable_folder(config.out)
    evaluation = assess(config, scored)
    enrolment, test, _ = scored.speakers()
    listed = sorted((enrolment | test).items())
    _, gap = as_written(itertools.chain.from_iterable(listed))
    speakers = "".join(f"{name}{gap}{speaker}\n" for name, speaker in listed).encode()
    write_bytes(out / SPEAKERS, speakers)
    files = {SCORES: _write_scores(out / SCORES, evaluation), SPEAKERS: digest.of_bytes(speakers)}
    report = summarise(config, evaluation, time.time() - started, files)
    write_json(out / REPORT, report.to_json())
    write_bytes(out / PAGE, page.evaluation(report, evaluation.curve, evaluation.scores, scored, config.audio).encode())
    return report


def _write_scores(path: Path, evaluation: Evaluation) -> str:
    """Write lines of `enrolment test score`, and `target` or `nontarget` where that is known.

    The fields are separated by tabs where a name has a space. The file is written in pieces.

    Returns:
        SHA-256 of the file.
    Raises:
        OSError: the file cannot be written, for example since the disk is full; the error names the file.
    """
    temporary, state = part_path(path), hashlib.sha256()
    try:
        with open(temporary, "wb") as file:
            for lines in _score_lines(evaluation):
                data = "".join(lines).encode()
                state.update(data)
                file.write(data)
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)
    return state.hexdigest()


def _score_lines(evaluation: Evaluation) -> Iterator[list[str]]:
    trials, scores = evaluation.scored.trials, evaluation.scores
    names, gap = as_written(trials.names)
    for first in range(0, len(trials), AT_ONCE):
        piece = slice(first, first + AT_ONCE)
        sides = (trials.enrolment[piece].tolist(), trials.test[piece].tolist(), scores[piece].tolist())
        if trials.label is None:
            yield [f"{names[a]}{gap}{names[b]}{gap}{s:.6f}\n" for a, b, s in zip(*sides, strict=True)]
        else:
            words = [LABELS[label] for label in trials.label[piece].tolist()]
            rows = zip(*sides, words, strict=True)
            yield [f"{names[a]}{gap}{names[b]}{gap}{s:.6f}{gap}{word}\n" for a, b, s, word in rows]


def summarise(config: EvalConfig, evaluation: Evaluation, seconds: float, files: dict[str, str]) -> Report:
    """Report of an evaluation.

    Args:
        config: settings.
        evaluation: scored trials and their results.
        seconds: duration of the command (s).
        files: digests of the other files of the evaluation, by name.
    """
    scored, trials = evaluation.scored, evaluation.scored.trials
    names = [config.model.name] if len(scored.models) == 1 else [str(config.enrol.model.name), config.model.name]
    labels, student = trials.label, scored.models[-1] if scored.models else None
    models = [(name, model) for name, model in zip(names, scored.models, strict=False) if isinstance(model, Teacher)]
    targets, non_targets = evaluation.worst
    return Report(
        results=evaluation.results,
        intervals=evaluation.intervals,
        metrics=tuple(metric.description for metric in evaluation.metrics),
        trials=TrialSummary(
            trials.source,
            trials.sha256,
            len(trials),
            scored.left_out,
            None if labels is None else int(labels.sum()),
            None if labels is None else int((1 - labels).sum()),
            *evaluation.speakers,
        ),
        models=tuple(ModelSummary(name, efficiency(model), model.described()) for name, model in models),
        training=TrainingSummary.of(student) if isinstance(student, CheckpointTeacher) else None,
        calibration=None
        if evaluation.calibration is None
        else _calibration(str(config.calibration), evaluation.calibration),
        breakdown={column: tuple(some) for column, some in evaluation.breakdown.items()},
        worst=Worst(_worst_trials(evaluation, targets), _worst_trials(evaluation, non_targets)),
        manifest=config.manifest if scored.people is not None else None,
        rejected=scored.rejected,
        how=(*scored.system.how, *_how(config, evaluation)),
        notes=(*(scored.people.notes if scored.people is not None else ()), *scored.notes, *evaluation.notes),
        bootstrap=config.bootstrap if evaluation.intervals else 0,
        seconds=round(seconds, 2),
        files=files,
        version=__version__,
    )


def _calibration(file: str, used: Calibration) -> CalibrationSummary:
    on = used.trained_on
    return CalibrationSummary(file, on.trials, on.sha256, on.targets, on.non_targets, on.speakers, used.quality)


def _worst_trials(evaluation: Evaluation, places: np.ndarray) -> tuple[WorstTrial, ...]:
    trials = evaluation.scored.trials
    return tuple(
        WorstTrial(
            trials.names[trials.enrolment[place]],
            trials.names[trials.test[place]],
            round(float(evaluation.scores[place]), 6),
            int(trials.line[place]),
        )
        for place in places.tolist()
    )


def _how(config: EvalConfig, evaluation: Evaluation) -> list[str]:
    """Processing of the scores and meaning of the numbers, in sentences."""
    how = []
    if (calibration := evaluation.calibration) is not None:
        quality = f" and quality measures ({', '.join(calibration.quality)})" if calibration.quality else ""
        count, speakers = (
            calibration.trained_on.targets + calibration.trained_on.non_targets,
            len(calibration.trained_on.speakers),
        )
        how.append(
            f"Scores{quality} became log-likelihood ratios by logistic regression, trained for p_target = "
            f"{calibration.p_target:g} on {count:,} trials of {speakers:,} other speakers "
            f"({calibration.trained_on.trials})."
        )
    if evaluation.intervals:
        how.append(
            f"Intervals of 95 % follow from {config.bootstrap:,} resamplings of the {evaluation.speakers[0]} speakers "
            f"({evaluation.speakers[1]}): a trial counts as often as its speakers were drawn. Those of Cllr and min "
            "Cllr hold the true value less often than that."
        )
    if evaluation.scored.left_out:
        how.append("Trials with an utterance that could not be used are left out; the utterances are listed.")
    return how


def _note_one_kind(source: str, labels: np.ndarray | None) -> None:
    """Log a note where a list with trials of one kind allows no error rates."""
    if labels is not None and len(np.unique(labels)) < 2:
        kind = "target" if labels[0] else "non-target"
        log(f"note: {source} holds only {kind} trials: scores are written, but no error rates")
