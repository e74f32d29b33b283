"""Confidence intervals, and the comparison of two systems, by resampling speakers.

Trials of one speaker are not independent, so speakers are drawn, not trials (the vertex bootstrap of Snijders and
Borgatti, Connections 1999): a trial of one speaker counts as often as the speaker was drawn, a trial of two speakers as
often as the product of both.

An interval is normal on the scale of the metric's logit (of its logarithm where the metric may exceed 1), on which
errors of few speakers are nearly symmetric. Its centre is the value minus the bias estimated by resampling; its half
width is the standard deviation of the resampled values times a quantile of Student's t. The more usual percentiles of
the resampled values miss the true value two to six times as often (benchmarks/interval_coverage.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from spkd.cores import usable
from spkd.errors import UsageError
from spkd.eval.metrics import Curve, Metric, Ranking
from spkd.progress import track
from spkd.seeding import Purpose, random_state

LEVEL = 0.95  # of confidence
MOST_POINTS = 65_536  # operating points of one resampled curve: of longer lists, evenly spaced ones


@dataclass(frozen=True)
class SpeakerTrials:
    """Trials whose speakers are known.

    Attributes:
        enrolment: (N,) number of the speaker of the enrolment side, from 0.
        test: (N,) number of the speaker of the test side.
        labels: (N,) 1 target, 0 non-target.
    """

    enrolment: np.ndarray
    test: np.ndarray
    labels: np.ndarray

    @property
    def speakers(self) -> int:
        return int(max(self.enrolment.max(), self.test.max())) + 1

    @property
    def effective_speakers(self) -> float:
        """Effective number of speakers, at least 2.

        It is the number of speakers with equally many target trials whose results would vary as much: Kish's effective
        sample size (Survey Sampling, 1965), (sum n)^2 / sum n^2, where n is the number of target trials of a speaker.
        """
        counts = np.bincount(self.enrolment[self.labels == 1]).astype(np.float64)
        return max(2.0, float(counts.sum() ** 2 / np.sum(counts**2))) if counts.any() else 2.0

    def weights(self, draw: np.ndarray) -> np.ndarray:
        """Weight (N,) of each trial, where speaker s was drawn draw[s] times."""
        draw = np.append(draw, 1.0)
        second = np.where(self.enrolment == self.test, len(draw) - 1, self.test)
        return draw[self.enrolment] * draw[second]


Resampled = Callable[[np.ndarray], np.ndarray]  # draws of the speakers (S,) -> values


def intervals(
    scores: np.ndarray, trials: SpeakerTrials, metrics: Sequence[Metric], count: int, seed: int
) -> dict[str, tuple[float, float]]:
    """95 % confidence interval of each metric that has one.

    A metric whose resampled values are all equal has no interval: where no trial is an error, resampling gives no
    errors either, and the number of errors among other speakers cannot be estimated.

    Args:
        scores: (N,) scores of the trials.
        count: number of resamplings.
    Raises:
        ValueError: too few speakers.
        UsageError: too few resamplings.
    """
    chosen = [metric for metric in metrics if metric.interval]
    curve_of = resampled_curves(scores, trials)

    def values_of(draw: np.ndarray) -> np.ndarray:
        return np.array([metric.compute(curve_of(draw)) for metric in chosen])

    observed, resampled = values_of(np.ones(trials.speakers)), resample(values_of, trials, count, seed)
    limits_of = {}
    for metric, value, values in zip(chosen, observed.tolist(), resampled.T, strict=True):
        if (limits := interval(metric, value, values, trials)) is not None:
            limits_of[metric.key] = limits
    return limits_of


def interval(metric: Metric, value: float, resampled: np.ndarray, trials: SpeakerTrials) -> tuple[float, float] | None:
    """95 % confidence interval of a metric; None where the resampled values are all equal.

    Args:
        value: value on the original trials.
        resampled: (count,) values on resampled trials.
    """
    # A rate of 0 counts as half an error, so that its logit is finite.
    link = Link(metric.most, 0.5 / max(int(trials.labels.sum()), 1))
    on_line, drawn = float(link.to_line(value)), link.to_line(resampled)
    if np.ptp(drawn) == 0:
        return None
    spread = float(np.std(drawn, ddof=1))
    speakers = trials.effective_speakers
    reach = _student(speakers) * np.sqrt(speakers / (speakers - 1)) * spread
    centre = 2 * on_line - float(np.mean(drawn))
    return min(link.from_line(centre - reach), value), max(link.from_line(centre + reach), value)


@dataclass(frozen=True)
class Link:
    """Scale on which a metric's errors are taken as normal: its logit, or its logarithm where it has no upper limit.

    Attributes:
        most: largest possible value; infinite without an upper limit.
        least: smallest fraction of `most` (of 1 where infinite): lower values are raised to it, and values above
            1 - least are lowered to that.
    """

    most: float
    least: float

    def to_line(self, value: float | np.ndarray) -> np.ndarray:
        """Values of the metric, mapped to the real line."""
        if self.most == np.inf:
            return np.log(np.maximum(value, self.least))
        share = np.clip(np.asarray(value) / self.most, self.least, 1 - self.least)
        return np.log(share) - np.log1p(-share)

    def from_line(self, value: float) -> float:
        """Value of the metric: the inverse of `to_line`."""
        return float(np.exp(value) if self.most == np.inf else self.most / (1 + np.exp(-value)))


def _student(speakers: float) -> float:
    """Quantile of Student's t for an interval at the confidence level, with speakers - 1 degrees of freedom."""
    from scipy.stats import t

    return float(t.ppf((1 + LEVEL) / 2, speakers - 1))


