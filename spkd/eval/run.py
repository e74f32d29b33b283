"""`spkd eval`: score a trial list, or read scores from files, compute metrics, and write the report."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np

from spkd.config import without_unused
from spkd.corpus.fetched import copy_to
from spkd.corpus.manifest import Manifest
from spkd.device import resolve
from spkd.errors import SpkdError, UsageError, listed
from spkd.eval import page
from spkd.eval import trials as trial_lists
from spkd.eval.bootstrap import SpeakerTrials, intervals
from spkd.eval.breakdown import UNKNOWN, Group, groups, values_of_model
from spkd.eval.calibration import Calibration
from spkd.eval.efficiency import efficiency
from spkd.eval.metrics import (
    LEAST_FALSE_ALARMS,
    Curve,
    Metric,
    Point,
    compute,
    curve,
    least_non_targets,
    metrics_of,
)
from spkd.eval.report import (
    FILES,
    FORMAT,
    MODELS,
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
    system_of,
)
from spkd.eval.score import Scored, check_cohort, config_columns, score, score_from_files
from spkd.eval.settings import CalibrateConfig, EvalConfig, ScoringConfig
from spkd.eval.speakers import numbered
from spkd.eval.training import TrainingSummary
from spkd.eval.trials import Trials, as_written
from spkd.files import digest
from spkd.files.atomic import (
    check_holds_no_other,
    check_not_among,
    check_replaces_none,
    check_writable,
    remove,
    writable_folder,
    write_bytes,
    write_json,
    writing,
)
from spkd.files.text import counted
from spkd.mapping.embedding_map import load_map
from spkd.progress import log
from spkd.teachers import check_model, load_model, resolved
from spkd.teachers.base import Teacher
from spkd.teachers.checkpoint import CheckpointTeacher
from spkd.teachers.settings import ScoredModelConfig
from spkd.version import __version__

AT_ONCE = 1 << 16  # lines that are written together
LABELS = ("nontarget", "target")
LEAST_ERRORS = 5  # misses, and false alarms, at the EER: with fewer, its interval holds the true value too rarely
# Settings, and sections of settings, that only the scores of a model need.
OF_MODELS = (
    *("model", "enrol.model", "enrol.map_by", "backend", "subtract_mean", "norm", "cohort"),
    *("batch_size", "workers", "min_seconds", "vad", "fetch.cache", "fetch.limit", "device"),
)
OF_MANIFESTS = ("by", "audio", "enrol.map")  # settings that only a manifest gives an effect
# Settings that only error rates use.
OF_LABELS = ("points", "false_accept", "by", "bootstrap", "seed", "worst", "audio", "llr")
Scoring = TypeVar("Scoring", bound=ScoringConfig)


@dataclass(frozen=True)
class Evaluation:
    """Scored trials and their results.

    Attributes:
        scores: (N,) scores, calibrated where there is a calibration.
        curve: error rates at all thresholds; None where the trials are of one kind, or have no labels.
        speakers: number of speakers, and the source of their identity.
        worst: places of the target trials with the lowest scores, and of the non-target trials with the highest.
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
        systems: number of score files; 0: a model gives the scores.
    Raises:
        UsageError: a setting without effect was typed.
    """
    unused = dict.fromkeys(OF_MODELS, "--scores come from files, not from a model") if systems else {}
    if not systems:
        unused["llr"] = "only for --scores that are log-likelihood ratios already"
        if _is_same(config.enrol.model, config.model):
            unused["enrol.model"] = f"model={config.model.name} embeds both sides in any case"
    if trials is None:
        unused["format"] = "there is no trial list"
    return without_unused(config, unused)


def _is_same(one: ScoredModelConfig, other: ScoredModelConfig) -> bool:
    """Whether settings are of the same model, run in the same way."""
    if one.name is None:
        return False
    # Their classes differ, as one is of the enrolment side.
    one_, other_ = (asdict(replace(of, weights=_place(of.weights or ""))) for of in map(resolved, (one, other)))
    return one_ == other_


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


def check_inputs(config: ScoringConfig, trials: str | None, scores: Sequence[Path]) -> None:
    """Check that the trial list and the score files, or else the models, are there. Arguments as `run_trials`.

    Raises:
        UsageError: one of them is not, or neither trials nor scores are named.
    """
    if trials is None and not scores:
        raise UsageError("name a trial list, or score files with --scores")
    if trials is not None:
        trial_lists.check_exists(trials, "trial list")
    for path in scores:
        trial_lists.check_exists(path, "score file")
    if not scores:
        check_model(config.model)
        if config.enrol.model.name is not None:
            check_model(config.enrol.model, "enrol.model")
        if config.enrol.map_by is not None:
            load_map(config.enrol.map_by)


def check(config: EvalConfig, trials: str | None, scores: Sequence[Path]) -> None:
    """Check the settings before anything is scored. Arguments as `run_trials`.

    Raises:
        UsageError: settings that exclude one another, or no such calibration.
        SpkdError: `out` cannot be written, or holds something else, files of others, or a file that is read.
    """
    if config.calibration is not None:
        Calibration.load(config.calibration)
    elif len(scores) > 1:
        raise UsageError(
            "several --scores are fused by a calibration: train one with `spkd calibrate TRIALS --scores FILE --scores "
            "FILE out=fusion.json` on other speakers, and name it (calibration=fusion.json)"
        )
    if config.llr and config.calibration:
        raise UsageError("llr=true: only for --scores that are log-likelihood ratios already")
    for text in config.points:
        Point.parse(text)
    check_writable(Path(config.out) / REPORT)
    check_not_among(
        [Path(config.out) / name for name in FILES],
        [trials, *scores, config.manifest, config.enrol.map, config.calibration, config.cohort.source],
    )
    check_holds_no_other(config.out, "an evaluation")
    check_replaces_none(config.out, FILES, {REPORT: FORMAT.key})
    there = _evaluation_in(Path(config.out))
    names = [] if scores else _model_names(config)
    if there is not None and [_place(model.name) for model in there.models] != list(map(_place, names)):
        of = [listed([model.name for model in there.models] or ["scores from files"]), listed(names or ["--scores"])]
        raise UsageError(
            f"{config.out}: holds the evaluation of {of[0]}, not of {of[1]}; choose another folder (out=FOLDER)"
        )


def _evaluation_in(folder: Path) -> Report | None:
    """Report of the evaluation in a folder; None where there is none, or one that cannot be read."""
    try:
        return Report.read(folder)
    except SpkdError:
        return None


def _model_names(config: ScoringConfig) -> list[str]:
    """Names of the models of both sides, with their dimensions where these are given; one where they are the same."""
    return [config.model.label] if config.enrol.model.name is None else [config.enrol.model.label, config.model.label]


def _place(name: str) -> str:
    """A model's name or weights, whatever the spelling of a folder."""
    return os.path.normpath(name)


