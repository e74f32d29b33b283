"""Random numbers as a pure function of (seed, index, purpose), so that a run can be repeated and resumed exactly.

Different purposes have different streams of numbers. The multipliers are large primes, so that the streams of one seed
do not coincide with those of the next. They must not be changed, because a change would change every result.
"""

from __future__ import annotations

from enum import Enum

import numpy as np

WORD = 2**32  # numpy's RandomState takes seeds below this


class Purpose(Enum):
    """Purpose of a stream of random numbers: (multiplier of the seed, offset of each further crop)."""

    ORDER = (7_919, 0)  # index: epoch
    STEP = (1_000_003, 0)  # index: step; masks, dropout and noise of adapters
    CROP = (1_000_003, 7_368_787)  # index: step
    CROP_VIEW = (1_000_003, 15_485_863)  # index: step; view of an instance from which a further crop is cut
    CROP_LENGTH = (4_256_233, 0)  # index: batch; length of its crops, where that is drawn
    NEGATIVES = (1, 0)  # index: step
    AUGMENT = (15_486_047, 32_452_843)  # index: batch; fresh augmentation of the student's input
    BOOTSTRAP = (2_750_159, 0)  # index: resampling
    MAP = (49_979_687, 0)  # index: 0 views, 1 speakers kept aside, 2 weights and batches


def seed_of(purpose: Purpose, seed: int, index: int, crop: int = 0) -> int:
    """Seed of a stream.

    Args:
        index: index of the stream, which the purpose defines.
        crop: number of the further crop; 0 for the first crop.
    """
    multiplier, offset = purpose.value
    return seed * multiplier + index + crop * offset


def random_state(purpose: Purpose, seed: int, index: int, crop: int = 0) -> np.random.RandomState:
    """Generator of a stream, with the arguments of `seed_of`. No later numpy changes its numbers (NEP 19)."""
    return np.random.RandomState(seed_of(purpose, seed, index, crop) % WORD)
