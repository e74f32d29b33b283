from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from spkd.errors import UsageError
from spkd.eval.metrics import (
    METRICS,
    Point,
    Ranking,
    act_dcf,
    cllr,
    compute,
    curve,
    eer,
    metrics_of,
    min_cllr,
    min_dcf,
    miss_at,
    threshold_at,
)

# Few distinct scores, so that ties are frequent.
trials = st.lists(st.tuples(st.integers(-4, 4), st.booleans()), min_size=2, max_size=60).filter(
    lambda items: len({label for _, label in items}) == 2
)


def split(items: list[tuple[int, bool]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([score for score, _ in items], float), np.array([label for _, label in items], int)


@given(trials)
def test_the_curve_counts_errors_at_every_threshold(items: list[tuple[int, bool]]) -> None:
    scores, labels = split(items)
    at = curve(scores, labels)
    assert at.threshold.tolist() == [np.inf, *sorted(set(scores.tolist()), reverse=True)]
    for threshold, miss, false_alarm in zip(at.threshold, at.miss, at.false_alarm, strict=True):
        assert abs(miss - (scores[labels == 1] < threshold).mean()) < 1e-12
        assert abs(false_alarm - (scores[labels == 0] >= threshold).mean()) < 1e-12


@settings(deadline=None)  # and scipy
@given(trials, st.integers(0, 10**6))
def test_a_weight_counts_a_trial_as_often(items: list[tuple[int, bool]], seed: int) -> None:
    scores, labels = split(items)
    weights = np.random.RandomState(seed).randint(0, 4, len(scores))
    repeated = np.repeat(labels, weights)
    ranking = Ranking.of(scores, labels)
    if not 0 < repeated.sum() < len(repeated):
        with pytest.raises(ValueError, match="both target and non-target"):
            ranking.curve(weights.astype(float))
        return
    found, expected = ranking.curve(weights.astype(float)), curve(np.repeat(scores, weights), repeated)
    for function in (lambda at: eer(at)[0], cllr, min_cllr, lambda at: min_dcf(at, Point(0.05))[0]):
        assert abs(function(found) - function(expected)) < 1e-9


def test_fewer_points_of_a_curve_are_points_of_it() -> None:
    random = np.random.RandomState(0)
    ranking = Ranking.of(random.normal(size=5000), random.randint(0, 2, 5000))
    whole, coarse = ranking.curve(), ranking.coarser(100).curve()
    assert len(coarse.threshold) == 101
    kept = np.searchsorted(-whole.threshold, -coarse.threshold)
    assert np.array_equal(whole.miss[kept], coarse.miss)
    assert np.array_equal(whole.false_alarm[kept], coarse.false_alarm)
    assert ranking.coarser(10_000) is ranking


@given(trials)
def test_the_eer_lies_between_the_points_around_the_crossing(items: list[tuple[int, bool]]) -> None:
    at = curve(*split(items))
    rate, _ = eer(at)
    below = max(i for i in range(len(at.miss)) if at.false_alarm[i] < at.miss[i])
    low = max(at.false_alarm[below], at.miss[below + 1])
    high = min(at.miss[below], at.false_alarm[below + 1])
    assert low - 1e-9 <= rate <= high + 1e-9 or low > high


@given(trials, st.sampled_from([0.01, 0.05, 0.5]), st.sampled_from([1.0, 10.0]))
def test_costs_are_those_of_every_threshold(items: list[tuple[int, bool]], p_target: float, c_miss: float) -> None:
    scores, labels = split(items)
    point = Point(p_target, c_miss)

    def cost(threshold: float) -> float:
        miss, false_alarm = (scores[labels == 1] < threshold).mean(), (scores[labels == 0] >= threshold).mean()
        return (c_miss * p_target * miss + (1 - p_target) * false_alarm) / min(c_miss * p_target, 1 - p_target)

    found, threshold = min_dcf(curve(scores, labels), point)
    assert abs(found - min(cost(t) for t in [np.inf, *scores])) < 1e-9
    assert abs(cost(threshold) - found) < 1e-9
    bayes = np.log((1 - p_target) / (c_miss * p_target))
    assert abs(act_dcf(curve(scores, labels), point) - cost(bayes)) < 1e-9


@given(trials, st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_the_miss_rate_at_a_false_alarm_rate(items: list[tuple[int, bool]], rate: float) -> None:
    scores, labels = split(items)
    miss, threshold = miss_at(curve(scores, labels), rate)
    assert (scores[labels == 0] >= threshold).mean() <= rate
    lower = [t for t in scores if t < threshold and (scores[labels == 0] >= t).mean() <= rate]
    assert not lower
    assert abs(miss - (scores[labels == 1] < threshold).mean()) < 1e-12


@given(trials)
def test_cllr_is_the_mean_of_logarithms(items: list[tuple[int, bool]]) -> None:
    scores, labels = split(items)
    expected = (
        np.log2(1 + np.exp(-scores[labels == 1])).mean() / 2 + np.log2(1 + np.exp(scores[labels == 0])).mean() / 2
    )
    assert abs(cllr(curve(scores, labels)) - expected) < 1e-9


@settings(deadline=None)  # the first example imports scikit-learn
@given(trials)
def test_min_cllr_is_that_of_scikit_learns_isotonic_regression(items: list[tuple[int, bool]]) -> None:
    isotonic = pytest.importorskip("sklearn.isotonic")
    scores, labels = split(items)
    weights = np.where(labels == 1, 1 / labels.sum(), 1 / (1 - labels).sum())
    posterior = isotonic.IsotonicRegression(y_min=0, y_max=1).fit_transform(scores, labels, sample_weight=weights)
    with np.errstate(divide="ignore"):
        bits = -np.log2(np.where(labels == 1, posterior, 1 - posterior))
    expected = (bits[labels == 1].mean() + bits[labels == 0].mean()) / 2
    assert abs(min_cllr(curve(scores, labels)) - expected) < 1e-6  # its own regression is in float32


def test_known_values() -> None:
    perfect = curve(np.array([2.0, 3.0, 0.0, 1.0]), np.array([1, 1, 0, 0]))
    assert (eer(perfect)[0], min_dcf(perfect, Point(0.01))[0], min_cllr(perfect)) == (0.0, 0.0, 0.0)
    useless = curve(np.zeros(10), np.array([1] * 4 + [0] * 6))
    assert (eer(useless)[0], min_dcf(useless, Point(0.01))[0]) == (0.5, 1.0)
    assert min_cllr(useless) == pytest.approx(1.0)
    assert cllr(useless) == pytest.approx(1.0)
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


def test_points_are_read_and_named() -> None:
    assert Point.parse("0.01") == Point(0.01)
    assert Point.parse("0.01:10:1") == Point(0.01, 10.0, 1.0)
    assert Point.parse("0.01:10:1").name == "0.01:10:1"
    for wrong in ("", "1", "x", "0.1:2", "0.1:0:1"):
        with pytest.raises(UsageError, match="is not P_TARGET"):
            Point.parse(wrong)


def test_one_list_of_metrics_serves_all() -> None:
    scores, labels = np.array([0.9, 0.8, 0.3, 0.2, 0.1]), np.array([1, 0, 1, 0, 0])
    at, metrics = curve(scores, labels), metrics_of(false_alarms=[0.1], llr=True)
    values = compute(at, metrics)
    assert list(values) == [metric.key for metric in metrics]
    assert metrics[: len(METRICS)] == METRICS
    assert values["eer_percent"] == pytest.approx(100 * eer(at)[0])
    assert values["min_dcf_0.05"] == min_dcf(at, Point(0.05))[0]
    assert values["threshold_at_fa_0.1"] == threshold_at(at, 0.1)
    shown = {m.key: m.description.format(values[m.key]) for m in metrics if m.headline}
    assert shown["eer_percent"] == f"{values['eer_percent']:.3f} %"
    assert shown["min_dcf_0.01"] == f"{values['min_dcf_0.01']:.4f}"
    assert metrics[0].description.title == "EER (%)"
    assert metrics[0].description.format_interval((1.0, 2.0)) == "1.000 to 2.000"


def test_a_threshold_that_accepts_nothing_is_a_number_above_all_scores() -> None:
    at = curve(np.array([0.5, 0.5]), np.array([1, 0]))
    found = compute(at, metrics_of(false_alarms=[0.0]))["threshold_at_fa_0"]
    assert 0.5 < found < 0.5001


@pytest.mark.parametrize(("count", "rate"), [(1000, 0.01), (1000, 0.001), (500, 0.05), (1000, 0.0125)])
def test_a_threshold_at_a_false_alarm_rate_keeps_it_on_other_trials(count: int, rate: float) -> None:
    """Over 2,000 lists of normal scores, whose distribution gives the rate on all other trials."""
    random = np.random.RandomState(0)
    labels = np.concatenate([np.ones(50, np.int8), np.zeros(count, np.int8)])
    rates = []
    for _ in range(2000):
        scores = random.standard_normal(50 + count)
        scores[:50] += 2
        rates.append(scipy.stats.norm.sf(threshold_at(curve(scores, labels), rate)))
    deviation = np.std(rates) / np.sqrt(len(rates))
    assert np.mean(rates) == pytest.approx(rate, abs=3 * deviation + 1 / count**1.5)
