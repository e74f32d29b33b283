"""Error rates of scored trials."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np


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


def curve(scores: np.ndarray, labels: np.ndarray) -> Curve:
    """The detection-error trade-off of scores (N,) under labels (N,), 1 target and 0 non-target.

    Raises:
        ValueError: no target or no non-target trials, or scores that are not finite.
    """
    if wrong := int((~np.isfinite(scores)).sum()):
        raise ValueError(f"{wrong} of {len(scores)} scores are not finite")
    targets = int(labels.sum())
    if targets == 0 or targets == len(labels):
        raise ValueError("error rates need both target and non-target trials")
    order = np.argsort(-scores, kind="stable")
    falling, hits = scores[order], np.cumsum(labels[order], dtype=np.int64)
    # Tied scores are accepted together: only the last of each run is an operating point.
    last = np.flatnonzero(np.append(falling[:-1] != falling[1:], True))
    hit, accepted = hits[last], last + 1
    miss = np.concatenate([[1.0], 1.0 - hit / targets])
    false_alarm = np.concatenate([[0.0], (accepted - hit) / (len(labels) - targets)])
    return Curve(np.concatenate([[np.inf], falling[last]]), miss, false_alarm)


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


def min_dcf(at: Curve, p_target: float, c_miss: float = 1.0, c_false_alarm: float = 1.0) -> float:
    """Least detection cost over thresholds, divided by that of the better blind decision (NIST SRE 2010 on)."""
    cost = c_miss * p_target * at.miss + c_false_alarm * (1.0 - p_target) * at.false_alarm
    return float(cost.min() / min(c_miss * p_target, c_false_alarm * (1.0 - p_target)))


@dataclass(frozen=True)
class Metric:
    """One number of an evaluation; JSON, report, printed line and demo show what METRICS lists.

    Attributes:
        key: in report.json.
        label: for people.
        compute: from the curve.
        decimals: shown.
        unit: shown after the number.
        headline: whether it is in the line that `spkd eval` prints.
    """

    key: str
    label: str
    compute: Callable[[Curve], float]
    decimals: int
    unit: str = ""
    headline: bool = True

    def format(self, value: float) -> str:
        """The value as people read it."""
        return f"{value:.{self.decimals}f}{self.unit}"


METRICS = (
    Metric("eer_percent", "EER", lambda at: 100 * eer(at)[0], 3, " %"),
    Metric("eer_threshold", "threshold at the EER", lambda at: eer(at)[1], 4, headline=False),
    Metric("min_dcf_0.01", "minDCF(0.01)", partial(min_dcf, p_target=0.01), 4),
    Metric("min_dcf_0.05", "minDCF(0.05)", partial(min_dcf, p_target=0.05), 4),
)


def compute(at: Curve) -> dict[str, float]:
    """Every metric by key."""
    return {metric.key: metric.compute(at) for metric in METRICS}


def headline(values: dict[str, float]) -> str:
    """The metrics of one evaluation in a line."""
    shown = (metric for metric in METRICS if metric.headline)
    return "   ".join(f"{metric.label} {metric.format(values[metric.key])}" for metric in shown)
