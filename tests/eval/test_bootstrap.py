from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spkd.eval.bootstrap import SpeakerTrials, compare, intervals
from spkd.eval.metrics import METRICS, curve, eer, metrics_of


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
    """The rate of many speakers lies in 19 of 20 intervals; here in at least 15 of 20, a chance of 1 in 3,000 less."""
    truth = np.mean([100 * eer(curve(s, t.labels))[0] for s, t in (drawn(seed, 200) for seed in range(1000, 1005))])
    held, widths = 0, []
    for seed in range(20):
        scores, trials = drawn(seed)
        low, high = intervals(scores, trials, METRICS, 200, 0)["eer_percent"]
        held += low <= truth <= high
        widths.append(high - low)
    assert held >= 15
    each = SpeakerTrials(np.arange(len(scores)), np.arange(len(scores)), trials.labels)  # every trial its own speaker
    low, high = intervals(scores, each, METRICS, 200, 0)["eer_percent"]
    assert np.mean(widths) > 1.3 * (high - low)


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