def run_trials(config: ScoringConfig, trials: str | None, scores: Sequence[Path] = ()) -> Scored:
    """Trials scored by the model that the settings name, or by the files of other systems.

    Args:
        trials: file of the list, `-` for standard input; None: the trials of the first score file.
        scores: score files of other systems.
    Raises:
        UsageError: settings that exclude one another, or a typed one without effect.
        SpkdError: as `score`.
    """
    check_cohort(config)
    if scores:
        files = [trial_lists.read_scores(path, lambda: _known(config, trials)) for path in scores]
        listed = None if trials is None else _read_trials(config, trials, files[0][0].names)
        _check_labels(config, files[0][0] if listed is None else listed)
        scored = score_from_files(config, files, listed, [system_of(Path(path)) for path in scores])
    else:
        assert trials is not None
        audio, device = Manifest.load(config.manifest, config_columns(config)), resolve(config.device)
        copy_to(config, audio)
        listed = _read_trials(config, trials, audio.index_of)
        _check_labels(config, listed)
        model, enrol_model, the_map = load_model(config.model, device), None, None
        if config.enrol.model.name is not None:
            enrol_model = load_model(config.enrol.model, device)
            if config.enrol.map_by is not None:
                the_map = load_map(config.enrol.map_by)
                the_map.check_models(enrol_model.described(), model.described(), f"enrol.map_by={config.enrol.map_by}")
        scored = score(config, model, audio, listed, enrol_model, the_map)
    for note in scored.notes:
        log(f"note: {note}")
    return scored


