"""Confidence intervals and the comparison of two systems, by resampling speakers.

Trials of one speaker are not independent, so speakers are drawn, not trials (the vertex bootstrap of Snijders and
Borgatti, Connections 1999): a trial of one speaker counts as often as the speaker was drawn, a trial of two speakers as
often as the product of both.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from spkd.eval.metrics import Curve, Metric, Ranking
from spkd.progress import track
from spkd.seeding import Purpose, random_state

LEVEL = 0.95  # of confidence
MOST_POINTS = 65_536  # operating points of one resampled curve: longer lists take every so manyth


@dataclass(frozen=True)
class SpeakerTrials:
    """Trials whose speakers are known.

    Attributes:
        enrolment, test: (N,) the speakers of both sides, counted from 0.
        labels: (N,) 1 target, 0 non-target.
    """

    enrolment: np.ndarray
    test: np.ndarray
    labels: np.ndarray

    @property
    def speakers(self) -> int:
        return int(max(self.enrolment.max(), self.test.max())) + 1

    def weights(self, draw: np.ndarray) -> np.ndarray:
        """How often each trial counts, (N,), where speaker s was drawn draw[s] times."""
        draw = np.append(draw, 1.0)
        second = np.where(self.enrolment == self.test, len(draw) - 1, self.test)
        return draw[self.enrolment] * draw[second]


Resampled = Callable[[np.ndarray], np.ndarray]  # draws of the speakers (S,) -> values


def intervals(
    scores: np.ndarray, trials: SpeakerTrials, metrics: Sequence[Metric], count: int, seed: int
) -> dict[str, tuple[float, float]]:
    """95 % confidence interval of each metric that has one: percentiles of its resampled values.

    Args:
        count: of resamplings.
    """
    chosen = [metric for metric in metrics if metric.interval]
    curve_of = _curves(scores, trials)
    values = _resample(lambda draw: np.array([m.compute(curve_of(draw)) for m in chosen]), trials, count, seed)
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return {metric.key: (float(a), float(b)) for metric, a, b in zip(chosen, low, high, strict=True)}


@dataclass(frozen=True)
class Difference:
    """Of a metric of two systems on the same trials: first minus second.

    Attributes:
        value: on the trials as they are.
        low, high: 95 % confidence interval.
        p: two-sided: how often resampled differences have the other sign.
    """

    value: float
    low: float
    high: float
    p: float


def compare(
    first: np.ndarray, second: np.ndarray, trials: SpeakerTrials, metric: Metric, count: int, seed: int
) -> Difference:
    """Two systems' scores (N,) of the same trials, resampled together."""
    one, other = _curves(first, trials), _curves(second, trials)

    def difference(draw: np.ndarray) -> np.ndarray:
        return np.array([metric.compute(one(draw)) - metric.compute(other(draw))])

    values = _resample(difference, trials, count, seed)[:, 0]
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    tail = min((values <= 0).sum(), (values >= 0).sum())
    observed = float(difference(np.ones(trials.speakers))[0])
    return Difference(observed, float(low), float(high), min(1.0, 2 * (1 + int(tail)) / (count + 1)))


def _curves(scores: np.ndarray, trials: SpeakerTrials) -> Callable[[np.ndarray], Curve]:
    """The curve of resampled trials, from draws of the speakers."""
    ranking = Ranking.of(scores, trials.labels).coarser(MOST_POINTS)
    ordered = SpeakerTrials(*(part[ranking.order] for part in (trials.enrolment, trials.test, trials.labels)))
    ranking = ranking.in_order()
    return lambda draw: ranking.curve(ordered.weights(draw))


def _resample(values_of: Resampled, trials: SpeakerTrials, count: int, seed: int) -> np.ndarray:
    """Values (count, V) of resampled speakers; draws without target or non-target trials are drawn again."""
    speakers = trials.speakers

    def one(number: int) -> np.ndarray:
        random = random_state(Purpose.BOOTSTRAP, seed, number)
        for _ in range(100):
            draw = np.bincount(random.randint(0, speakers, speakers), minlength=speakers).astype(np.float64)
            try:
                return values_of(draw)
            except ValueError:
                continue
        raise ValueError("too few speakers to resample")

    workers = min(os.cpu_count() or 1, 8)
    with track("resampling speakers", count, "times") as bar, ThreadPoolExecutor(workers) as pool:
        found = []
        for values in pool.map(one, range(count)):
            found.append(values)
            bar.advance(1)
    return np.stack(found)
