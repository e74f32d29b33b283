"""`spkd eval`: score a trial list, or take scores as they are, and report what they are worth."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from spkd.errors import SpkdError, UsageError
from spkd.eval import page
from spkd.eval.bootstrap import SpeakerTrials, intervals
from spkd.eval.breakdown import Group, groups
from spkd.eval.calibration import Calibration
from spkd.eval.efficiency import efficiency
from spkd.eval.metrics import Curve, Metric, Point, compute, curve, metrics_of
from spkd.eval.score import Scored
from spkd.eval.settings import EvalConfig
from spkd.eval.speakers import numbered
from spkd.eval.training import training_of
from spkd.eval.trials import as_written
from spkd.files.atomic import part_path, read_json, sync_folder, writable_folder, write_bytes, write_json
from spkd.progress import log
from spkd.version import __version__

SCORES, SPEAKERS, REPORT, PAGE = "scores.txt", "utt2spk", "report.json", "report.html"
FORMAT = 2
AT_ONCE = 1 << 16  # lines written together
LABELS = ("nontarget", "target")


@dataclass(frozen=True)
class Evaluation:
    """Scored trials and what they are worth.

    Attributes:
        scored: the trials. scores: (N,) calibrated where there is a calibration.
        metrics: that are computed.
        curve: of the errors; None where the trials are of one kind, or have no labels.
        results: of each metric. intervals: 95 % confidence interval of those that have one.
        speakers: how many there are, and how they are known.
        breakdown: groups of trials, by column of the manifest.
        worst: positions of the target trials of the lowest scores, and of the non-target trials of the highest.
        calibration: that was applied.
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


def check(config: EvalConfig, systems: int) -> tuple[Point, ...]:
    """The points of the costs.

    Raises:
        UsageError: settings that exclude one another; before anything is scored.
    """
    if config.calibration is not None:
        Calibration.load(config.calibration)
    elif systems > 1:
        raise UsageError("several --scores are fused by a calibration: train one with `spkd calibrate`, and name it")
    if config.llr and (not systems or config.calibration):
        raise UsageError("llr=true: only for --scores that are log-likelihood ratios already")
    return tuple(Point.parse(text) for text in config.points)


def assess(config: EvalConfig, scored: Scored) -> Evaluation:
    """Calibrate, measure, resample, break down.

    Raises:
        SpkdError: a calibration that is not of this system, or was trained on these speakers.
    """
    trials = scored.trials
    enrolment, test, how = scored.speakers()
    calibration = None if config.calibration is None else Calibration.load(config.calibration)
    if calibration is None:
        scores = scored.scores[0]
    else:
        speakers = {*enrolment.values(), *test.values()}
        calibration.check(scored.system, speakers, trials.sha256, str(config.calibration))
        scores = calibration(scored.columns(calibration.quality))
    points = tuple(Point.parse(text) for text in config.points)
    metrics = metrics_of(points, config.false_accept, calibration is not None or config.llr or scored.llr)
    left, right = numbered(trials, enrolment, test)
    count = len({*enrolment.values(), *test.values()})
    if not trials.has_both_kinds or trials.label is None:
        return Evaluation(scored, scores, metrics, speakers=(count, how), calibration=calibration)
    at = curve(scores, trials.label)
    results = compute(at, metrics)
    known = SpeakerTrials(left, right, trials.label)
    found = {}
    if config.bootstrap:
        try:
            found = intervals(scores, known, metrics, config.bootstrap, config.seed)
        except ValueError:
            log("note: too few speakers for confidence intervals")
    return Evaluation(
        scored,
        scores,
        metrics,
        at,
        results,
        found,
        (count, how),
        _breakdown(config, scored, scores, results["eer_threshold"]),
        _worst(scores, trials.label, config.worst),
        calibration,
    )


def _breakdown(config: EvalConfig, scored: Scored, scores: np.ndarray, threshold: float) -> dict[str, list[Group]]:
    trials, people = scored.trials, scored.people
    if not config.by or trials.label is None:
        return {}
    if people is None:
        raise UsageError(f"by={config.by}: needs the manifest of the trials' audio (manifest=FILE)")
    found = {}
    for column in config.by:
        left, right = ([""] * len(trials.names) for _ in range(2))
        for index, name in enumerate(trials.names):
            if name in people.enrolment:
                left[index] = people.enrolment[name][0].attribute(column)
            if name in people.test:
                right[index] = people.test[name].attribute(column)
        found[column] = groups(scores, trials.label, left, right, (trials.enrolment, trials.test), threshold)
    return found