@dataclass(frozen=True)
class Difference:
    """Difference of a metric of two systems on the same trials: first minus second.

    Attributes:
        value: difference on the original trials.
        low: lower limit of the 95 % confidence interval.
        high: upper limit of the interval.
        p: two-sided p-value of Student's t, below 0.05 where the interval does not contain 0.
    """

    value: float
    low: float
    high: float
    p: float


def compare(
    first: np.ndarray, second: np.ndarray, trials: SpeakerTrials, metric: Metric, count: int, seed: int
) -> Difference:
    """Difference of two systems on the same trials, whose speakers are resampled for both together.

    The difference is taken as normal without a transformation: its bias is small, since both systems share the
    speakers.

    Args:
        first: (N,) scores of the first system.
        second: (N,) scores of the second system.
    Raises:
        ValueError: too few speakers.
        UsageError: too few resamplings.
    """
    from scipy.stats import t

    first_curve, second_curve = resampled_curves(first, trials), resampled_curves(second, trials)

    def difference(draw: np.ndarray) -> np.ndarray:
        return np.array([metric.compute(first_curve(draw)) - metric.compute(second_curve(draw))])

    spread = float(np.std(resample(difference, trials, count, seed)[:, 0], ddof=1))
    observed = float(difference(np.ones(trials.speakers))[0])
    speakers = trials.effective_speakers
    reach = _student(speakers) * spread
    p = 1.0 if spread == 0 else 2 * float(t.sf(abs(observed) / spread, speakers - 1))
    return Difference(observed, observed - reach, observed + reach, p)


def resampled_curves(scores: np.ndarray, trials: SpeakerTrials) -> Callable[[np.ndarray], Curve]:
    """Function from draws of the speakers (S,) to the curve of the resampled trials."""
    ranking = Ranking.of(scores, trials.labels).coarser(MOST_POINTS)
    ordered = SpeakerTrials(*(values[ranking.order] for values in (trials.enrolment, trials.test, trials.labels)))
    ranking = ranking.in_order()
    return lambda draw: ranking.curve(ordered.weights(draw))


def resample(values_of: Resampled, trials: SpeakerTrials, count: int, seed: int) -> np.ndarray:
    """Values (count, V) on resampled speakers; draws without target or non-target trials are drawn again."""
    if count < 2:
        raise UsageError(f"bootstrap={count}: at least 2 resamplings, or 0 for no intervals")
    speakers = trials.speakers

    def resampled(number: int) -> np.ndarray:
        random = random_state(Purpose.BOOTSTRAP, seed, number)
        for _ in range(100):
            draw = np.bincount(random.randint(0, speakers, speakers), minlength=speakers).astype(np.float64)
            try:
                return values_of(draw)
            except ValueError:
                continue
        raise ValueError("too few speakers to resample")

    workers = min(usable(), 8)
    with track("resampling speakers for the intervals", count, "times") as bar, ThreadPoolExecutor(workers) as pool:
        rows = []
        for values in pool.map(resampled, range(count)):
            rows.append(values)
            bar.advance(1)
    return np.stack(rows)