def _known(config: ScoringConfig, trials: str | None) -> Collection[str]:
    """Names of utterances, from the trial list or from the manifest; () where there is neither."""
    if trials is not None and trials != trial_lists.STDIN:
        return set(trial_lists.read(trials, config.format).names)
    return Manifest.load(config.manifest).index_of if Path(config.manifest).exists() else ()


def _read_trials(config: ScoringConfig, trials: str, known: Collection[str]) -> Trials:
    """Read a trial list.

    Args:
        known: names of utterances, which distinguish a first trial from a header.
    """
    return trial_lists.read(trials, config.format, known)


def _check_labels(config: ScoringConfig, trials: Trials) -> None:
    """Check before the work what a list without labels of both kinds allows; of error rates, this is logged.

    Raises:
        UsageError: a setting of error rates is typed for a list that allows none.
        SpkdError: as `check_both_kinds`, for a calibration.
    """
    if isinstance(config, CalibrateConfig):
        check_both_kinds(trials)
    elif not trials.has_both_kinds:
        _note_one_kind(trials.source, trials.label)
        reason = "the list has no labels" if trials.label is None else "the list has trials of one kind alone"
        without_unused(config, dict.fromkeys(OF_LABELS, reason))


def check_both_kinds(trials: Trials) -> None:
    """Check that a list can train a calibration. Raises SpkdError where it has no labels of both kinds."""
    if not trials.has_both_kinds:
        raise SpkdError(f"{trials.source}: a calibration needs labelled trials of both kinds")


def assess(config: EvalConfig, scored: Scored) -> Evaluation:
    """Assess scored trials: calibration, metrics, confidence intervals and breakdown.

    Raises:
        SpkdError: the calibration is for another system, or was trained on these speakers.
    """
    trials = scored.trials
    enrolment, test, how = scored.speakers()
    # Calibration.
    calibration, notes = None if config.calibration is None else Calibration.load(config.calibration), list[str]()
    if calibration is None:
        scores = scored.scores[0]
    else:
        speakers = {*enrolment.values(), *test.values()}
        calibration.check(scored.system, speakers, scored.utterances(), trials.sha256, str(config.calibration))
        scores = calibration(scored.columns(calibration.quality))
        if not np.isfinite(scores).all():
            raise SpkdError(f"{config.calibration}: gives log-likelihood ratios of {trials.source} that are not finite")
        if not calibration.names_speakers:
            notes.append(
                f"Whether the calibration was trained on speakers of {trials.source} is not known: "
                f"{config.calibration} lacks their names, as a calibration that leaves with a model does."
            )
            log(f"note: {notes[0]}")
    # Metrics.
    points = tuple(Point.parse(text) for text in config.points)
    non_targets = 0 if trials.label is None else int((1 - trials.label).sum())
    llr = calibration is not None or config.llr or scored.llr
    metrics = metrics_of(points, config.false_accept, llr, non_targets)
    left, right = numbered(trials, enrolment, test)
    count = len({*enrolment.values(), *test.values()})
    if not trials.has_both_kinds or trials.label is None:
        return Evaluation(scored, scores, metrics, speakers=(count, how), calibration=calibration, notes=tuple(notes))
    errors = curve(scores, trials.label)
    results = compute(errors, metrics)
    # Confidence intervals.
    known = SpeakerTrials(left, right, trials.label)
    limits, more = {}, list[str]()
    if config.bootstrap:
        try:
            limits = intervals(scores, known, metrics, config.bootstrap, config.seed)
        except ValueError:
            more.append("There are too few speakers for confidence intervals.")
        if limits and (note := _note_on_errors(results, trials.label)):
            more.append(note)
    breakdown, of_groups = _breakdown(config, scored, scores, results["eer_threshold"])
    more += of_groups
    for note in more:
        log(f"note: {note}")
    if "false_accept" in config.given and (left_out := _without_threshold(config, non_targets)):
        log(f"note: {left_out}")
    return Evaluation(
        scored,
        scores,
        metrics,
        errors,
        results,
        limits,
        (count, how),
        breakdown,
        _worst(scores, trials.label, config.worst),
        calibration,
        (*notes, *more),
    )


