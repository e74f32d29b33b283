"""Error rates and costs of scored trials. All are functions of a `Curve`, whose trials may have different weights."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from spkd.errors import UsageError, bracketed
from spkd.files.text import finite_number


@dataclass(frozen=True)
class Curve:
    """Miss and false-alarm rates at every distinct threshold, from +inf downwards; scores >= threshold are accepted.

    Attributes:
        threshold: (K,) thresholds, falling.
        miss: (K,) miss rates, falling from 1 to 0.
        false_alarm: (K,) false-alarm rates, rising from 0 to 1.
    """

    threshold: np.ndarray
    miss: np.ndarray
    false_alarm: np.ndarray


@dataclass(frozen=True)
class Ranking:
    """Trials in the order of falling scores, from which curves are computed.

    Attributes:
        order: (N,) indices of the trials in this order.
        hit: (N,) whether the trial at each place of this order is a target.
        last: (K,) place of the last trial of each run of equal scores: tied scores are accepted together.
        threshold: (K + 1,) thresholds of the curve.
    """

    order: np.ndarray
    hit: np.ndarray
    last: np.ndarray
    threshold: np.ndarray

    @classmethod
    def of(cls, scores: np.ndarray, labels: np.ndarray) -> Ranking:
        """Ranking of trials.

        Args:
            scores: (N,) scores.
            labels: (N,) 1 target, 0 non-target.
        Raises:
            ValueError: no target or no non-target trials, or scores that are not finite.
        """
        if wrong := int((~np.isfinite(scores)).sum()):
            raise ValueError(f"{wrong} of {len(scores)} scores are not finite")
        if not 0 < int(labels.sum()) < len(labels):
            raise ValueError("error rates need both target and non-target trials")
        order = np.argsort(-scores, kind="stable")
        falling = scores[order]
        last = np.flatnonzero(np.append(falling[:-1] != falling[1:], True))
        return cls(order, labels[order].astype(bool), last, np.concatenate([[np.inf], falling[last]]))

    def curve(self, weight: np.ndarray | None = None) -> Curve:
        """Curve of the trials.

        Args:
            weight: (N,) weight of each trial; None: all are 1.
        Raises:
            ValueError: the weights leave no target or no non-target trials.
        """
        ordered = np.ones(len(self.hit)) if weight is None else weight[self.order]
        starts = np.concatenate([[0], self.last[:-1] + 1])
        masses = np.add.reduceat(ordered, starts)
        hits = np.add.reduceat(np.where(self.hit, ordered, 0.0), starts)
        hits, false_alarms = np.cumsum(hits), np.cumsum(masses - hits)
        if not hits[-1] or not false_alarms[-1]:
            raise ValueError("error rates need both target and non-target trials")
        miss, false_alarm = 1.0 - hits / hits[-1], false_alarms / false_alarms[-1]
        return Curve(self.threshold, np.concatenate([[1.0], miss]), np.concatenate([[0.0], false_alarm]))

    def coarser(self, most: int) -> Ranking:
        """Ranking of the same trials with at most `most` operating points, evenly spread."""
        if len(self.last) <= most:
            return self
        kept = np.unique(np.linspace(0, len(self.last) - 1, most).astype(np.int64))
        return replace(self, last=self.last[kept], threshold=self.threshold[np.concatenate([[0], kept + 1])])

    def in_order(self) -> Ranking:
        """Ranking of the same trials after they are sorted in this order."""
        return replace(self, order=np.arange(len(self.order)))


def curve(scores: np.ndarray, labels: np.ndarray) -> Curve:
    """Detection-error trade-off of scores (N,) with labels (N,). Raises as `Ranking.of`."""
    return Ranking.of(scores, labels).curve()


def eer(errors: Curve) -> tuple[float, float]:
    """Equal error rate and its threshold.

    Where miss and false alarm cross between two operating points, both are interpolated linearly between them.
    """
    after = int(np.argmax(errors.false_alarm >= errors.miss))
    gap_before = errors.miss[after - 1] - errors.false_alarm[after - 1]
    gap_after = errors.miss[after] - errors.false_alarm[after]
    weight = gap_before / (gap_before - gap_after)
    rate = errors.miss[after - 1] + weight * (errors.miss[after] - errors.miss[after - 1])
    return float(rate), float(errors.threshold[after])


@dataclass(frozen=True)
class Point:
    """Operating point: the prior of a target trial, and the costs of both errors."""

    p_target: float
    c_miss: float = 1.0
    c_false_alarm: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Point:
        """Read a point: `0.01`, or `0.01:10:1` with both costs. Raises UsageError for anything else."""
        values = [number for part in text.split(":") if (number := finite_number(part)) is not None]
        wrong = len(values) != text.count(":") + 1 or len(values) not in (1, 3)
        if wrong or not 0 < values[0] < 1 or any(not 0 < cost < 1e9 for cost in values[1:]):
            raise UsageError(
                f"points: {text!r} is not P_TARGET or P_TARGET:C_MISS:C_FALSE_ALARM, such as 0.01 or 0.01:10:1"
                f"{bracketed('points', text)}"
            )
        return cls(*values)

    @property
    def name(self) -> str:
        costs = "" if self.c_miss == self.c_false_alarm == 1 else f":{self.c_miss:g}:{self.c_false_alarm:g}"
        return f"{self.p_target:g}{costs}"

    @property
    def threshold(self) -> float:
        """Bayes threshold: log-likelihood ratio above which accepting has the lower expected cost."""
        return float(np.log(self.c_false_alarm * (1 - self.p_target)) - np.log(self.c_miss * self.p_target))

    def cost(self, errors: Curve) -> np.ndarray:
        """Detection cost (K,) at every threshold, over that of the better decision without scores (as NIST SRE)."""
        miss, false_alarm = self.c_miss * self.p_target, self.c_false_alarm * (1.0 - self.p_target)
        return (miss * errors.miss + false_alarm * errors.false_alarm) / min(miss, false_alarm)


def min_dcf(errors: Curve, point: Point) -> tuple[float, float]:
    """Minimum detection cost over all thresholds, and its threshold."""
    cost = point.cost(errors)
    best = int(np.argmin(cost))
    return float(cost[best]), float(errors.threshold[best])


def act_dcf(errors: Curve, point: Point) -> float:
    """Detection cost at the Bayes threshold, for scores that are log-likelihood ratios."""
    return float(point.cost(errors)[_accepted_from(errors, point.threshold)])


def miss_at(errors: Curve, false_alarm: float) -> tuple[float, float]:
    """Miss rate and threshold, at the lowest threshold with at most this false-alarm rate."""
    place = int(np.searchsorted(errors.false_alarm, false_alarm, "right")) - 1
    return float(errors.miss[place]), float(errors.threshold[place])


def threshold_at(errors: Curve, false_alarm: float) -> float:
    """Threshold whose expected false-alarm rate on other trials is `false_alarm`.

    On average, a fraction k / (N + 1) of other non-target scores exceeds the k-th highest of N; between the scores, the
    threshold is interpolated. (The lowest threshold that accepts k of these trials lies just above the next score, and
    accepts a fraction (k + 1) / (N + 1) of others.) For rates below 1 / N the threshold is that of `miss_at`.
    """
    steps = np.flatnonzero(np.diff(errors.false_alarm) > 0) + 1
    if false_alarm < errors.false_alarm[steps[0]]:
        return miss_at(errors, false_alarm)[1]
    return float(np.interp(false_alarm, errors.false_alarm[steps], errors.threshold[steps]))


def least_non_targets(rate: float) -> float:
    """Least number of non-target trials on which the threshold of a false-alarm rate is given."""
    return math.ceil(round(LEAST_FALSE_ALARMS / rate, 6)) if rate else math.inf


def _accepted_from(errors: Curve, threshold: float) -> int:
    """Place of the curve's lowest threshold that is not below `threshold`."""
    return int(np.searchsorted(-errors.threshold, -threshold, "right")) - 1


