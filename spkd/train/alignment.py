"""Frames of a student and frames of a teacher that stand for the same times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from spkd.cache import Crop, Rows
from spkd.device import sent
from spkd.errors import SpkdError
from spkd.outputs.target import Target

NEAR = 0.5  # student's frames by which a time may be outside the student's first and last frame


@dataclass(frozen=True)
class Alignment:
    """Times of a teacher's frames (B, U, E), expressed in the student's frames (B, T, D) of the same crops.

    For each frame of the teacher, the student's frames are interpolated linearly: between the frame whose window is
    centred before it and the one after it. Where a view is repeated, nothing is interpolated from its end to its
    beginning. Frames of the teacher that are more than half a frame outside the student's are left out, but the
    nearest one of a view is kept.

    It is computed on the host, from the lengths alone: asking the device would make every step wait.

    Attributes:
        frames: number T of the student's frames.
        shift: number of the student's frame at the time of the teacher's first frame, where both have the same hop and
            the same times in every view; then nothing is copied. None: the times differ, the tensors below are used.
        before: (B, U) number of the student's last frame at or before the time of each frame of the teacher.
        share: (B, U) position of that time between this frame (0) and the next one (1); None: all are 0.
        kept: (B, U) whether each of the teacher's frames counts; None: all of them.
    """

    frames: int
    shift: int | None = None
    before: Tensor | None = None
    share: Tensor | None = None
    kept: Tensor | None = None

    @classmethod
    def of(cls, level: Target, target: Target, samples: np.ndarray, crop: Crop) -> Alignment:
        """Alignment of the crops of a batch.

        Args:
            samples: (B,) length of each view.
        """
        assert level.hop is not None
        assert target.hop is not None
        frames, hop = level.num_frames(crop.samples), level.hop
        rows = Rows.of(target, samples, crop)
        # Time of each of the teacher's rows after the beginning of the crop, in hops of the student.
        numbers, laps, period = rows.numbers, rows.laps, crop.period(samples)
        begins = laps * period[:, None] - crop.start[:, None]
        place = (numbers * target.hop + begins + (target.middle - level.middle)) / hop
        is_whole = (crop.start + crop.samples <= samples)[:, None]
        # The same hop, no crop that wraps around, and whole frames between: a shift describes it all.
        shift = float(place[0, 0])
        in_step = target.hop == hop and is_whole.all() and (place[:, 0] == shift).all() and shift.is_integer()
        if in_step and -rows.height < shift < frames:
            return cls(frames, int(shift))
        # Otherwise: the student's first and last frame between two beginnings of the (repeated) view.
        first = np.where(is_whole, 0, np.ceil(begins / hop).clip(0, frames - 1))
        last = np.where(is_whole, frames - 1, np.ceil((begins + period[:, None]) / hop) - 1).clip(first, frames - 1)
        inside = place.clip(first, last)
        outside = np.where(np.ceil(begins / hop) < frames, np.abs(place - inside), np.inf)
        # Frames of the teacher outside of these, but for the nearest of a view, do not count.
        kept = outside <= np.maximum(outside.min(1, keepdims=True), NEAR)
        # Whole and fractional part of the time: the frame before, and the weight of the next one.
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
        return self._map(lambda values: sent(values, device))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Alignment:
        before, share, kept = (None if x is None else change(x) for x in (self.before, self.share, self.kept))
        return Alignment(self.frames, self.shift, before, share, kept)


def align(student: Tensor, teacher: Tensor, alignment: Alignment) -> tuple[Tensor, Tensor, Tensor | None]:
    """Frames of student and teacher at the same times.

    Args:
        student: (B, T, D) frames.
        teacher: (B, U, E) frames of the same crops.
    Returns:
        (B, V, D) the student's frames at the teacher's times.
        (B, V, E) the teacher's frames.
        (B, V) whether each of them counts; None: all.
    Raises:
        SpkdError: the student gives another number of frames than its description says.
    """
    if student.shape[1] != alignment.frames:
        raise SpkdError(
            f"the student gives {student.shape[1]} frames of a crop, its levels say {alignment.frames}: its hop or "
            "window is described wrongly"
        )
    if (shift := alignment.shift) is not None:
        first, last = max(shift, 0), min(student.shape[1], teacher.shape[1] + shift)
        return _slice(student, first, last - first), teacher[:, first - shift : last - shift], None
    assert alignment.before is not None
    aligned = _at(student, alignment.before)
    if alignment.share is not None:
        later = _at(student, (alignment.before + 1).clamp_max(student.shape[1] - 1))
        aligned = torch.lerp(aligned, later, alignment.share[..., None].to(aligned.dtype))
    return aligned, teacher, alignment.kept


def every(stride: int, student: Tensor, teacher: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """One of every `stride` aligned frames, from the first one of each view that counts.

    Args:
        student: (B, V, D) frames.
        teacher: (B, V, E) frames at the same times.
        kept: (B, V) whether each of them counts; None: all.
    Returns:
        The same three with ceil(V / stride) frames.
    """
    if stride == 1:
        return student, teacher, kept
    if kept is None:
        thinned = student.mT[..., ::stride].mT if student.mT.is_contiguous() else student[:, ::stride]
        return thinned, teacher[:, ::stride], None
    first = kept.to(torch.uint8).argmax(1, keepdim=True)
    numbers = first + torch.arange(0, kept.shape[1], stride, device=kept.device)
    inside = numbers.clamp_max(kept.shape[1] - 1)
    return _at(student, inside), _at(teacher, inside), kept.gather(1, inside) & (numbers == inside)


def mean_over_frames(values: Tensor, kept: Tensor | None) -> Tensor:
    """Mean over the frames that count of each view, then over the views: ().

    Args:
        values: (B, V) of frames, or (B,) of vectors.
        kept: (B, V) whether a frame counts; None: all.
    """
    if kept is None:
        return values.mean()
    return ((values * kept).sum(1) / kept.sum(1)).mean()


def _at(frames: Tensor, numbers: Tensor) -> Tensor:
    """Frames (B, U, D) of the given numbers (B, U) among frames (B, T, D).

    The result has the memory layout of the frames: convolutions have time last.
    """
    if frames.mT.is_contiguous():
        return frames.mT.gather(2, numbers[:, None].expand(-1, frames.shape[2], -1)).mT
    return frames.gather(1, numbers[..., None].expand(-1, -1, frames.shape[2]))


def _slice(frames: Tensor, first: int, count: int) -> Tensor:
    """frames[:, first : first + count], with a gradient in the memory layout of the frames.

    Convolutions give frames with time last; the gradient of a plain slice would have it in the middle.
    """
    if count == frames.shape[1]:
        return frames
    if frames.mT.is_contiguous():
        return frames.mT[..., first : first + count].mT
    return frames[:, first : first + count]
