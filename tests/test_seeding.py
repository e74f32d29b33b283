"""Streams of random numbers are frozen: a change of any would change every result."""

from __future__ import annotations

import numpy as np
import pytest

from spkd.seeding import Purpose, random_state, seed_of


@pytest.mark.parametrize(
    ("purpose", "crop", "expected"),
    [
        (Purpose.ORDER, 0, 3 * 7_919 + 5),
        (Purpose.STEP, 0, 3 * 1_000_003 + 5),
        (Purpose.CROP, 2, 3 * 1_000_003 + 5 + 2 * 7_368_787),
        (Purpose.CROP_VIEW, 1, 3 * 1_000_003 + 5 + 15_485_863),
        (Purpose.NEGATIVES, 0, 3 + 5),
        (Purpose.AUGMENT, 1, 3 * 15_486_047 + 5 + 32_452_843),
        (Purpose.BOOTSTRAP, 0, 3 * 2_750_159 + 5),
    ],
)
def test_the_seed_of_each_purpose(purpose: Purpose, crop: int, expected: int) -> None:
    assert seed_of(purpose, 3, 5, crop) == expected
    again = np.random.RandomState(expected % 2**32).random_sample(4)
    assert np.array_equal(random_state(purpose, 3, 5, crop).random_sample(4), again)


def test_seeds_beyond_a_word_are_taken() -> None:
    assert 0 <= random_state(Purpose.STEP, 2**40, 10**9).random_sample() < 1