def _without_threshold(config: EvalConfig, non_targets: int) -> str:
    """Sentence on the false-alarm rates without a threshold; "" where there are none."""
    rates = [rate for rate in config.false_accept if non_targets < least_non_targets(rate)]
    if not rates:
        return ""
    return (
        f"No threshold is given at a false-alarm rate of {listed([f'{100 * rate:g} %' for rate in rates])}: fewer than "
        f"{LEAST_FALSE_ALARMS} of the {counted(non_targets, 'non-target trial')} tell it, and the rate on other trials "
        "could be several times as high."
    )


def _note_on_errors(results: Mapping[str, float], labels: np.ndarray) -> str:
    """Sentence on intervals that are too narrow, since few trials are errors; "" where there are enough.

    Args:
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


def _breakdown(
    config: EvalConfig, scored: Scored, scores: np.ndarray, threshold: float
) -> tuple[dict[str, list[Group]], list[str]]:
    """Groups of trials by column, and notes on models that have no value of a column."""
    trials, people, by_column, notes = scored.trials, scored.people, dict[str, list[Group]](), list[str]()
    if trials.label is None or people is None:
        return {}, []
    for column in config.by:
        left, right = ([""] * len(trials.names) for _ in range(2))
        mixed = 0
        for index, name in enumerate(trials.names):
            if name in people.enrolment:
                values = values_of_model(people.enrolment[name], column)
                left[index], mixed = (values[0], mixed) if len(values) == 1 else ("", mixed + 1)
            if name in people.test:
                right[index] = people.test[name].attribute(column)
        if mixed:
            notes.append(
                f"by={column}: models whose enrolment utterances differ in it count as {UNKNOWN}: {mixed:,} of "
                f"{len(people.enrolment):,}"
            )
        by_column[column] = groups(scores, trials.label, left, right, (trials.enrolment, trials.test), threshold)
    return by_column, notes


def _worst(scores: np.ndarray, labels: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Places of the lowest target scores and of the highest non-target scores, the worst first."""
    worst = []
    for label, sign in ((1, 1.0), (0, -1.0)):
        places = np.flatnonzero(labels == label)
        values = sign * scores[places]
        few = np.argpartition(values, count - 1)[:count] if count < len(values) else np.arange(len(values))
        worst.append(places[few[np.argsort(values[few], kind="stable")]][:count])
    return worst[0], worst[1]


def evaluate_trials(config: EvalConfig, trials: str | None, scores: Sequence[Path] = ()) -> Report:
    """Score trials, assess them and write the evaluation; as `check`, `run_trials` and `evaluate`."""
    started = time.time()
    config = in_use(config, trials, len(scores))
    check_inputs(config, trials, scores)
    check(config, trials, scores)
    return evaluate(config, run_trials(config, trials, scores), started)


def evaluate(config: EvalConfig, scored: Scored, started: float) -> Report:
    """Assess scored trials; write scores.txt, utt2spk, model2spk, report.json and report.html into `config.out`.

    Args:
        started: start of the command (s since the epoch).
    Raises:
        SpkdError: as `assess`, or `out` cannot be written.
    """
    config, out = in_use_with(config, scored), writable_folder(config.out)
    evaluation = assess(config, scored)
    if (there := _evaluation_in(out)) is not None and (replaced := _replaced(there, scored)):
        log(f"note: {out}: {replaced} is replaced")
    enrolment, test, _ = scored.speakers()
    _, gap = as_written({*enrolment, *enrolment.values(), *test, *test.values()})
    tables = {SPEAKERS: enrolment | test} | ({MODELS: enrolment} if config.enrol.map is not None else {})
    texts = {
        name: "".join(f"{k}{gap}{v}\n" for k, v in sorted(table.items())).encode() for name, table in tables.items()
    }
    with writing(out / SCORES) as file:
        files = {SCORES: _write_scores(file, evaluation)} | {k: digest.of_bytes(text) for k, text in texts.items()}
        report = summarise(config, evaluation, time.time() - started, files)
        file.flush()
        os.fsync(file.fileno())
        # The report comes first: by it, the command knows the folder for its own where a kill follows.
        write_json(out / REPORT, report.to_json())
    for name in (SPEAKERS, MODELS):
        if name in texts:
            write_bytes(out / name, texts[name])
        else:
            remove(out / name)  # of an earlier evaluation
    write_bytes(out / PAGE, page.evaluation(report, evaluation.curve, evaluation.scores, scored, config.audio).encode())
    return report


