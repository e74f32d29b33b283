"""Numbers that are computed where they are asked for, against the same numbers in arrays."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spkd.cache import lazy
from spkd.cache.lazy import Computed, Joined, all_but, picked, shuffled


def square(places: np.ndarray) -> np.ndarray:
    return places * places


KEYS = [
    3,
    slice(None),
    slice(2, 7, 2),
    slice(9, 4),
    np.array([[5, 0], [1, 9]]),
    np.arange(10) % 3 == 0,
    np.array([], int),
]


@pytest.mark.parametrize("key", KEYS, ids=range(len(KEYS)))
def test_they_are_indexed_like_arrays(key: Any) -> None:
    array = np.arange(10) ** 2
    parts = Joined([array[:4], Computed(0, square), array[4:] - 7], [np.asarray, np.asarray, np.array(7).__add__])
    for numbers in (Computed(10, square), parts, pickle.loads(pickle.dumps(Computed(10, square)))):
        assert len(numbers) == 10
        assert np.array_equal(numbers[key], array[key])
        assert np.array_equal(numbers, array)
        assert list(numbers) == array.tolist()
        assert np.array_equal(numbers == 9, array == 9)
        for wrong in (10, -1):
            with pytest.raises(IndexError):
                numbers[wrong]


@given(st.integers(0, 40), st.sets(st.integers(0, 39)))
def test_all_but_some(count: int, some: set[int]) -> None:
    left_out = np.array(sorted(number for number in some if number < count), np.int64)
    kept = [number for number in range(count) if number not in some]
    assert list(all_but(count, left_out)) == kept
    assert picked(np.arange(count) * 2, all_but(count, left_out))[:].tolist() == [2 * number for number in kept]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 63, 64, 65, 1000, 4097])
def test_a_computed_order_has_every_number_once(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy, "IN_MEMORY", 0)
    order = shuffled(count, 3, 1)
    assert not isinstance(order, np.ndarray)
    assert sorted(order[:].tolist()) == list(range(count))
    assert np.array_equal(order[count // 2 :], order[:][count // 2 :])
    assert np.array_equal(order, shuffled(count, 3, 1))
    if count > 5:
        assert not np.array_equal(order, shuffled(count, 3, 2))
        assert not np.array_equal(order, shuffled(count, 4, 1))


def test_a_computed_order_is_as_random_as_a_drawn_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over seeds, every number is as often at every place: chi-square with (count - 1)^2 degrees of freedom."""
    monkeypatch.setattr(lazy, "IN_MEMORY", 0)
    count, seeds = 12, 3000
    times, pairs = np.zeros((count, count)), np.zeros((count, count))
    for seed in range(seeds):
        order = shuffled(count, seed, 0)[:]
        times[np.arange(count), order] += 1
        pairs[order[:-1], order[1:]] += 1
    freedom = (count - 1) ** 2
    assert abs(((times - seeds / count) ** 2).sum() / (seeds / count) - freedom) < 5 * np.sqrt(2 * freedom)
    expected, apart = seeds / count, ~np.eye(count, dtype=bool)  # each ordered pair of neighbours
    assert pairs[~apart].sum() == 0
    assert np.abs(pairs[apart] - expected).max() < 6 * np.sqrt(expected)


def test_a_short_order_is_that_of_numpy() -> None:
    from spkd.seeding import Purpose, random_state

    assert np.array_equal(shuffled(100, 5, 2), random_state(Purpose.ORDER, 5, 2).permutation(100))
