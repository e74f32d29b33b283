"""Error rates against counting by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spkd.eval.metrics import METRICS, compute, curve, eer, headline, min_dcf

trials = st.lists(st.tuples(st.integers(-8, 8), st.booleans()), min_size=2, max_size=60).filter(
    lambda items: 0 < sum(label for _, label in items) < len(items)
)


def split(items: list[tuple[int, bool]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([s for s, _ in items], float), np.array([int(y) for _, y in items])


@given(trials)
def test_the_curve_counts_errors_at_every_threshold(items: list[tuple[int, bool]]) -> None:
    scores, labels = split(items)
    at = curve(scores, labels)
    assert at.threshold.tolist() == [np.inf, *sorted(set(scores.tolist()), reverse=True)]
    for threshold, miss, false_alarm in zip(at.threshold, at.miss, at.false_alarm, strict=True):
        assert abs(miss - (scores[labels == 1] < threshold).mean()) < 1e-12
        assert abs(false_alarm - (scores[labels == 0] >= threshold).mean()) < 1e-12


@given(trials)
def test_the_eer_lies_between_the_points_around_the_crossing(items: list[tuple[int, bool]]) -> None:
    at = curve(*split(items))
    rate, _ = eer(at)
    below = max(i for i in range(len(at.miss)) if at.false_alarm[i] < at.miss[i])
    low = max(at.false_alarm[below], at.miss[below + 1])
    high = min(at.miss[below], at.false_alarm[below + 1])
    assert low - 1e-9 <= rate <= high + 1e-9 or low > high


@given(trials, st.sampled_from([0.01, 0.05, 0.5]), st.sampled_from([1.0, 10.0]))
def test_min_dcf_is_the_least_normalised_cost(items: list[tuple[int, bool]], p_target: float, c_miss: float) -> None:
    scores, labels = split(items)
    costs = []
    for threshold in [np.inf, *scores]:
        miss, false_alarm = (scores[labels == 1] < threshold).mean(), (scores[labels == 0] >= threshold).mean()
        costs.append(c_miss * p_target * miss + (1 - p_target) * false_alarm)
    expected = min(costs) / min(c_miss * p_target, 1 - p_target)
    assert abs(min_dcf(curve(scores, labels), p_target, c_miss) - expected) < 1e-9


def test_known_values() -> None:
    perfect = curve(np.array([2.0, 3.0, 0.0, 1.0]), np.array([1, 1, 0, 0]))
    assert (eer(perfect)[0], min_dcf(perfect, 0.01)) == (0.0, 0.0)
    useless = curve(np.zeros(10), np.array([1] * 4 + [0] * 6))
    assert (eer(useless)[0], min_dcf(useless, 0.01)) == (0.5, 1.0)
    random = np.random.RandomState(0)
    scores = np.concatenate([random.normal(2.0, 1.0, 200_000), random.normal(0.0, 1.0, 200_000)])
    gaussian = curve(scores, np.repeat([1, 0], 200_000))
    assert abs(eer(gaussian)[0] - 0.158655) < 0.002  # the normal tail beyond one deviation


def test_one_kind_of_trial_has_no_error_rate() -> None:
    with pytest.raises(ValueError, match="both target and non-target"):
        curve(np.zeros(3), np.ones(3, int))


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_scores_that_are_not_finite_have_no_error_rate(wrong: float) -> None:
    scores = np.array([0.1, wrong, 0.3, wrong])
    with pytest.raises(ValueError, match="2 of 4 scores are not finite"):
        curve(scores, np.array([1, 0, 1, 0]))


def test_one_list_of_metrics_serves_all() -> None:
    scores, labels = np.array([0.9, 0.8, 0.3, 0.2, 0.1]), np.array([1, 0, 1, 0, 0])
    at = curve(scores, labels)
    values = compute(at)
    assert list(values) == [metric.key for metric in METRICS]
    assert values["eer_percent"] == pytest.approx(100 * eer(at)[0])
    assert values["min_dcf_0.05"] == min_dcf(at, 0.05)
    assert headline(values).startswith(f"EER {values['eer_percent']:.3f} %   minDCF(0.01) ")
