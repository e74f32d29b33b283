"""Logistic calibration and fusion: scores and quality measures to log-likelihood ratios.

Trained by prior-weighted logistic regression (Brümmer and du Preez, Computer Speech and Language 2006) on a list whose
speakers must not be those that are tested.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from spkd.errors import SpkdError, UsageError
from spkd.files.atomic import read_json, write_json
from spkd.files.schema import record

FORMAT = 1
FILE = "calibration.json"
RIDGE = 1e-6  # of standardised weights: bounds them where the list can be separated
ITERATIONS, TOLERANCE = 100, 1e-12
SCORE = "score"
# How a system describes the cosines of embeddings as they are: what two recordings alone give.
PLAIN = (
    "Nothing is subtracted from the embeddings.",
    "Embeddings are of whole utterances, each computed once, and divided by their length.",
    "A score is the cosine of two embeddings.",
)


@dataclass(frozen=True)
class System:
    """What gives the scores that a calibration takes.

    Attributes:
        models: SHA-256 of the weights of the models of both sides; () for scores from files.
        scores: how many scores each trial has.
        how: of the scores, in sentences.
    """

    models: tuple[str, ...]
    scores: int = field(metadata={"low": 1, "high": 1000})
    how: tuple[str, ...]


@dataclass(frozen=True)
class TrainedOn:
    """The list on which a calibration was trained.

    Attributes:
        trials: the file. sha256: of it.
        targets, non_targets: how many trials.
        speakers: their names.
    """

    trials: str
    sha256: str
    targets: int
    non_targets: int
    speakers: tuple[str, ...]


@dataclass(frozen=True)
class Calibration:
    """An affine map of scores and quality measures to log-likelihood ratios (natural logarithm).

    Attributes:
        features: what is weighted: `score`, or `score.1` and so on of several systems, and quality measures.
        weights: of them. offset: added.
        p_target: the prior for which it was trained.
        system: that gives the scores.
        trained_on: the list.
        thresholds: by name, log-likelihood ratios: of the EER, of minDCF, of false-alarm rates on that list.
        results: metrics on that list, calibrated.
    """

    features: tuple[str, ...]
    weights: tuple[float, ...]
    offset: float
    p_target: float
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
        """Its quality measures."""
        return tuple(dict.fromkeys(n.partition(".")[0] for n in self.features if not n.startswith(SCORE)))

    def check(self, system: System, speakers: Iterable[str], trials_sha256: str, source: str) -> None:
        """Raises SpkdError where it was trained on another system's scores, or on the list or the speakers that are
        tested."""
        for name in ("models", "scores", "how"):
            ours, theirs = getattr(system, name), getattr(self.system, name)
            if ours != theirs:
                raise SpkdError(
                    f"{source}: trained on the scores of another system ({name}: {str(theirs)[:200]}; here "
                    f"{str(ours)[:200]})"
                )
        if shared := sorted(set(self.trained_on.speakers) & set(speakers)):
            raise SpkdError(
                f"{source}: trained on {self.trained_on.trials}, {len(shared)} of whose speakers are tested here "
                f"({', '.join(shared[:3])}{', ...' if len(shared) > 3 else ''}); calibrate on other speakers"
            )
        # Without a manifest the speakers of score files may be unknown.
        if trials_sha256 == self.trained_on.sha256:
            raise SpkdError(f"{source}: trained on this very list; calibrate on other speakers")

    def save(self, path: Path) -> None:
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Raises UsageError: no such file. SpkdError: damaged, or of a newer format."""
        path = Path(path)
        if not path.is_file():
            raise UsageError(f"no calibration {path}; make one with `spkd calibrate`")
        return cls.from_json(read_json(path), str(path))

    @classmethod
    def of_student(cls, path: Path, weights_sha256: str) -> Calibration:
        """The calibration of the cosines of a student's embeddings.

        Args:
            weights_sha256: of the student's file of weights.
        Raises:
            UsageError: no such file, or it takes more than cosines. SpkdError: damaged, or of other weights.
        """
        found = cls.load(path)
        if found.features != (SCORE,) or found.system.how != PLAIN:
            raise UsageError(f"{path}: takes more than the cosine of two embeddings, so it cannot go with a model")
        if found.system.models != (weights_sha256,):
            raise SpkdError(f"{path}: of other weights than the student's; run `spkd calibrate` again")
        return found

    @classmethod
    def from_json(cls, tree: Any, where: str) -> Calibration:
        """Raises SpkdError where it is none."""
        if not isinstance(tree, dict) or tree.get("spkd_calibration") != FORMAT:
            raise SpkdError(f"{where}: not a calibration of format {FORMAT}")
        found = record(cls, {name: value for name, value in tree.items() if name != "spkd_calibration"}, where)
        if len(found.features) != len(found.weights):
            raise SpkdError(f"{where}: damaged ({len(found.features)} features, {len(found.weights)} weights)")
        return found

    def to_json(self) -> dict[str, Any]:
        return {"spkd_calibration": FORMAT, **asdict(self)}


def fit(columns: Sequence[np.ndarray], labels: np.ndarray, p_target: float) -> tuple[np.ndarray, float]:
    """Weights (F,) and offset of log-likelihood ratios, by Newton's method.

    They minimise p/T sum log(1 + exp(-l - logit p)) over T targets plus (1 - p)/N sum log(1 + exp(l + logit p)) over N
    non-targets, l being the log-likelihood ratio of a trial and p = p_target.

    Args:
        columns: F arrays (N,). labels: (N,) 1 target, 0 non-target.
    Raises:
        ValueError: no target or no non-target trials.
    """
    values = np.stack(columns, 1).astype(np.float64)
    targets = labels.astype(bool)
    if not 0 < targets.sum() < len(targets):
        raise ValueError("a calibration needs both target and non-target trials")
    centre, scale = values.mean(0), np.maximum(values.std(0), 1e-12)
    design = np.hstack([(values - centre) / scale, np.ones((len(values), 1))])
    share = np.where(targets, p_target / targets.sum(), (1 - p_target) / (~targets).sum())
    prior = np.log(p_target) - np.log1p(-p_target)
    ridge = np.append(np.full(values.shape[1], RIDGE), 0.0)
    theta = np.zeros(design.shape[1])

    def objective(at: np.ndarray) -> float:
        signed = np.where(targets, -1.0, 1.0) * (design @ at + prior)
        return float(share @ np.logaddexp(0, signed) + 0.5 * ridge @ at**2)

    value = objective(theta)
    for _ in range(ITERATIONS):
        posterior = 1 / (1 + np.exp(-np.clip(design @ theta + prior, -700, 700)))
        gradient = design.T @ (share * (posterior - targets)) + ridge * theta
        curvature = (design * (share * posterior * (1 - posterior))[:, None]).T @ design + np.diag(ridge + 1e-15)
        step, length = np.linalg.solve(curvature, gradient), 1.0
        while (reached := objective(theta - length * step)) > value and length > 1e-10:
            length /= 2
        gain, theta, value = value - reached, theta - length * step, reached
        if gain <= TOLERANCE * abs(value):
            break
    weights = theta[:-1] / scale
    return weights, float(theta[-1] - weights @ centre)


def score_names(count: int) -> list[str]:
    """Names of the scores of so many systems."""
    return [SCORE] if count == 1 else [f"{SCORE}.{number}" for number in range(1, count + 1)]
