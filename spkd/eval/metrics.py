"""Error rates of scored trials."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Curve:
    """Miss and false-alarm rates at every distinct threshold (accepting scores >= it), from +inf downwards.

    threshold, miss, false_alarm: (K,), threshold falling, miss falling from 1 to 0, false_alarm rising from 0 to 1.
    """

    threshold: np.ndarray
    miss: np.ndarray
    false_alarm: np.ndarray


def curve(scores: np.ndarray, labels: np.ndarray) -> Curve:
    """The detection-error trade-off of scores (N,) under labels (N,), 1 target and 0 non-target.

    Raises:
        ValueError: no target or no non-target trials.
    """
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