def _replaced(there: Report, scored: Scored) -> str:
    """Phrase for an evaluation of other weights, or of other trials; "" where it is one of the same."""
    if there.trials.sha256 != scored.trials.sha256:
        return f"the evaluation on {there.trials.file}"
    if there.weights != scored.system.models:
        return "the evaluation of other weights"
    return ""


def _write_scores(file: BinaryIO, evaluation: Evaluation) -> str:
    """Write lines of `enrolment test score`, and `target` or `nontarget` where that is known.

    The fields are separated by tabs where a name has a space. The file is written in pieces.

    Returns:
        SHA-256 of the file.
    """
    state = hashlib.sha256()
    for lines in _score_lines(evaluation):
        data = "".join(lines).encode()
        state.update(data)
        file.write(data)
    return state.hexdigest()


def _score_lines(evaluation: Evaluation) -> Iterator[list[str]]:
    trials, scores = evaluation.scored.trials, evaluation.scores
    names, gap = as_written(trials.names)
    for first in range(0, len(trials), AT_ONCE):
        piece = slice(first, first + AT_ONCE)
        sides = (trials.enrolment[piece].tolist(), trials.test[piece].tolist(), as_text(scores[piece]))
        if trials.label is None:
            yield [f"{names[a]}{gap}{names[b]}{gap}{s}\n" for a, b, s in zip(*sides, strict=True)]
        else:
            words = [LABELS[label] for label in trials.label[piece].tolist()]
            rows = zip(*sides, words, strict=True)
            yield [f"{names[a]}{gap}{names[b]}{gap}{s}{gap}{word}\n" for a, b, s, word in rows]


def as_text(scores: np.ndarray) -> list[str]:
    """Scores as text from which they are read again without a change of any: nine digits tell all float32 apart."""
    form: Callable[[float], str] = "{:.9g}".format if scores.dtype == np.float32 else repr
    return list(map(form, scores.tolist()))


def summarise(config: EvalConfig, evaluation: Evaluation, seconds: float, files: dict[str, str]) -> Report:
    """Report of an evaluation.

    Args:
        seconds: duration of the command (s).
        files: digests of the other files of the evaluation, by name.
    """
    scored, trials = evaluation.scored, evaluation.scored.trials
    names = _model_names(config)
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
        backend=(*scored.system.steps, *_how_calibrated(evaluation.calibration)),
        how=_how(config, evaluation),
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
            float(evaluation.scores[place]),
            int(trials.line[place]),
        )
        for place in places.tolist()
    )


def _how_calibrated(calibration: Calibration | None) -> list[str]:
    """Calibration of the scores, in sentences."""
    if calibration is None:
        return []
    on = calibration.trained_on
    quality = f" and quality measures ({', '.join(calibration.quality)})" if calibration.quality else ""
    speakers = f" of {counted(len(on.speakers), 'other speaker')}" if calibration.names_speakers else ""
    return [
        f"Scores{quality} became log-likelihood ratios by logistic regression, trained for p_target = "
        f"{calibration.p_target:g} on {on.targets + on.non_targets:,} trials{speakers} ({on.trials})."
    ]


def _how(config: EvalConfig, evaluation: Evaluation) -> tuple[str, ...]:
    """Meaning of the numbers, in sentences."""
    how, labels = list[str](), evaluation.scored.trials.label
    if labels is not None and evaluation.results:
        how += filter(None, [_without_threshold(config, int((1 - labels).sum()))])
    if evaluation.intervals:
        how.append(
            f"Confidence intervals of 95 % are bootstrapped over the {counted(evaluation.speakers[0], 'speaker')} "
            f"({evaluation.speakers[1]}): {config.bootstrap:,} times, as many speakers are drawn with replacement, and "
            "each trial is counted as often as its speakers are. The intervals of Cllr and min Cllr contain the true "
            "value in less than 95 % of evaluations."
        )
    how += evaluation.scored.places
    if evaluation.scored.left_out:
        how.append("Trials with an utterance that could not be used are left out; the utterances are listed.")
    return tuple(how)


def _note_one_kind(source: str, labels: np.ndarray | None) -> None:
    """Log a note where a list with trials of one kind allows no error rates."""
    if labels is not None and len(np.unique(labels)) < 2:
        kind = "target" if labels[0] else "non-target"
        log(f"note: {source} holds only {kind} trials: scores are written, but no error rates")
