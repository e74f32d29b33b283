from __future__ import annotations

import numpy as np
import pytest

from spkd.eval.pairs import Side, as_norm, cohort_statistics, score_pairs


@pytest.mark.parametrize("count", [1, 1023, 5000])
def test_scores_are_products_and_offsets(count: int) -> None:
    random = np.random.RandomState(count)
    left, right = random.normal(size=(40, 16)), random.normal(size=(60, 16))
    i, j = random.randint(0, 40, count), random.randint(0, 60, count)
    offset = random.normal(size=40)
    found = score_pairs(Side(left, offset), Side(right), i, j)
    expected = np.array([left[a] @ right[b] for a, b in zip(i, j, strict=True)]) + offset[i]
    assert np.abs(found - expected).max() < 1e-12


@pytest.mark.parametrize(("cohort", "top"), [(3000, 100), (3000, 300), (500, 300), (50, 300), (7, 2), (20_000, 40)])
def test_cohort_statistics_are_those_of_the_sorted_scores(cohort: int, top: int) -> None:
    """Also where a few rows are far from their sample, so that its threshold lets too little through."""
    random = np.random.RandomState(0)
    vectors, others = random.normal(size=(300, 8)), random.normal(size=(cohort, 8))
    others[::16] -= 3.0  # every 16th is what thresholds are taken from
    side, other = Side(vectors, random.normal(size=300)), Side(others, random.normal(size=cohort))
    scores = vectors @ others.T + side.offset[:, None] + other.offset[None]
    highest = np.sort(scores, 1)[:, -top:]
    mean, deviation = cohort_statistics(side, other, top)
    assert np.abs(mean - highest.mean(1)).max() < 1e-9
    assert np.abs(deviation - highest.std(1)).max() < 1e-9


def test_equal_scores_with_the_cohort_are_counted_as_often_as_asked() -> None:
    side, cohort = Side(np.ones((4, 2))), Side(np.ones((1000, 2)))
    mean, deviation = cohort_statistics(side, cohort, 100)
    assert mean.tolist() == [2.0] * 4
    assert deviation.tolist() == [0.0] * 4


def test_as_norm_is_the_mean_of_both_sides() -> None:
    scores = np.array([1.0, 2.0])
    one, other = (np.array([0.5, 1.0]), np.array([2.0, 4.0])), (np.array([0.0]), np.array([0.5]))
    found = as_norm(scores, one, other, np.array([0, 1]), np.array([0, 0]))
    assert found.tolist() == [0.5 * (0.25 + 2.0), 0.5 * (0.25 + 4.0)]