def _worst(scores: np.ndarray, labels: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the lowest target scores and of the highest non-target scores, the worst first."""
    found = []
    for label, sign in ((1, 1.0), (0, -1.0)):
        places = np.flatnonzero(labels == label)
        values = sign * scores[places]
        few = np.argpartition(values, count - 1)[:count] if count < len(values) else np.arange(len(values))
        found.append(places[few[np.argsort(values[few], kind="stable")]][:count])
    return found[0], found[1]


def evaluate(config: EvalConfig, scored: Scored, started: float) -> dict[str, Any]:
    """Assess scored trials; write scores.txt, utt2spk, report.json and report.html into `config.out`.

    Args:
        started: time at which the command began.
    Returns:
        The report.
    Raises:
        SpkdError: as `assess`, or `out` cannot be written.
    """
    out = writable_folder(config.out)
    found = assess(config, scored)
    _write_scores(out / SCORES, found)
    enrolment, test, _ = scored.speakers()
    speakers = sorted((enrolment | test).items())
    _, gap = as_written(itertools.chain.from_iterable(speakers))
    write_bytes(out / SPEAKERS, "".join(f"{name}{gap}{speaker}\n" for name, speaker in speakers).encode())
    summary = summarise(config, found, time.time() - started)
    write_json(out / REPORT, summary)
    write_bytes(out / PAGE, page.evaluation(summary, found.curve, found.scores, scored, config.audio).encode())
    return summary


def _write_scores(path: Path, found: Evaluation) -> None:
    """`enrolment test score`, and `target` or `nontarget` where that is known; a piece at a time.

    Tabs separate them where a name has a space.
    """
    part = part_path(path)
    try:
        with open(part, "w") as file:
            for lines in _score_lines(found):
                file.writelines(lines)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    sync_folder(path.parent)


def _score_lines(found: Evaluation) -> Iterator[list[str]]:
    trials, scores = found.scored.trials, found.scores
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


def summarise(config: EvalConfig, found: Evaluation, seconds: float) -> dict[str, Any]:
    """The report as one tree: results first, then everything that decides them."""
    scored, trials = found.scored, found.scored.trials
    names = [config.model.name] if len(scored.models) == 1 else [str(config.enrol.model.name), config.model.name]
    labels = trials.label
    return {
        "spkd_report": FORMAT,
        "results": found.results,
        "intervals": {key: list(limits) for key, limits in found.intervals.items()},
        "metrics": [
            {
                "key": m.key,
                "label": m.label,
                "decimals": m.decimals,
                "unit": m.unit,
                "meaning": m.meaning,
                "headline": m.headline,
            }
            for m in found.metrics
        ],
        "trials": {
            "file": trials.source,
            "sha256": trials.sha256,
            "scored": len(trials),
            "left_out": scored.left_out,
            "targets": None if labels is None else int(labels.sum()),
            "non_targets": None if labels is None else int((1 - labels).sum()),
            "speakers": found.speakers[0],
            "speakers_known": found.speakers[1],
        },
        "models": [
            {"name": name, **efficiency(model), **model.described().to_json()}
            for name, model in zip(names, scored.models, strict=False)
        ],
        "training": training_of(config.model.name) if scored.models else None,
        "calibration": None
        if found.calibration is None
        else {"file": config.calibration, **asdict(found.calibration.trained_on), "quality": found.calibration.quality},
        "breakdown": {column: [asdict(group) for group in some] for column, some in found.breakdown.items()},
        "worst": {
            kind: [_trial(found, place) for place in places.tolist()]
            for kind, places in zip(("targets", "non_targets"), found.worst, strict=True)
        },
        "manifest": config.manifest if scored.people is not None else None,
        "rejected": scored.rejected,
        "notes": [*(scored.people.notes if scored.people is not None else ()), *scored.notes],
        "how": [*scored.system.how, *_how(config, found)],
        "bootstrap": config.bootstrap if found.intervals else 0,
        "seconds": round(seconds, 2),
        "version": __version__,
    }


def _trial(found: Evaluation, place: int) -> dict[str, Any]:
    trials = found.scored.trials
    return {
        "enrolment": trials.names[trials.enrolment[place]],
        "test": trials.names[trials.test[place]],
        "score": round(float(found.scores[place]), 6),
        "line": int(trials.line[place]),
    }


def _how(config: EvalConfig, found: Evaluation) -> list[str]:
    """What was done to the scores, and what the numbers are, in sentences."""
    how = []
    if (one := found.calibration) is not None:
        quality = f" and quality measures ({', '.join(one.quality)})" if one.quality else ""
        count, speakers = one.trained_on.targets + one.trained_on.non_targets, len(one.trained_on.speakers)
        how.append(
            f"Scores{quality} became log-likelihood ratios by logistic regression, trained for p_target = "
            f"{one.p_target:g} on {count:,} trials of {speakers:,} other speakers ({one.trained_on.trials})."
        )
    if found.intervals:
        how.append(
            f"Intervals of 95 % follow from {config.bootstrap:,} resamplings of the {found.speakers[0]} speakers "
            f"({found.speakers[1]}): a trial counts as often as its speakers were drawn. Those of Cllr and min Cllr "
            "hold the true value less often than that."
        )
    if found.scored.left_out:
        how.append("Trials with an utterance that could not be used are left out; the utterances are listed.")
    return how


def note_one_kind(source: str, labels: np.ndarray | None) -> None:
    """Log early that a list of one kind of trial has no error rates."""
    if labels is not None and len(np.unique(labels)) < 2:
        kind = "target" if labels[0] else "non-target"
        log(f"note: {source} holds only {kind} trials: scores are written, but no error rates")


def read_report(folder: str | Path) -> dict[str, Any]:
    """The report of an evaluation's folder.

    Raises:
        UsageError: none there. SpkdError: damaged, or of another format.
    """
    path = Path(folder) / REPORT
    if not path.is_file():
        raise UsageError(f"{folder}: no evaluation ({REPORT}); make one with `spkd eval`")
    tree = read_json(path)
    if not isinstance(tree, dict) or tree.get("spkd_report") != FORMAT:
        raise SpkdError(f"{path}: not a report of format {FORMAT}; evaluate again with this version")
    return tree
