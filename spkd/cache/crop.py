"""Crops of views, and the rows of a target that belong to them: by time, never by row number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from spkd.outputs.features import FBANK, HOP
from spkd.outputs.target import Target


class Crop(NamedTuple):
    """A stretch of each view of a batch, in samples at 16 kHz. A crop that runs over a view's end goes on at its
    beginning.

    Attributes:
        start: (B,) first sample, a multiple of `grid`.
        samples: length, one for all.
        grid: samples of which starts and repetitions are multiples: of the hop of all input features, or of the hop of
            a student's frames, so that it has the same frames wherever a crop starts.
    """

    start: np.ndarray
    samples: int
    grid: int = HOP

    def period(self, samples: np.ndarray) -> np.ndarray:
        """After how many samples views of so many samples begin again (B,): one length for every target. Every kind of
        input features has rows up to there."""
        whole = FBANK.num_frames(samples) * HOP
        return np.where(whole < self.grid, whole, whole // self.grid * self.grid)


@dataclass(frozen=True)
class Rows:
    """Which rows of a target belong to a crop, for each view of a batch.

    Rows 0 to `used` follow one another again and again, as far as the view is repeated; `height` of them are taken,
    from number `skip` of this sequence on.

    Attributes:
        skip: (B,).
        used: (B,).
        height: one for all views.
    """

    skip: np.ndarray
    used: np.ndarray
    height: int

    @classmethod
    def of(cls, target: Target, samples: np.ndarray, crop: Crop) -> Rows:
        """The rows of a target at frame level of views of so many samples (B,).

        As many as a view of the crop's length has; where the view is not repeated, those of which the middle is nearest
        to the middle of the crop. Of input features, these are exactly the rows of the crop itself.
        """
        hop, height, count = target.hop or 1, target.num_frames(crop.samples), target.num_frames(samples)
        # Twice the time of everything, since the middle of a crop may be half a sample.
        middle = 2 * crop.start + crop.samples - round(2 * target.middle) - (height - 1) * hop
        first = ((middle + hop) // (2 * hop)).clip(0, np.maximum(count - height, 0))
        is_whole = crop.start + crop.samples <= samples
        if is_whole.all():
            return cls(first, count, height)
        period = crop.period(samples)
        used = np.minimum(count, -(-period // hop))
        lap, rest = np.divmod(crop.start, period)
        skip = lap * used + np.minimum(-(-rest // hop), used)
        return cls(np.where(is_whole, first, skip), np.where(is_whole, count, used), height)

    @property
    def follow(self) -> bool:
        """Whether the rows of every view are one piece."""
        return bool((self.skip + self.height <= self.used).all())

    @property
    def numbers(self) -> np.ndarray:
        """(B, height): the rows, counted within each view."""
        return self._places % self.used[:, None]

    @property
    def laps(self) -> np.ndarray:
        """(B, height): how often the view began again before each row."""
        return self._places // self.used[:, None]

    @property
    def _places(self) -> np.ndarray:
        return self.skip[:, None] + np.arange(self.height)
