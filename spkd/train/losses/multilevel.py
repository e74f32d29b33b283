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

EPS = 1e-8  # lower limit of lengths in a cosine
CACHED_NUMBERS = 2**19  # numbers in the vectors that are compared at a time on a CPU: 2 MiB


class MultiLevel(Loss):
    """sum_l w_l * d(P_l student_l, teacher_l) over pairs of a student level and a target.

    d is 1 - cos or the squared difference, averaged over the numbers of a row, then over the rows of a view, then over
    the views. Frames are compared at the teacher's times (see Alignment). `concat` names utterance-level targets that
    are normalised and concatenated into a further target, for the student's embedding.

    The paper's abstract gives the levels (frames, statistics, both segment layers, alone or concatenated) and their
    gains; the distance, the projection and the alignment are this project's choice.
    """

    Settings = MultiLevelSettings
    learns_from = "any pairs of a student level and a target, or targets concatenated"
    needs = (EMBEDDING,)

    def __init__(self, settings: MultiLevelSettings, context: LossContext) -> None:
        """Make the projections. Raises UsageError: a level the student lacks, or frames compared with a vector."""
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
            level_values, target, kept = student[level].float(), inputs.targets[name], None
            if target.ndim == 3:
                # Aligned before the projection, which is linear: the result is the same, with fewer rows to project.
                level_values, target, kept = align(level_values, target, inputs.alignments[name])
            total = total + self._weights.get(level, 1.0) * self._apart(
                self._projected(level, level_values), target, kept
            )
        if self._concat:
            target = torch.cat([normalize(inputs.targets[name].float(), dim=-1) for name in self._concat], -1)
            apart = self._apart(self._projected(CONCAT, student[EMBEDDING].float()), target)
            total = total + self._weights.get(CONCAT, 1.0) * apart
        return total

    def _projected(self, level: str, values: Tensor) -> Tensor:
        return self.project[self._projections[level]](values)

    def _apart(self, student: Tensor, teacher: Tensor, kept: Tensor | None = None) -> Tensor:
        if self._distance == "mse":
            return mean_over_frames((student - teacher).square().mean(-1), kept)
        return mean_over_frames(1.0 - cosines(student, teacher), kept)


class _Cosines(torch.autograd.Function):
    """Cosines of frames, in few passes over memory.

    Frames may be hundreds of megabytes, so the passes over them take the time, most of all those from one memory layout
    to another. The teacher's frames are brought to the student's layout once, a few utterances at a time, and the
    gradient is computed in the forward pass, while they are in the processor's cache.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        together = len(student) if student.is_cuda else max(CACHED_NUMBERS // max(student[0].numel(), 1), 1)
        gradient, cosines_of_parts = torch.empty_like(student), []
        parts = (vectors.split(together) for vectors in (student, teacher, gradient))
        for vectors_a, stored, change in zip(*parts, strict=True):
            vectors_b = torch.empty_like(vectors_a).copy_(stored)
            # vector_norm is slow along an axis that is not the last in memory.
            length_a, length_b = ((v * v).sum(-1).sqrt_().clamp_min_(EPS) for v in (vectors_a, vectors_b))
            scale = 1.0 / (length_a * length_b)
            cosine = (vectors_a * vectors_b).sum(-1) * scale
            torch.mul(vectors_b, scale[..., None], out=change)
            change.addcmul_(vectors_a, (-cosine / length_a.square())[..., None])
            cosines_of_parts.append(cosine)
        ctx.save_for_backward(gradient)
        return torch.cat(cosines_of_parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0][..., None], None


def cosines(student: Tensor, teacher: Tensor) -> Tensor:
    """Cosines (B, ...) of vectors on the last axis.

    Args:
        student: (B, ..., D).
        teacher: (B, ..., D); they get no gradient, and may be in half precision.
    """
    values: Tensor = _Cosines.apply(student, teacher)
    return values
