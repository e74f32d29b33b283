"""Random numbers as a pure function of (seed, index, purpose): a run repeats exactly, and resumes at any index.

A purpose keeps streams apart that would otherwise share their numbers. The multipliers are large primes, so that the
indices of one seed do not meet those of the next; they are frozen, because changing one changes every result.
"""

from __future__ import annotations

from enum import Enum

import numpy as np

WORD = 2**32  # numpy's RandomState takes seeds below this


class Purpose(Enum):
    """What a stream is for: (multiplier of the seed, offset of each further crop)."""

    ORDER = (7_919, 0)  # index: epoch
    STEP = (1_000_003, 0)  # index: step; masks, dropout and noise of adapters
    CROP = (1_000_003, 7_368_787)  # index: step
    CROP_VIEW = (1_000_003, 15_485_863)  # index: step; which view of an instance a further crop is cut from
    NEGATIVES = (1, 0)  # index: step
    AUGMENT = (15_486_047, 32_452_843)  # index: batch; fresh augmentation of the student's input
    BOOTSTRAP = (2_750_159, 0)  # index: resampling


def seed_of(purpose: Purpose, seed: int, index: int, crop: int = 0) -> int:
    """The seed of one stream."""
    multiplier, offset = purpose.value
    return seed * multiplier + index + crop * offset


def random_state(purpose: Purpose, seed: int, index: int, crop: int = 0) -> np.random.RandomState:
    """A generator whose numbers no later numpy changes (NEP 19)."""
    return np.random.RandomState(seed_of(purpose, seed, index, crop) % WORD)