def cllr(errors: Curve) -> float:
    """Cost of scores as log-likelihood ratios, in bits (Brümmer and du Preez, Computer Speech and Language 2006)."""
    target_mass, non_target_mass, ratio = -np.diff(errors.miss), np.diff(errors.false_alarm), errors.threshold[1:]
    bits = target_mass @ np.logaddexp(0, -ratio) + non_target_mass @ np.logaddexp(0, ratio)
    return float(bits / (2 * np.log(2)))


def min_cllr(errors: Curve) -> float:
    """Cllr (bits) of the best monotone map of the scores to log-likelihood ratios: pool adjacent violators."""
    from scipy.optimize import isotonic_regression

    target_mass, non_target_mass = -np.diff(errors.miss)[::-1], np.diff(errors.false_alarm)[::-1]  # by rising score
    mass = target_mass + non_target_mass
    kept = mass > 0
    target_mass, non_target_mass, mass = target_mass[kept], non_target_mass[kept], mass[kept]
    posterior = isotonic_regression(target_mass / mass, weights=mass).x
    with np.errstate(divide="ignore", invalid="ignore"):  # 0 log 0 = 0
        bits = np.where(target_mass > 0, -target_mass * np.log2(posterior), 0) + np.where(
            non_target_mass > 0, -non_target_mass * np.log2(1 - posterior), 0
        )
    return float(bits.sum() / 2)


