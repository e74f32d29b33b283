from __future__ import annotations

import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from spkd.errors import UsageError
from spkd.eval.bootstrap import SpeakerTrials, compare, intervals
from spkd.eval.metrics import METRICS, Metric, curve, eer, metrics_of


def drawn(seed: int, speakers: int = 30, quality: float = 1.5) -> tuple[np.ndarray, SpeakerTrials]:
    """Scores with an effect of each speaker, so that trials are not independent."""
    random = np.random.RandomState(seed)
    effect = random.normal(size=speakers)
    pairs = np.array([(a, b) for a in range(speakers) for b in range(a, speakers) for _ in range(20 if a == b else 1)])
    labels = (pairs[:, 0] == pairs[:, 1]).astype(np.int8)
    scores = quality * labels + 0.7 * effect[pairs].sum(1) + random.normal(size=len(pairs))
    return scores, SpeakerTrials(pairs[:, 0], pairs[:, 1], labels)


@given(st.integers(0, 10**6))
def test_trials_count_as_often_as_their_speakers_were_drawn(seed: int) -> None:
    random = np.random.RandomState(seed % 2**32)
    trials = SpeakerTrials(random.randint(0, 6, 40), random.randint(0, 6, 40), np.zeros(40, np.int8))
    draw = random.randint(0, 3, trials.speakers)
    expected = [draw[a] if a == b else draw[a] * draw[b] for a, b in zip(trials.enrolment, trials.test, strict=True)]
    assert trials.weights(draw.astype(float)).tolist() == expected


def test_intervals_hold_the_true_rate_nearly_always_and_are_wider_than_those_over_trials() -> None:
    """The rate of many speakers lies in 19 of 20 intervals; here in at least 16 of 20, a chance of 1 in 400 less."""
    truth = np.mean([100 * eer(curve(s, t.labels))[0] for s, t in (drawn(seed, 200) for seed in range(1000, 1005))])
    held, widths = 0, []
    for seed in range(20):
        scores, trials = drawn(seed)
        low, high = intervals(scores, trials, METRICS, 200, 0)["eer_percent"]
        held += low <= truth <= high
        widths.append(high - low)
    assert held >= 16
    each = SpeakerTrials(np.arange(len(scores)), np.arange(len(scores)), trials.labels)  # every trial its own speaker
    low, high = intervals(scores, each, METRICS, 200, 0)["eer_percent"]
    assert np.mean(widths) > 1.3 * (high - low)


def apart(targets: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, SpeakerTrials]:
    """Trials each of a speaker of its own, so that they are independent."""
    scores = np.concatenate([targets, others])
    labels = np.concatenate([np.ones(len(targets), np.int8), np.zeros(len(others), np.int8)])
    return scores, SpeakerTrials(np.arange(len(scores)), np.arange(len(scores)), labels)


def test_an_interval_of_independent_trials_is_that_of_the_logit_of_a_share() -> None:
    """20 of 100 target trials are missed, and no threshold is chosen: the delta method says that the logit of a share
    p of n has the variance 1 / (n p (1 - p))."""
    miss = Metric("miss", "miss", lambda at: float(at.miss[np.searchsorted(-at.threshold, 0.0, "right") - 1]), 4)
    targets = np.concatenate([np.full(20, -1.0), np.full(80, 1.0)])
    low, high = intervals(*apart(targets, np.full(50, -2.0)), [miss], 2000, 0)["miss"]
    reach = scipy.stats.t.ppf(0.975, 99) / np.sqrt(100 * 0.2 * 0.8)
    expected = scipy.special.expit(scipy.special.logit(0.2) + np.array([-reach, reach]))
    assert [low, high] == pytest.approx(expected, abs=0.01)
    # McNemar's test: of 100 pairs, 12 are right in the first system alone and 3 in the second alone.
    second = targets.copy()
    second[:3], second[20:32] = 1.0, -1.0
    found = compare(apart(second, np.full(50, -2.0))[0], *apart(targets, np.full(50, -2.0)), miss, 2000, 0)
    spread = np.sqrt(15 - 9**2 / 100) / 100
    assert found.value == pytest.approx(0.09)
    assert found.high - found.value == pytest.approx(scipy.stats.t.ppf(0.975, 99) * spread, rel=0.06)
    assert found.p == pytest.approx(2 * scipy.stats.t.sf(0.09 / spread, 99), abs=0.01)


def test_speakers_with_unequal_trials_count_as_fewer() -> None:
    """Kish's effective sample size: 4 speakers of 1, 1, 1 and 3 target trials count as 36 / 12 = 3."""
    enrolment = np.array([0, 1, 2, 3, 3, 3, 0])
    trials = SpeakerTrials(enrolment, np.array([0, 1, 2, 3, 3, 3, 1]), np.array([1, 1, 1, 1, 1, 1, 0]))
    assert trials.effective_speakers == 3


def test_a_list_without_an_error_has_no_interval() -> None:
    assert intervals(*apart(np.full(9, 1.0), np.full(9, -1.0)), METRICS, 20, 0) == {}
    with pytest.raises(UsageError, match="bootstrap=1: at least 2"):
        intervals(*drawn(0), METRICS, 1, 0)


def test_the_same_seed_gives_the_same_interval() -> None:
    scores, trials = drawn(0)
    metrics = metrics_of(llr=True, false_alarms=[0.1])
    one, again, other = (intervals(scores, trials, metrics, 50, seed) for seed in (1, 1, 2))
    assert one == again != other
    assert set(one) == {metric.key for metric in metrics if metric.interval}


def test_a_better_system_differs_from_an_equal_one() -> None:
    scores, trials = drawn(0)
    noise = np.random.RandomState(9).normal(size=len(scores))
    worse = compare(scores + 5 * noise, scores, trials, METRICS[0], 200, 0)
    assert worse.value > 0
    assert worse.low > 0
    assert worse.p < 0.02
    same = compare(scores, scores, trials, METRICS[0], 200, 0)
    assert (same.value, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)


def test_one_speaker_cannot_be_resampled() -> None:
    trials = SpeakerTrials(np.zeros(4, int), np.zeros(4, int), np.ones(4, np.int8))
    with pytest.raises(ValueError, match="both target and non-target"):
        intervals(np.arange(4.0), trials, METRICS, 10, 0)
