"""Error rates and costs of scored trials. All are functions of a `Curve`, which trials of different weight give too."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from spkd.errors import UsageError


@dataclass(frozen=True)
class Curve:
    """Miss and false-alarm rates at every distinct threshold (accepting scores >= it), from +inf downwards.

    Attributes:
        threshold: (K,) falling.
        miss: (K,) falling from 1 to 0.
        false_alarm: (K,) rising from 0 to 1.
    """

    threshold: np.ndarray
    miss: np.ndarray
    false_alarm: np.ndarray


@dataclass(frozen=True)
class Ranking:
    """Trials in the order of falling scores, from which curves follow.

    Attributes:
        order: (N,) of trials.
        hit: (N,) whether the trial at each place is a target.
        last: (K,) places of the last of each run of equal scores: tied scores are accepted together.
        threshold: (K + 1,) of the curve.
    """

    order: np.ndarray
    hit: np.ndarray
    last: np.ndarray
    threshold: np.ndarray

    @classmethod
    def of(cls, scores: np.ndarray, labels: np.ndarray) -> Ranking:
        """Of scores (N,) under labels (N,), 1 target and 0 non-target.

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
        """The curve of the trials, each counted once, or with a weight (N,).

        Raises:
            ValueError: the weights leave no target or no non-target trials.
        """
        ordered = np.ones(len(self.hit)) if weight is None else weight[self.order]
        starts = np.concatenate([[0], self.last[:-1] + 1])
        masses = np.add.reduceat(ordered, starts)
        hits = np.add.reduceat(np.where(self.hit, ordered, 0.0), starts)
        hits, others = np.cumsum(hits), np.cumsum(masses - hits)
        if not hits[-1] or not others[-1]:
            raise ValueError("error rates need both target and non-target trials")
        miss, false_alarm = 1.0 - hits / hits[-1], others / others[-1]
        return Curve(self.threshold, np.concatenate([[1.0], miss]), np.concatenate([[0.0], false_alarm]))

    def coarser(self, most: int) -> Ranking:
        """The same trials with at most so many operating points, evenly spread over them."""
        if len(self.last) <= most:
            return self
        kept = np.unique(np.linspace(0, len(self.last) - 1, most).astype(np.int64))
        return replace(self, last=self.last[kept], threshold=self.threshold[np.concatenate([[0], kept + 1])])

    def in_order(self) -> Ranking:
        """The ranking of the trials once they are in its own order."""
        return replace(self, order=np.arange(len(self.order)))


def curve(scores: np.ndarray, labels: np.ndarray) -> Curve:
    """The detection-error trade-off of scores (N,) under labels (N,); raises as `Ranking.of`."""
    return Ranking.of(scores, labels).curve()


def eer(at: Curve) -> tuple[float, float]:
    """Equal error rate and its threshold.

    Where miss and false alarm cross between two operating points, both are interpolated linearly between them.
    """
    after = int(np.argmax(at.false_alarm >= at.miss))
    gap_before = at.miss[after - 1] - at.false_alarm[after - 1]
    gap_after = at.miss[after] - at.false_alarm[after]
    weight = gap_before / (gap_before - gap_after)
    rate = at.miss[after - 1] + weight * (at.miss[after] - at.miss[after - 1])
    return float(rate), float(at.threshold[after])


@dataclass(frozen=True)
class Point:
    """An operating point: the prior of a target trial, and what both errors cost."""

    p_target: float
    c_miss: float = 1.0
    c_false_alarm: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Point:
        """`0.01`, or `0.01:10:1` with both costs. Raises UsageError for anything else."""
        try:
            values = [float(part) for part in text.split(":")]
        except ValueError:
            values = []
        if len(values) not in (1, 3) or not 0 < values[0] < 1 or any(not 0 < cost < 1e9 for cost in values[1:]):
            raise UsageError(
                f"points: {text!r} is not P_TARGET or P_TARGET:C_MISS:C_FALSE_ALARM, such as 0.01 or 0.01:10:1"
            )
        return cls(*values)

    @property
    def name(self) -> str:
        costs = "" if self.c_miss == self.c_false_alarm == 1 else f":{self.c_miss:g}:{self.c_false_alarm:g}"
        return f"{self.p_target:g}{costs}"

    @property
    def threshold(self) -> float:
        """Log-likelihood ratio from which accepting costs less."""
        return float(np.log(self.c_false_alarm * (1 - self.p_target)) - np.log(self.c_miss * self.p_target))

    def cost(self, at: Curve) -> np.ndarray:
        """Detection cost (K,) at every threshold, divided by that of the better blind decision (NIST SRE 2010 on)."""
        miss, false_alarm = self.c_miss * self.p_target, self.c_false_alarm * (1.0 - self.p_target)
        return (miss * at.miss + false_alarm * at.false_alarm) / min(miss, false_alarm)


