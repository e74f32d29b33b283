"""Crops of views, and the rows of a target that belong to them by their time in the view."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from spkd.outputs.features import FBANK, HOP
from spkd.outputs.target import Target


class Crop(NamedTuple):
    """A stretch of each view of a batch, in samples at 16 kHz.

    A crop that reaches beyond a view's end continues at its beginning.

    Attributes:
        start: (B,) first sample, a multiple of `grid`.
        samples: length of every crop.
        grid: number of samples of which starts and repetitions are multiples: the hop of all input features, or the
            hop of a student's frames, so that the student has the same frames wherever a crop starts.
    """

    start: np.ndarray
    samples: int
    grid: int = HOP

    def period(self, samples: np.ndarray) -> np.ndarray:
        """Number of samples after which a view begins again, the same for every target.

        Every kind of input features has rows up to there.

        Args:
            samples: (B,) lengths of the views.
        Returns:
            (B,) periods.
        """
        whole = FBANK.num_frames(samples) * HOP
        return np.where(whole < self.grid, whole, whole // self.grid * self.grid)


@dataclass(frozen=True)
class Rows:
    """Rows of a target that belong to a crop, for each view of a batch.

    The first `used` rows of a view are repeated as often as the view is. Of this sequence, `height` rows are taken,
    from row `skip` on.

    Attributes:
        skip: (B,) rows of the sequence to leave out.
        used: (B,) rows of one repetition.
        height: number of rows taken, the same for all views.
    """

    skip: np.ndarray
    used: np.ndarray
    height: int

    @classmethod
    def of(cls, target: Target, samples: np.ndarray, crop: Crop) -> Rows:
        """The rows of a frame-level target that belong to a crop.

        There are as many rows as a view of the crop's length has. Where the view is not repeated, they are the rows
        whose middle is nearest to the middle of the crop; for input features, these are exactly the crop's own rows.

        Args:
            samples: (B,) lengths of the views.
        """
        hop, height, count = target.hop or 1, target.num_frames(crop.samples), target.num_frames(samples)
        # Crops within their view. Times are doubled, because the middle of a crop may lie between two samples.
        middle = 2 * crop.start + (crop.samples - round(2 * target.middle) - (height - 1) * hop)
        last = np.maximum(count - height, 0)
        first = np.minimum(np.maximum((middle + hop) // (2 * hop), 0), last)
        is_whole = crop.start + crop.samples <= samples
        if is_whole.all():
            return cls(first, count, height)
        # Crops that reach beyond their view: `lap` whole repetitions come before the crop's start.
        period = crop.period(samples)
        used = np.minimum(count, -(-period // hop))
        lap, rest = np.divmod(crop.start, period)
        skip = lap * used + np.minimum(-(-rest // hop), used)
        return cls(np.where(is_whole, first, skip), np.where(is_whole, count, used), height)

    @property
    def follow(self) -> bool:
        """Whether the rows of every view are consecutive."""
        return bool((self.skip + self.height <= self.used).all())

    @property
    def numbers(self) -> np.ndarray:
        """(B, height): numbers of the rows within each view."""
        return self._places % self.used[:, None]

    @property
    def laps(self) -> np.ndarray:
        """(B, height): number of repetitions of the view before each row."""
        return self._places // self.used[:, None]

    @property
    def _places(self) -> np.ndarray:
        return self.skip[:, None] + np.arange(self.height)