ROUNDING = 1e-9
LEAST_FALSE_ALARMS = 10  # expected on the list at a rate: with fewer, its threshold is too uncertain


@dataclass(frozen=True)
class MetricDescription:
    """Description of a metric in reports; all formatting of values is done here.

    Attributes:
        meaning: definition in a sentence; "" where the label suffices.
        headline: whether it is in the line that `spkd eval` prints, and in tables.
    """

    key: str
    label: str
    decimals: int = field(metadata={"low": 0, "high": 12})
    unit: str
    meaning: str
    headline: bool

    @property
    def title(self) -> str:
        """Label with its unit, for the head of a column: `EER (%)`."""
        return f"{self.label} ({self.unit.strip()})" if self.unit else self.label

    @property
    def limits(self) -> tuple[float, float]:
        """Least and largest possible value, but for rounding: thresholds are any numbers, others rates or costs."""
        if "threshold" in self.key:
            return -math.inf, math.inf
        return -ROUNDING, 100 + ROUNDING if self.unit == " %" else math.inf

    def format(self, value: float, with_unit: bool = True) -> str:
        """Value formatted for people."""
        return f"{value:.{self.decimals}f}{self.unit if with_unit else ''}"

    def format_interval(self, limits: tuple[float, float]) -> str:
        """Confidence interval formatted for people."""
        return " to ".join(self.format(limit, with_unit=False) for limit in limits)


@dataclass(frozen=True)
class Metric:
    """Metric of an evaluation. JSON, report, printed line and demo show the metrics that `metrics_of` gives.

    Attributes:
        key: key in report.json.
        compute: function from the curve to the value.
        unit: unit shown after the number.
        headline: whether it is in the line that `spkd eval` prints.
        interval: whether a confidence interval is computed.
        most: largest possible value.
        meaning: definition in a sentence.
    """

    key: str
    label: str
    compute: Callable[[Curve], float]
    decimals: int
    unit: str = ""
    headline: bool = False
    interval: bool = True
    most: float = 1.0
    meaning: str = ""

    @property
    def description(self) -> MetricDescription:
        return MetricDescription(self.key, self.label, self.decimals, self.unit, self.meaning, self.headline)