def min_dcf(at: Curve, point: Point) -> tuple[float, float]:
    """Least detection cost over thresholds, and its threshold."""
    cost = point.cost(at)
    best = int(np.argmin(cost))
    return float(cost[best]), float(at.threshold[best])


def act_dcf(at: Curve, point: Point) -> float:
    """Detection cost of the Bayes decisions of scores that are log-likelihood ratios."""
    return float(point.cost(at)[_accepted_from(at, point.threshold)])


def miss_at(at: Curve, false_alarm: float) -> tuple[float, float]:
    """Miss rate and threshold at the lowest threshold whose false-alarm rate is at most this."""
    place = int(np.searchsorted(at.false_alarm, false_alarm, "right")) - 1
    return float(at.miss[place]), float(at.threshold[place])


def threshold_at(at: Curve, false_alarm: float) -> float:
    """Threshold whose false-alarm rate on other trials is expected to be this.

    The k-th highest of N non-target scores is exceeded by a share k / (N + 1) of others on average; in between, scores
    are interpolated. The lowest threshold that lets k of these very trials pass lies just above the next score, and
    lets a share (k + 1) / (N + 1) of others pass. Below a rate of 1 / N there is no more than that of `miss_at`.
    """
    steps = np.flatnonzero(np.diff(at.false_alarm) > 0) + 1
    if false_alarm < at.false_alarm[steps[0]]:
        return miss_at(at, false_alarm)[1]
    return float(np.interp(false_alarm, at.false_alarm[steps], at.threshold[steps]))


def _accepted_from(at: Curve, threshold: float) -> int:
    """Place of the lowest threshold of the curve that is not below this one."""
    return int(np.searchsorted(-at.threshold, -threshold, "right")) - 1


def cllr(at: Curve) -> float:
    """Cost of scores as log-likelihood ratios, in bits (Brümmer and du Preez, Computer Speech and Language 2006)."""
    target, other, ratio = -np.diff(at.miss), np.diff(at.false_alarm), at.threshold[1:]
    bits = target @ np.logaddexp(0, -ratio) + other @ np.logaddexp(0, ratio)
    return float(bits / (2 * np.log(2)))


def min_cllr(at: Curve) -> float:
    """Cllr (bits) of the best monotone map of the scores to log-likelihood ratios: pool adjacent violators."""
    from scipy.optimize import isotonic_regression

    target, other = -np.diff(at.miss)[::-1], np.diff(at.false_alarm)[::-1]  # by rising score
    mass = target + other
    kept = mass > 0
    target, other, mass = target[kept], other[kept], mass[kept]
    posterior = isotonic_regression(target / mass, weights=mass).x
    with np.errstate(divide="ignore", invalid="ignore"):  # 0 log 0 = 0
        bits = np.where(target > 0, -target * np.log2(posterior), 0) + np.where(
            other > 0, -other * np.log2(1 - posterior), 0
        )
    return float(bits.sum() / 2)


