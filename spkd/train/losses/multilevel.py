"""Distillation at several levels of an x-vector teacher (arXiv 2303.01125)."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from spkd.errors import UsageError, did_you_mean
from spkd.outputs.target import EMBEDDING, Target
from spkd.train.losses.base import Loss, LossContext, LossInputs, projection
from spkd.train.losses.settings import CONCAT, MultiLevelSettings

EPS = 1e-8  # least length in a cosine
CACHED_NUMBERS = 2**19  # of the vectors that are compared at a time on a CPU: 2 MiB


class MultiLevel(Loss):
    """sum_l w_l * d(P_l student_l, teacher_l) over pairs of a student level and a target; d = 1 - cos, or the squared
    difference, averaged over the numbers of a row and over the rows.

    Frames are compared at the teacher's times: the student's are interpolated linearly between those whose windows
    are centred before and after; rows of the teacher that are outside the student's are left out. `concat` names
    utterance-level targets; normalised and concatenated they are one more target, for the student's embedding.

    The paper's abstract says which levels (frames, statistics, both segment layers, alone or concatenated) and what
    they gain; the distance, the projection and the alignment are this project's.
    """

    Settings = MultiLevelSettings
    learns_from = "any pairs of a student level and a target, or targets concatenated"
    needs = (EMBEDDING,)

    def __init__(self, settings: MultiLevelSettings, context: LossContext) -> None:
        """Raises UsageError: a level the student lacks, or frames against a vector."""
        super().__init__(settings, context)
        levels, targets = context.levels, context.targets
        self._pairs, self._concat, self._distance = dict(settings.levels), list(settings.concat), settings.distance
        self._weights = settings.level_weights
        for level, name in self._pairs.items():
            if level not in levels:
                raise UsageError(
                    f"loss.multilevel.levels: the student has no level {level!r}{did_you_mean(level, levels)}"
                )
            if (levels[level].hop is not None) != (targets[name].hop is not None):
                raise UsageError(f"loss.multilevel.levels: {level}: {name} compares frames with a vector")
        if wrong := [name for name in self._concat if targets[name].hop is not None]:
            raise UsageError(f"loss.multilevel.concat: {wrong[0]} is frames, not a vector")
        self._targets = {level: targets[name] for level, name in self._pairs.items()}
        self._levels = levels
        # Module names must not hold dots.
        widths = {level: (levels[level].dim, target.dim) for level, target in self._targets.items()}
        if self._concat:
            widths[CONCAT] = (levels[EMBEDDING].dim, sum(targets[name].dim for name in self._concat))
        self._projections = {level: f"level{i}" for i, level in enumerate(widths)}
        self.project = nn.ModuleDict({self._projections[level]: projection(*width) for level, width in widths.items()})

    def forward(self, student: dict[str, Tensor], inputs: LossInputs) -> Tensor:
        total = torch.zeros((), device=inputs.label.device)
        for level, name in self._pairs.items():
            mine, theirs = student[level].float(), inputs.targets[name]
            if theirs.ndim == 3:
                # Not after the projection, which may have more rows to take and gives the same: it is linear.
                mine, theirs = align(mine, theirs, self._levels[level], self._targets[level])
            total = total + self._weights.get(level, 1.0) * self._apart(self._projected(level, mine), theirs)
        if self._concat:
            theirs = torch.cat([normalize(inputs.targets[name].float(), dim=-1) for name in self._concat], -1)
            apart = self._apart(self._projected(CONCAT, student[EMBEDDING].float()), theirs)
            total = total + self._weights.get(CONCAT, 1.0) * apart
        return total

    def _projected(self, level: str, values: Tensor) -> Tensor:
        return self.project[self._projections[level]](values)

    def _apart(self, mine: Tensor, theirs: Tensor) -> Tensor:
        if self._distance == "mse":
            return (mine - theirs).square().mean()
        return (1.0 - cosines(mine, theirs)).mean()


def align(mine: Tensor, theirs: Tensor, level: Target, target: Target) -> tuple[Tensor, Tensor]:
    """The student's frames (B, T, D), at the times of the teacher's (B, U, E): both (B, V, ...), V <= U. A window is
    taken for its centre; at least one row is kept."""
    inside, before, share = _places(mine.shape[1], theirs.shape[1], level, target)
    first = before[0]
    if share is None and before == tuple(range(first, first + len(before))):
        mine = _slice(mine, first, len(before))  # frame by frame: nothing is copied
    else:
        index = torch.tensor(before, device=mine.device)
        earlier = mine.index_select(1, index)
        if share is None:
            mine = earlier
        else:
            later = mine.index_select(1, (index + 1).clamp_max(mine.shape[1] - 1))
            mine = torch.lerp(earlier, later, torch.tensor(share, device=mine.device)[:, None])
    return mine, theirs[:, inside]


def _slice(frames: Tensor, first: int, count: int) -> Tensor:
    """frames[:, first : first + count], whose gradient is as the frames are in memory: convolutions give them with time
    last, and the gradient of a plain slice has it in the middle."""
    if count == frames.shape[1]:
        return frames
    if frames.mT.is_contiguous():
        return frames.mT[..., first : first + count].mT
    return frames[:, first : first + count]


@lru_cache(maxsize=1024)
def _places(
    mine: int, theirs: int, level: Target, target: Target
) -> tuple[slice, tuple[int, ...], tuple[float, ...] | None]:
    """Which of the teacher's frames have a time among the student's; of each the student's frame before it, and how far
    it is on the way to the next one (None: it is at each one's very time). From the shapes alone, on the host: asking
    the device would make every step wait."""
    assert target.hop is not None
    assert level.hop is not None
    place = (np.arange(theirs) * target.hop + target.window / 2 - level.window / 2) / level.hop
    inside = np.flatnonzero((place >= -0.5) & (place <= mine - 0.5))
    if not len(inside):
        inside = np.array([np.abs(place).argmin()])
    place = place[inside].clip(0, mine - 1)
    before = np.floor(place).astype(int)
    share = place - before
    found = tuple(before.tolist())
    return slice(int(inside[0]), int(inside[-1]) + 1), found, tuple(share.tolist()) if share.any() else None


class _Cosines(torch.autograd.Function):
    """Frames may be hundreds of megabytes, and passes over them are what costs time, most of all from one memory layout
    to another. The teacher's are brought to the student's layout once, a few utterances at a time, and the gradient is
    made in the forward pass, while they are in the processor's cache."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, theirs: Tensor) -> Tensor:
        together = len(mine) if mine.is_cuda else max(CACHED_NUMBERS // max(mine[0].numel(), 1), 1)
        gradient, found = torch.empty_like(mine), []
        parts = (vectors.split(together) for vectors in (mine, theirs, gradient))
        for own, stored, change in zip(*parts, strict=True):
            other = torch.empty_like(own).copy_(stored)
            # Not vector_norm, which is slow along an axis that is not the last in memory.
            length, other_length = ((v * v).sum(-1).sqrt_().clamp_min_(EPS) for v in (own, other))
            scale = 1.0 / (length * other_length)
            cosine = (own * other).sum(-1) * scale
            torch.mul(other, scale[..., None], out=change)
            change.addcmul_(own, (-cosine / length.square())[..., None])
            found.append(cosine)
        ctx.save_for_backward(gradient)
        return torch.cat(found)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0][..., None], None


def cosines(mine: Tensor, theirs: Tensor) -> Tensor:
    """Of the vectors on the last axis, (B, ..., D) each -> (B, ...). The teacher's (`theirs`) get no gradient, and may
    be in half precision."""
    found: Tensor = _Cosines.apply(mine, theirs)
    return found