METRICS = (
    Metric(
        "eer_percent",
        "EER",
        lambda errors: 100 * eer(errors)[0],
        3,
        " %",
        headline=True,
        most=100.0,
        meaning="where miss and false-alarm rate are equal, interpolated linearly between the points around it",
    ),
    Metric("eer_threshold", "threshold at the EER", lambda errors: eer(errors)[1], 4, interval=False),
    Metric(
        "min_cllr",
        "min Cllr",
        min_cllr,
        4,
        " bits",
        meaning="Cllr after the best monotone calibration on these very trials (pool adjacent violators)",
    ),
)
LLR_METRICS = (
    Metric(
        "cllr",
        "Cllr",
        cllr,
        4,
        " bits",
        most=np.inf,
        meaning="cost of the scores as log-likelihood ratios; 1 is what no score is worth",
    ),
)
DEFAULT_POINTS = (Point(0.01), Point(0.05))


def metrics_of(
    points: Sequence[Point] = DEFAULT_POINTS,
    false_alarms: Sequence[float] = (),
    llr: bool = False,
    non_targets: float = math.inf,
) -> tuple[Metric, ...]:
    """Metrics of an evaluation.

    Args:
        false_alarms: false-alarm rates at which the miss rate and the threshold are given.
        llr: whether the scores are log-likelihood ratios, for which actDCF and Cllr are defined.
        non_targets: number of non-target trials; the thresholds that so few of them do not tell are left out.
    """
    metrics = [*METRICS, *(LLR_METRICS if llr else ())]
    for number, point in enumerate(points):
        metrics += _of_point(point, llr, headline=number < 2)
    for rate in false_alarms:
        text, missed = f"a false-alarm rate of {100 * rate:g} %", partial(_percent_missed, rate)
        threshold, meaning = partial(threshold_at, false_alarm=rate), "at which that rate is expected on other trials"
        metrics.append(Metric(f"miss_percent_at_fa_{rate:g}", f"miss at {text}", missed, 3, " %", most=100.0))
        if non_targets >= least_non_targets(rate):
            key, label = f"threshold_at_fa_{rate:g}", f"threshold at {text}"
            metrics.append(Metric(key, label, threshold, 4, interval=False, meaning=meaning))
    return tuple(metrics)


def _of_point(point: Point, llr: bool, headline: bool) -> list[Metric]:
    name, least, threshold_of = point.name, partial(_first, min_dcf, point), partial(_second, min_dcf, point)
    costs = f"p_target = {point.p_target:g}, C_miss = {point.c_miss:g}, C_fa = {point.c_false_alarm:g}"
    meaning = f"least detection cost at {costs}, over the cost of the better blind decision"
    metrics = [
        Metric(f"min_dcf_{name}", f"minDCF({name})", least, 4, headline=headline, meaning=meaning),
        Metric(f"min_dcf_threshold_{name}", f"threshold at minDCF({name})", threshold_of, 4, interval=False),
    ]
    if llr:
        meaning = f"the same cost at the Bayes threshold {point.threshold:.3f}, which no trial was used to choose"
        act = partial(act_dcf, point=point)
        metrics.append(Metric(f"act_dcf_{name}", f"actDCF({name})", act, 4, most=np.inf, meaning=meaning))
    return metrics


def _first(function: Callable[..., tuple[float, float]], argument: object, errors: Curve) -> float:
    return function(errors, argument)[0]


def _second(function: Callable[..., tuple[float, float]], argument: object, errors: Curve) -> float:
    return function(errors, argument)[1]


def _percent_missed(rate: float, errors: Curve) -> float:
    return 100 * miss_at(errors, rate)[0]


def next_above(score: float) -> float:
    """Smallest finite number above a score."""
    return min(math.nextafter(score, math.inf), sys.float_info.max)


def compute(errors: Curve, metrics: Sequence[Metric]) -> dict[str, float]:
    """Values of metrics by key. A threshold that accepts nothing is the number next above the highest score."""
    above = next_above(float(errors.threshold[1]))
    values = ((metric.key, metric.compute(errors)) for metric in metrics)
    return {key: above if value == np.inf else value for key, value in values}
