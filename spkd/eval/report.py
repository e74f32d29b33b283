"""report.json: the record of one evaluation."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from spkd.errors import SpkdError, UsageError
from spkd.eval.breakdown import Group
from spkd.eval.metrics import MetricDescription
from spkd.eval.training import TrainingSummary
from spkd.files import digest
from spkd.files.reading import parse_json, read_bytes
from spkd.files.schema import record
from spkd.files.sealed import Format
from spkd.files.text import counted, short_names
from spkd.outputs.teacher_card import TeacherCard

SCORES, SPEAKERS, REPORT, PAGE = "scores.txt", "utt2spk", "report.json", "report.html"
MODELS = "model2spk"  # speakers of the models of an enrolment map, whose names may be those of other utterances
FILES = (SCORES, SPEAKERS, MODELS, REPORT, PAGE)
FORMAT = Format("spkd_report", 3, "a report", "evaluate again with this version")


@dataclass(frozen=True)
class TrialSummary:
    """Summary of a list of trials.

    Attributes:
        scored: number of trials that have a score.
        left_out: number of trials without a score.
        targets: number of target trials that have a score; None without labels.
        non_targets: number of non-target trials that have a score; None without labels.
        speakers_known: source of the speakers' identity.
    """

    file: str
    sha256: str
    scored: int = field(metadata={"low": 0})
    left_out: int = field(metadata={"low": 0})
    targets: int | None = field(metadata={"low": 0})
    non_targets: int | None = field(metadata={"low": 0})
    speakers: int = field(metadata={"low": 0})
    speakers_known: str

    @property
    def name(self) -> str:
        """Name of the list without its folder."""
        return Path(self.file).name


@dataclass(frozen=True)
class Efficiency:
    """Size and speed of a model; None for unknown values.

    Attributes:
        embedding_size: number of numbers of its embedding.
        bytes: size of the weights in memory.
        macs_per_second: multiply-accumulates per second of speech, features not counted.
        real_time_factor: processing time over audio time on one CPU thread, features included.
    """

    parameters: int | None = field(default=None, metadata={"low": 0})
    embedding_size: int | None = field(default=None, metadata={"low": 0})
    bytes: int | None = field(default=None, metadata={"low": 0})
    macs_per_second: int | None = field(default=None, metadata={"low": 0})
    real_time_factor: float | None = field(default=None, metadata={"positive": True})


@dataclass(frozen=True)
class ModelSummary:
    """Summary of a model that embedded one side of the trials, or both."""

    name: str
    efficiency: Efficiency
    card: TeacherCard

    def to_json(self) -> dict[str, Any]:
        known = {name: value for name, value in asdict(self.efficiency).items() if value is not None}
        return {"name": self.name, **known, **self.card.to_json()}

    @classmethod
    def from_json(cls, tree: Any, where: str) -> ModelSummary:
        """Read a summary from parsed JSON. Raises SpkdError where it is not a summary."""
        if not isinstance(tree, dict) or not isinstance(tree.get("name"), str):
            raise SpkdError(f"{where}: damaged (name is missing, or no text)")
        sizes = {f.name for f in fields(Efficiency)}
        size = record(Efficiency, {name: value for name, value in tree.items() if name in sizes}, where)
        card = {name: value for name, value in tree.items() if name not in {"name", *sizes}}
        return cls(tree["name"], size, TeacherCard.from_json(card, where))


@dataclass(frozen=True)
class CalibrationSummary:
    """Summary of the calibration that was applied.

    Attributes:
        quality: names of the quality measures that it takes.
    """

    file: str
    trials: str
    sha256: str
    targets: int = field(metadata={"low": 0})
    non_targets: int = field(metadata={"low": 0})
    speakers: tuple[str, ...]
    quality: tuple[str, ...]


@dataclass(frozen=True)
class WorstTrial:
    """Trial whose score would suit the other kind."""

    enrolment: str
    test: str
    score: float
    line: int = field(metadata={"low": 0})


@dataclass(frozen=True)
class Worst:
    """Target trials with the lowest scores, and non-target trials with the highest, the worst first."""

    targets: tuple[WorstTrial, ...] = ()
    non_targets: tuple[WorstTrial, ...] = ()


@dataclass(frozen=True)
class Report:
    """Results of an evaluation, and all inputs that determine them.

    Attributes:
        results: value of each metric; {} without labels of both kinds.
        intervals: 95 % confidence interval of the metrics that have one.
        models: models of the enrolment and of the test side; one where they are the same, none for scores from files.
        training: training of the model of the test side; None where it is not a student.
        calibration: calibration that was applied; None without.
        breakdown: groups of trials, by column of the manifest.
        manifest: manifest of the trials' audio; None where it is not known.
        rejected: utterances that could not be used, with the reasons.
        backend: each step from audio to scores, in sentences.
        how: each step from scores to numbers, in sentences.
        notes: limits of the numbers that a reader has to know, in sentences.
        bootstrap: number of resamplings for the intervals; 0 without intervals.
        seconds: duration of the command (s).
        files: SHA-256 of the other files of the evaluation, by name.
    """

    results: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    metrics: tuple[MetricDescription, ...]
    trials: TrialSummary
    models: tuple[ModelSummary, ...]
    training: TrainingSummary | None
    calibration: CalibrationSummary | None
    breakdown: dict[str, tuple[Group, ...]]
    worst: Worst
    manifest: str | None
    rejected: dict[str, str]
    backend: tuple[str, ...]
    how: tuple[str, ...]
    notes: tuple[str, ...]
    bootstrap: int = field(metadata={"low": 0})
    seconds: float = field(metadata={"low": 0})
    files: dict[str, str]
    version: str

    @property
    def weights(self) -> tuple[str, ...]:
        """Digests of the weights of its models."""
        return tuple(model.card.weights_sha256 for model in self.models)

    @property
    def about(self) -> tuple[str, ...]:
        """Everything about the numbers that a reader has to know, in sentences."""
        return (*self.notes, *self.backend, *self.how)

    @property
    def headline(self) -> tuple[MetricDescription, ...]:
        """Metrics of printed lines and tables."""
        return tuple(metric for metric in self.metrics if metric.headline)

    def interval(self, metric: MetricDescription) -> str:
        """Confidence interval of a metric, formatted for people; "" where it has none."""
        limits = self.intervals.get(metric.key)
        return "" if limits is None else metric.format_interval(limits)

    def line(self) -> str:
        """Headline metrics in a line, the EER with its confidence interval; "" without error rates.

        Those of log-likelihood ratios are there too, which show what a calibration is worth.
        """
        if not self.results:
            return ""
        keys = [metric.key for metric in self.headline]
        keys += ["cllr", *(key.replace("min_dcf", "act_dcf") for key in keys)]
        shown = []
        for metric in (metric for metric in self.metrics if metric.key in keys):
            limits = self.interval(metric) if metric.key == "eer_percent" else ""
            interval = f" (95 % interval {limits})" if limits else ""
            shown.append(f"{metric.label} {metric.format(self.results[metric.key])}{interval}")
        return f"{'   '.join(shown)}   ({counted(self.trials.scored, 'trial')})"

    def to_json(self) -> dict[str, Any]:
        return FORMAT.seal(asdict(self) | {"models": [model.to_json() for model in self.models]})

    @classmethod
    def parse(cls, data: bytes, where: str) -> Report:
        """Read a report from the bytes of its file. Raises SpkdError: damaged, or of another format."""
        return FORMAT.open(parse_json(data, where), where, _checked)

    @classmethod
    def read(cls, folder: str | Path) -> Report:
        """Read the report in the folder of an evaluation.

        Raises:
            UsageError: the folder holds no evaluation.
            SpkdError: as `parse`.
        """
        path = Path(folder) / REPORT
        if not path.is_file():
            raise UsageError(
                f"{folder}: no evaluation ({REPORT}); make one with `spkd eval TRIALS out={shlex.quote(str(folder))}`"
            )
        return cls.parse(read_bytes(path), str(path))


def system_of(scores: Path) -> str:
    """Digest of the models and the back-end of scores that `spkd eval` wrote; "" for other files.

    Raises:
        SpkdError: the report beside them is damaged.
    """
    if scores.name != SCORES or not (scores.parent / REPORT).is_file():
        return ""
    report = Report.read(scores.parent)
    if not report.models or report.files.get(SCORES) != digest.of_file(scores):
        return ""
    return digest.of_tree([list(report.weights), list(report.backend)])


def names_of_lists(reports: Sequence[Report]) -> dict[str, str]:
    """Digest of each list of trials -> its name: that of its file, and as much more as makes it unique."""
    files: dict[str, str] = {}
    for report in reports:
        files.setdefault(report.trials.sha256, report.trials.file)
    short, lists = short_names(files.values()), Counter(files.values())
    return {sha: short[file] if lists[file] == 1 else f"{short[file]} ({sha[:8]})" for sha, file in files.items()}


def _checked(content: dict[str, Any], where: str) -> Report:
    models = content.get("models")
    if not isinstance(models, list):
        raise SpkdError(f"{where}: damaged (models must be a list)")
    read = tuple(ModelSummary.from_json(model, f"{where}: models[{i}]") for i, model in enumerate(models))
    report = record(Report, content | {"models": []}, where)
    known = {metric.key for metric in report.metrics}
    if report.results and (missing := known ^ set(report.results)):
        raise SpkdError(f"{where}: damaged (results and metrics differ in {min(missing)[:40]!r})")
    for metric in report.metrics if report.results else ():
        least, most = metric.limits
        for value in (report.results[metric.key], *report.intervals.get(metric.key, ())):
            if not least <= value <= most:
                raise SpkdError(f"{where}: damaged ({metric.key[:40]} is {value:g})")
    if reversed_ := [key for key, (low, high) in report.intervals.items() if low > high]:
        raise SpkdError(f"{where}: damaged (the interval of {reversed_[0][:40]} ends before it begins)")
    if unknown := set(report.intervals) - set(report.results):
        raise SpkdError(f"{where}: damaged (intervals without a result: {min(unknown)[:40]!r})")
    return Report(**{f.name: getattr(report, f.name) for f in fields(Report)} | {"models": read})
