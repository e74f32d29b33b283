"""Frames of a student and frames of a teacher that stand for the same times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from spkd.cache import Crop, Rows
from spkd.errors import SpkdError
from spkd.outputs.target import Target

NEAR = 0.5  # student's frames by which a time may be outside the student's first and last frame


@dataclass(frozen=True)
class Alignment:
    """Where the student's frames (B, T, D) have the times of a teacher's frames (B, U, E) of the same crops.

    The student's frames are interpolated linearly between the ones whose windows are centred before and after each of
    the teacher's. Where a view is repeated, nothing is interpolated from its end to its beginning. Frames of the
    teacher that are more than half a frame outside the student's are left out; the nearest one of a view is kept.

    It is made on the host, from the lengths alone: asking the device would make every step wait.

    Attributes:
        frames: T.
        shift: the student's frame at the time of the teacher's first one, where both come in step at the same times in
            every view: then nothing is copied. None: they do not, and what follows counts.
        before: (B, U) the student's frame at that time, or before it.
        share: (B, U) how far the time is on the way to the next frame; None: not at all.
        kept: (B, U) which of the teacher's frames count; None: all of them.
    """

    frames: int
    shift: int | None = None
    before: Tensor | None = None
    share: Tensor | None = None
    kept: Tensor | None = None

    @classmethod
    def of(cls, level: Target, target: Target, samples: np.ndarray, crop: Crop) -> Alignment:
        """The alignment of crops of views of so many samples (B,)."""
        assert level.hop is not None
        assert target.hop is not None
        frames, hop = level.num_frames(crop.samples), level.hop
        rows = Rows.of(target, samples, crop)
        # The times of the teacher's rows after the beginning of the crop, in hops of the student.
        numbers, laps, period = rows.numbers, rows.laps, crop.period(samples)
        begins = laps * period[:, None] - crop.start[:, None]
        place = (numbers * target.hop + begins + (target.middle - level.middle)) / hop
        is_whole = (crop.start + crop.samples <= samples)[:, None]
        shift = float(place[0, 0])
        in_step = target.hop == hop and is_whole.all() and (place[:, 0] == shift).all() and shift.is_integer()
        if in_step and -rows.height < shift < frames:
            return cls(frames, int(shift))
        # The student's first and last frame between two beginnings of the view.
        first = np.where(is_whole, 0, np.ceil(begins / hop).clip(0, frames - 1))
        last = np.where(is_whole, frames - 1, np.ceil((begins + period[:, None]) / hop) - 1).clip(first, frames - 1)
        inside = place.clip(first, last)
        outside = np.where(np.ceil(begins / hop) < frames, np.abs(place - inside), np.inf)
        kept = outside <= np.maximum(outside.min(1, keepdims=True), NEAR)
        before = np.floor(inside)
        share = inside - before
        return cls(
            frames,
            None,
            torch.from_numpy(before.astype(np.int64)),
            torch.from_numpy(share.astype(np.float32)) if share.any() else None,
            None if kept.all() else torch.from_numpy(kept),
        )

    def pin_memory(self) -> Alignment:
        return self._map(lambda values: values.pin_memory())

    def to(self, device: torch.device) -> Alignment:
        return self._map(lambda values: values.to(device, non_blocking=True))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Alignment:
        before, share, kept = (None if x is None else change(x) for x in (self.before, self.share, self.kept))
        return Alignment(self.frames, self.shift, before, share, kept)


def align(mine: Tensor, theirs: Tensor, alignment: Alignment) -> tuple[Tensor, Tensor, Tensor | None]:
    """The student's frames (B, T, D) at the times of the teacher's (B, U, E), and the teacher's: (B, V, ...) both; and
    which of them count, (B, V); None: all.

    Raises:
        SpkdError: the student gives another number of frames than its description says.
    """
    if mine.shape[1] != alignment.frames:
        raise SpkdError(
            f"the student gives {mine.shape[1]} frames of a crop, its levels say {alignment.frames}: its hop or window "
            "is described wrongly"
        )
    if (shift := alignment.shift) is not None:
        first, last = max(shift, 0), min(mine.shape[1], theirs.shape[1] + shift)
        return _slice(mine, first, last - first), theirs[:, first - shift : last - shift], None
    assert alignment.before is not None
    found = _at(mine, alignment.before)
    if alignment.share is not None:
        later = _at(mine, (alignment.before + 1).clamp_max(mine.shape[1] - 1))
        found = torch.lerp(found, later, alignment.share[..., None].to(found.dtype))
    return found, theirs, alignment.kept


def mean_over_frames(values: Tensor, kept: Tensor | None) -> Tensor:
    """Mean of (B, V) over the frames that count of each view, and over the views; values may be (B,) without frames."""
    if kept is None:
        return values.mean()
    return ((values * kept).sum(1) / kept.sum(1)).mean()


def _at(frames: Tensor, numbers: Tensor) -> Tensor:
    """frames (B, T, D) number (B, U) -> (B, U, D), in memory as the frames are: convolutions have time last."""
    if frames.mT.is_contiguous():
        return frames.mT.gather(2, numbers[:, None].expand(-1, frames.shape[2], -1)).mT
    return frames.gather(1, numbers[..., None].expand(-1, -1, frames.shape[2]))


def _slice(frames: Tensor, first: int, count: int) -> Tensor:
    """frames[:, first : first + count], whose gradient is as the frames are in memory: convolutions give them with time
    last, and the gradient of a plain slice has it in the middle."""
    if count == frames.shape[1]:
        return frames
    if frames.mT.is_contiguous():
        return frames.mT[..., first : first + count].mT
    return frames[:, first : first + count]
