"""Distillation at several levels of an x-vector teacher (arXiv 2303.01125)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from spkd.errors import UsageError, did_you_mean
from spkd.outputs.target import EMBEDDING
from spkd.train.alignment import align, mean_over_frames
from spkd.train.losses.base import Loss, LossContext, LossInputs, projection
from spkd.train.losses.settings import CONCAT, MultiLevelSettings

EPS = 1e-8  # least length in a cosine
CACHED_NUMBERS = 2**19  # of the vectors that are compared at a time on a CPU: 2 MiB


class MultiLevel(Loss):
    """sum_l w_l * d(P_l student_l, teacher_l) over pairs of a student level and a target; d = 1 - cos, or the squared
    difference, averaged over the numbers of a row, over the rows of a view and over the views.

    Frames are compared at the teacher's times (see Alignment). `concat` names
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
        # Module names must not hold dots.
        widths = {level: (levels[level].dim, targets[name].dim) for level, name in self._pairs.items()}
        if self._concat:
            widths[CONCAT] = (levels[EMBEDDING].dim, sum(targets[name].dim for name in self._concat))
        self._projections = {level: f"level{i}" for i, level in enumerate(widths)}
        self.project = nn.ModuleDict({self._projections[level]: projection(*width) for level, width in widths.items()})

    def forward(self, student: dict[str, Tensor], inputs: LossInputs) -> Tensor:
        total = torch.zeros((), device=inputs.label.device)
        for level, name in self._pairs.items():
            mine, theirs, kept = student[level].float(), inputs.targets[name], None
            if theirs.ndim == 3:
                # Not after the projection, which may have more rows to take and gives the same: it is linear.
                mine, theirs, kept = align(mine, theirs, inputs.alignments[name])
            total = total + self._weights.get(level, 1.0) * self._apart(self._projected(level, mine), theirs, kept)
        if self._concat:
            theirs = torch.cat([normalize(inputs.targets[name].float(), dim=-1) for name in self._concat], -1)
            apart = self._apart(self._projected(CONCAT, student[EMBEDDING].float()), theirs)
            total = total + self._weights.get(CONCAT, 1.0) * apart
        return total

    def _projected(self, level: str, values: Tensor) -> Tensor:
        return self.project[self._projections[level]](values)

    def _apart(self, mine: Tensor, theirs: Tensor, kept: Tensor | None = None) -> Tensor:
        if self._distance == "mse":
            return mean_over_frames((mine - theirs).square().mean(-1), kept)
        return mean_over_frames(1.0 - cosines(mine, theirs), kept)


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
