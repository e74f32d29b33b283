"""Distillation by the codes of a teacher's frames (arXiv 2211.00508)."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from spkd.cache.codec import Coded, make_codec
from spkd.errors import UsageError, did_you_mean
from spkd.outputs.target import CODES, Target
from spkd.train.alignment import align, every, mean_over_frames
from spkd.train.losses.base import Loss, LossContext, LossInputs
from spkd.train.losses.settings import CodebookSettings


class Codebook(Loss):
    """Cross-entropy of a teacher's codes: -1/M sum_m log softmax(W_m x + b_m)[i_m].

    A codec with codebooks (`rqMxB`, `lsqMxB`, `pqMx8`, ...) stores a row of a target as M indexes i_m. The student has
    a linear classifier over each codebook's entries (W_m, b_m), which is dropped at export; x is the student's row.
    The mean is taken over the rows of a view, then over the views. Frames are compared at the teacher's times (see
    Alignment), one every `hop` seconds: codes of neighbours are much the same, and to compare all of them takes several
    times as long as the rest of a step.

    Multi-codebook vector quantisation (MVQ, arXiv 2211.00508) sums over the codebooks; here it is the mean, so that the
    weight of the loss does not depend on their number.
    """

    Settings = CodebookSettings
    learns_from = "codes of frames, or of vectors, from a cache whose codec has codebooks"
    needs = ("frames" + CODES,)

    def __init__(self, settings: CodebookSettings, context: LossContext) -> None:
        """Make the classifiers. Raises UsageError: a level the student lacks, or frames compared with a vector."""
        super().__init__(settings, context)
        self._pairs = dict(settings.levels)
        self._shapes: dict[str, tuple[int, int]] = {}
        self._strides: dict[str, int] = {}
        self.classify = nn.ModuleDict()
        for number, (level, name) in enumerate(self._pairs.items()):
            if level not in context.levels:
                raise UsageError(
                    f"loss.codebook.levels: the student has no level {level!r}{did_you_mean(level, context.levels)}"
                )
            codes = context.targets[name + CODES]
            if (context.levels[level].hop is not None) != (codes.hop is not None):
                raise UsageError(f"loss.codebook.levels: {level}: {name} compares frames with a vector")
            self._shapes[level] = codes.dim, classes(codes)
            if codes.rate is not None:
                self._strides[level] = max(round(settings.hop * codes.rate), 1)
            # Module names must not hold dots.
            self.classify[f"level{number}"] = nn.Linear(context.levels[level].dim, codes.dim * classes(codes))

    def forward(self, student: dict[str, Tensor], inputs: LossInputs) -> Tensor:
        total = torch.zeros((), device=inputs.label.device)
        for (level, name), classify in zip(self._pairs.items(), self.classify.values(), strict=True):
            values, codes, kept = student[level].float(), inputs.targets[name + CODES], None
            if codes.ndim == 3:
                aligned = align(values, codes, inputs.alignments[name + CODES])
                values, codes, kept = every(self._strides[level], *aligned)
            logits = classify(values).unflatten(-1, self._shapes[level])  # (B, V, M, classes) or (B, M, classes)
            lost = cross_entropy(logits.flatten(0, -2), codes.long().flatten(), reduction="none")
            total = total + mean_over_frames(lost.view(codes.shape).mean(-1), kept)
        return total


def classes(codes: Target) -> int:
    """Number of values of each code."""
    return cast(Coded, make_codec(codes.codec, codes.dim)).classes