@dataclass(frozen=True)
class MetricDescription:
    """A metric as reports hold it, and the only formatter of its values.

    Attributes:
        key: of its value in report.json.
        label: for people.
        decimals: shown.
        unit: shown after the number.
        meaning: its definition in a sentence; "" where the label says it.
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
        """The label with its unit, for the head of a column: `EER (%)`."""
        return f"{self.label} ({self.unit.strip()})" if self.unit else self.label

    def format(self, value: float, with_unit: bool = True) -> str:
        """The value as people read it."""
        return f"{value:.{self.decimals}f}{self.unit if with_unit else ''}"

    def format_interval(self, limits: tuple[float, float]) -> str:
        """A confidence interval as people read it."""
        return " to ".join(self.format(limit, with_unit=False) for limit in limits)


@dataclass(frozen=True)
class Metric:
    """One number of an evaluation; JSON, report, printed line and demo show what `metrics_of` lists.

    Attributes:
        key: in report.json.
        label: for people.
        compute: from the curve.
        decimals: shown.
        unit: shown after the number.
        headline: whether it is in the line that `spkd eval` prints.
        interval: whether a confidence interval is computed.
        most: its largest possible value.
        meaning: its definition in a sentence.
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
        lambda at: 100 * eer(at)[0],
        3,
        " %",
        headline=True,
        most=100.0,
        meaning="where miss and false-alarm rate are equal, interpolated linearly between the points around it",
    ),
    Metric("eer_threshold", "threshold at the EER", lambda at: eer(at)[1], 4, interval=False),
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
    points: Sequence[Point] = DEFAULT_POINTS, false_alarms: Sequence[float] = (), llr: bool = False
) -> tuple[Metric, ...]:
    """The metrics of an evaluation.

    Args:
        points: of minDCF. false_alarms: rates at which the miss rate and the threshold are given.
        llr: whether the scores are log-likelihood ratios, so that actDCF and Cllr mean something.
    """
    found = [*METRICS, *(LLR_METRICS if llr else ())]
    for number, point in enumerate(points):
        found += _of_point(point, llr, headline=number < 2)
    for rate in false_alarms:
        text, missed = f"a false-alarm rate of {100 * rate:g} %", partial(_percent_missed, rate)
        at, meaning = partial(_threshold_at, rate), "at which that rate is expected on other trials"
        found += [
            Metric(f"miss_percent_at_fa_{rate:g}", f"miss at {text}", missed, 3, " %", most=100.0),
            Metric(f"threshold_at_fa_{rate:g}", f"threshold at {text}", at, 4, interval=False, meaning=meaning),
        ]
    return tuple(found)


def _of_point(point: Point, llr: bool, headline: bool) -> list[Metric]:
    name, least, at = point.name, partial(_first, min_dcf, point), partial(_second, min_dcf, point)
    costs = f"p_target = {point.p_target:g}, C_miss = {point.c_miss:g}, C_fa = {point.c_false_alarm:g}"
    meaning = f"least detection cost at {costs}, over the cost of the better blind decision"
    found = [
        Metric(f"min_dcf_{name}", f"minDCF({name})", least, 4, headline=headline, meaning=meaning),
        Metric(f"min_dcf_threshold_{name}", f"threshold at minDCF({name})", at, 4, interval=False),
    ]
    if llr:
        meaning = f"the same cost at the Bayes threshold {point.threshold:.3f}, which no trial was used to choose"
        act = partial(act_dcf, point=point)
        found.append(Metric(f"act_dcf_{name}", f"actDCF({name})", act, 4, most=np.inf, meaning=meaning))
    return found


def _first(function: Callable[..., tuple[float, float]], argument: object, at: Curve) -> float:
    return function(at, argument)[0]


def _second(function: Callable[..., tuple[float, float]], argument: object, at: Curve) -> float:
    return function(at, argument)[1]


def _threshold_at(rate: float, at: Curve) -> float:
    return threshold_at(at, rate)


def _percent_missed(rate: float, at: Curve) -> float:
    return 100 * miss_at(at, rate)[0]


def next_above(score: float) -> float:
    """The finite number next above a score."""
    return min(math.nextafter(score, math.inf), sys.float_info.max)


def compute(at: Curve, metrics: Sequence[Metric]) -> dict[str, float]:
    """Every metric by key. A threshold that accepts nothing is the number next above the highest score."""
    above = next_above(float(at.threshold[1]))
    values = ((metric.key, metric.compute(at)) for metric in metrics)
    return {key: above if value == np.inf else value for key, value in values}
