"""Logistic calibration and fusion: scores and quality measures to log-likelihood ratios.

Trained by prior-weighted logistic regression (Brümmer and du Preez, Computer Speech and Language 2006) on a list whose
speakers must not be those that are tested.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from spkd.corpus.people import Names
from spkd.errors import SpkdError, UsageError, first_few
from spkd.eval.metrics import least_non_targets
from spkd.eval.settings import ENROLMENTS, QUALITY
from spkd.files.atomic import write_json
from spkd.files.reading import read_json
from spkd.files.schema import record
from spkd.files.sealed import Format
from spkd.mapping.embedding_map import EmbeddingMap

FORMAT = Format(
    "spkd_calibration", 1, "a calibration", "make one with `spkd calibrate TRIALS model=MODEL manifest=FILE`"
)
FILE = "calibration.json"
RIDGE = 1e-6  # penalty of standardised weights: it bounds them where a threshold separates the list without errors
TOLERANCE = 1e-13  # tolerance of the gradient
LARGEST = 1e100  # largest value: its square is finite
SCORE = "score"
FALSE_ALARMS = (0.1, 0.05, 0.01, 0.001)  # rates whose thresholds a calibration has, where its list is long enough
# Description of plain cosines of embeddings, which need nothing but the two recordings.
PLAIN = (
    "Nothing is subtracted from the embeddings.",
    "Embeddings are of whole utterances, each computed once, and divided by their length.",
    "A score is the cosine of two embeddings.",
)
OTHER_MODEL = "Enrolment utterances are embedded by another model than test utterances."


def how_mapped(fingerprint: str) -> tuple[str, ...]:
    """Description of enrolments by another model that are mapped, in sentences.

    Args:
        fingerprint: that of the map.
    """
    return (
        OTHER_MODEL,
        f"Enrolment embeddings are mapped into the space of test embeddings by the map {fingerprint[:12]}.",
    )


def file_of(part: int | None) -> str:
    """Name of the calibration in a student's folder.

    Args:
        part: number of numbers of the embedding that are taken; None: all. Each size has a calibration of its own.
    """
    return FILE if part is None else f"calibration.{part}.json"


@dataclass(frozen=True)
class System:
    """System whose scores a calibration takes.

    Attributes:
        models: SHA-256 of the weights of the models of both sides; () for scores from files.
        scores: number of scores of each trial.
        how: description of the scores, in sentences.
        vad: what found the speech that was embedded, with its version; "" where utterances are embedded whole.
        origins: of scores from files, digest of the system of each that `spkd eval` wrote, "" for others.
    """

    models: tuple[str, ...]
    scores: int = field(metadata={"low": 1, "high": 1000})
    how: tuple[str, ...]
    vad: str = ""
    origins: tuple[str, ...] = ()

    @property
    def steps(self) -> tuple[str, ...]:
        """Each step from audio to scores, in sentences."""
        speech = (
            f"Silence is left out: the speech of an utterance, found by vad={self.vad}, is joined and stands for it."
        )
        return (speech, *self.how) if self.vad else self.how


@dataclass(frozen=True)
class TrainedOn:
    """List on which a calibration was trained.

    Attributes:
        utterances: digests of the names of the utterances.
    """

    trials: str
    sha256: str
    targets: int = field(metadata={"low": 0})
    non_targets: int = field(metadata={"low": 0})
    speakers: tuple[str, ...]
    utterances: Names = Names(0)


@dataclass(frozen=True)
class Calibration:
    """Affine map of scores and quality measures to log-likelihood ratios (natural logarithm).

    Attributes:
        features: names of the weighted values: `score`, or `score.1` and so on of several systems, and quality
            measures.
        weights: one per feature.
        offset: added to the sum.
        p_target: prior of a target trial for which it was trained.
        thresholds: thresholds by name, as log-likelihood ratios: of the EER, of minDCF, of false-alarm rates on that
            list.
        results: metrics of the calibrated scores on that list.
    """

    features: tuple[str, ...]
    weights: tuple[float, ...]
    offset: float
    p_target: float = field(metadata={"low": 1e-6, "high": 0.999999})
    system: System
    trained_on: TrainedOn
    thresholds: dict[str, float]
    results: dict[str, float]

    def __call__(self, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        """Log-likelihood ratios (N,) from the features' columns (N,)."""
        ratios = np.full(len(next(iter(columns.values()))), self.offset)
        for name, weight in zip(self.features, self.weights, strict=True):
            ratios += weight * columns[name]
        return ratios

    @property
    def quality(self) -> tuple[str, ...]:
        """Names of its quality measures."""
        return tuple(dict.fromkeys(n.partition(".")[0] for n in self.features if not n.startswith(SCORE)))

    @property
    def names_speakers(self) -> bool:
        """Whether it holds the names of the speakers that it was trained on, unlike `public` ones."""
        return len(self.trained_on.speakers) > 0

    def lines(self) -> Iterator[str]:
        """Weights, the cost on the training list and the thresholds that are kept, formatted for people."""
        weights = ", ".join(f"{name} {weight:.4g}" for name, weight in zip(self.features, self.weights, strict=True))
        yield f"{weights}, offset {self.offset:.4g}; Cllr {self.results['cllr']:.4f} bits on this list"
        thresholds = ", ".join(f"{name} {value:.4g}" for name, value in self.thresholds.items())
        yield f"thresholds of the log-likelihood ratio: {thresholds}"

    def lacks(self, threshold: str) -> str:
        """Reason for which a threshold of that name was not kept, as the end of an error; "" where there is none."""
        rate = next((rate for rate in FALSE_ALARMS if threshold == f"false_alarm_{rate:g}"), None)
        if rate is None or threshold in self.thresholds:
            return ""
        return (
            f"; {threshold} takes at least {least_non_targets(rate):,} non-target trials, and it was calibrated on "
            f"{self.trained_on.non_targets:,}: run `spkd calibrate` on a longer list"
        )

    def check(
        self, system: System, speakers: Iterable[str], utterances: Iterable[str], trials_sha256: str, source: str
    ) -> None:
        """Check that the calibration fits a system and a test.

        Raises:
            SpkdError: it was trained on another system's scores, or on the list, the speakers or the utterances that
                are tested.
        """
        for name in ("models", "scores", "how", "vad"):
            ours, trained = getattr(system, name), getattr(self.system, name)
            if ours != trained:
                if name == "how":  # the sentences that differ
                    trained, ours = (
                        " ".join(text for text in one if text not in other) or "none of that"
                        for one, other in ((trained, ours), (ours, trained))
                    )
                raise SpkdError(
                    f"{source}: trained on the scores of another system ({name}: {str(trained)[:400]}; here "
                    f"{str(ours)[:400]})"
                )
        origins = zip(system.origins, self.system.origins, strict=False)
        for number, (ours, trained) in enumerate(origins, 1):
            if ours and trained and ours != trained:
                raise SpkdError(
                    f"{source}: trained on the scores of another system (the report beside score file {number} is of "
                    "another model or back-end); give the files in the order of `spkd calibrate`"
                )
        if shared := sorted(set(self.trained_on.speakers) & set(speakers)):
            raise SpkdError(
                f"{source}: trained on {self.trained_on.trials}, {len(shared)} of whose speakers are tested here "
                f"({first_few(shared)}); calibrate on other speakers"
            )
        # Without a manifest, the speakers of score files may be unknown.
        if found := self.trained_on.utterances.shared(utterances):
            raise SpkdError(
                f"{source}: trained on {self.trained_on.trials}, {len(found)} of whose utterances are tested here "
                f"({first_few(found)}); calibrate on other speakers"
            )
        if trials_sha256 == self.trained_on.sha256:
            raise SpkdError(f"{source}: trained on this very list; calibrate on other speakers")

    def check_plain(self, source: str) -> None:
        """Check that it takes the cosine of two embeddings alone. Raises UsageError where it takes more."""
        if self.features != (SCORE,) or self.system.how != PLAIN:
            raise UsageError(f"{source}: takes more than the cosine of two embeddings, so it cannot go with a model")

    def decision(self) -> dict[str, Any]:
        """Map from the cosine of two embeddings to a log-likelihood ratio, with its thresholds, for other programs.

        Raises:
            UsageError: it takes more than the cosine.
        """
        self.check_plain("the calibration")
        weight, offset = self.weights[0], self.offset
        return {"weight": weight, "offset": offset, "vad": self.system.vad, "thresholds": self.thresholds}

    def public(self) -> Calibration:
        """The calibration without names of speakers and utterances and without the path of its list."""
        return replace(self, trained_on=replace(self.trained_on, speakers=(), utterances=Names(0), trials="its list"))

    def save(self, path: Path) -> None:
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read a calibration.

        Raises:
            UsageError: no such file.
            SpkdError: the file is damaged, or of a newer format.
        """
        path = Path(path)
        if not path.is_file():
            advice = f"spkd calibrate TRIALS model=MODEL manifest=FILE out={shlex.quote(str(path))}"
            raise UsageError(f"no calibration {path}; make one with `{advice}`")
        try:
            return cls.from_json(read_json(path), str(path))
        except SpkdError as error:
            raise SpkdError(f"{error}; it is to be a file of `spkd calibrate`") from error

    @classmethod
    def of_student(cls, path: Path, model: str, student: Path | None = None) -> Calibration:
        """Calibration of the cosines of a student's embeddings.

        Args:
            path: the file.
            model: digest of the student's weights, and of the part of the embedding that is taken.
            student: its folder, where the file is in another.

        Raises:
            UsageError: no such file, or the calibration takes more than cosines.
            SpkdError: the file is damaged, or belongs to other weights or another dimension.
        """
        calibration = cls.load(path)
        calibration.check_plain(str(path))
        if calibration.system.models != (model,):
            part = path.name.removeprefix("calibration.").removesuffix("json").rstrip(".")
            dimension = f" model.dimension={part}" if part.isdigit() else ""
            folder = str(path.parent if student is None else student)
            way = f"spkd calibrate TRIALS model={shlex.quote(folder)}{dimension} manifest=FILE"
            raise SpkdError(
                f"{path}: of other weights than the student's, or another dimension; its own is made by `{way}`"
            )
        return calibration

    @classmethod
    def of_map(cls, path: Path, the_map: EmbeddingMap) -> Calibration:
        """Calibration of the cosines of mapped enrolments with the embeddings of the new model.

        Raises:
            UsageError: no such file, or the calibration takes more than these cosines.
            SpkdError: the file is damaged, or of other models or another map.
        """
        calibration = cls.load(path)
        if calibration.features != (SCORE,) or calibration.system.how[2:] != PLAIN:
            raise UsageError(f"{path}: takes more than the cosine of a mapped and another embedding")
        weights = tuple(model.card.weights_sha256 for model in (the_map.old, the_map.new))
        if (calibration.system.models, calibration.system.how[:2]) != (weights, how_mapped(the_map.fingerprint)):
            raise SpkdError(f"{path}: of another map than the one beside it; run `spkd calibrate` with it again")
        return calibration

    @classmethod
    def from_json(cls, tree: Any, where: str) -> Calibration:
        """Read a calibration from parsed JSON. Raises SpkdError where it is not a calibration."""
        return FORMAT.open(tree, where, _checked)

    def to_json(self) -> dict[str, Any]:
        return FORMAT.seal(asdict(self))


def _checked(content: dict[str, Any], where: str) -> Calibration:
    calibration = record(Calibration, content, where)
    features, weights = calibration.features, calibration.weights
    if len(features) != len(weights):
        raise SpkdError(f"{where}: damaged ({len(features)} features, {len(weights)} weights)")
    possible = [*score_names(calibration.system.scores), *(name for quality in QUALITY for name in columns_of(quality))]
    if len(set(features)) < len(features) or not set(possible[: calibration.system.scores]) <= set(features):
        raise SpkdError(f"{where}: damaged (a feature is twice there, or a score is not)")
    if unknown := [name for name in features if name not in possible]:
        raise SpkdError(f"{where}: damaged (unknown feature {unknown[0][:40]!r})")
    if "eer" not in calibration.thresholds or "cllr" not in calibration.results:
        raise SpkdError(f"{where}: damaged (it lacks the threshold at the EER, or Cllr)")
    return calibration


def fit(columns: Sequence[np.ndarray], labels: np.ndarray, p_target: float) -> tuple[np.ndarray, float]:
    """Weights (F,) and offset of log-likelihood ratios.

    They minimise p/T sum log(1 + exp(-l - logit p)) over T targets plus (1 - p)/N sum log(1 + exp(l + logit p)) over N
    non-targets, where l is the log-likelihood ratio of a trial and p = p_target.

    Args:
        columns: F arrays (N,), one for each feature.
        labels: (N,) 1 target, 0 non-target.
        p_target: prior of a target trial.
    Raises:
        ValueError: no target or no non-target trials, or values too large for the computation.
    """
    from scipy.optimize import minimize
    from scipy.special import expit, logit

    values = np.stack(columns, 1).astype(np.float64)
    targets = labels.astype(bool)
    if not 0 < targets.sum() < len(targets):
        raise ValueError("a calibration needs both target and non-target trials")
    if not np.abs(values).max() < LARGEST:
        raise ValueError(f"a calibration takes scores and quality measures below {LARGEST:g}")
    centre, scale = values.mean(0), np.maximum(values.std(0), 1e-12)
    design = np.hstack([(values - centre) / scale, np.ones((len(values), 1))])
    share = np.where(targets, p_target / targets.sum(), (1 - p_target) / (~targets).sum())
    sign, prior = np.where(targets, -1.0, 1.0), logit(p_target)
    ridge = np.append(np.full(values.shape[1], RIDGE), 0.0)

    def cost(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        """Minimised sum, and its gradient."""
        ratios = design @ parameters + prior
        gradient = design.T @ (share * (expit(ratios) - targets)) + ridge * parameters
        return float(share @ np.logaddexp(0, sign * ratios) + 0.5 * ridge @ parameters**2), gradient

    def curvature(parameters: np.ndarray) -> np.ndarray:
        posterior = expit(design @ parameters + prior)
        return (design * (share * posterior * (1 - posterior))[:, None]).T @ design + np.diag(ridge)

    start = np.zeros(design.shape[1])
    best = minimize(cost, start, jac=True, hess=curvature, method="trust-exact", options={"gtol": TOLERANCE}).x
    weights = best[:-1] / scale
    return weights, float(best[-1] - weights @ centre)


def columns_of(quality: str) -> list[str]:
    """Names of the features of a quality measure: the lower and the higher value of both sides, where both have one."""
    return [quality] if quality == ENROLMENTS else [f"{quality}.low", f"{quality}.high"]


def score_names(count: int) -> list[str]:
    """Names of the scores of `count` systems."""
    return [SCORE] if count == 1 else [f"{SCORE}.{number}" for number in range(1, count + 1)]
