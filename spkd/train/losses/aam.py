"""Additive angular margin softmax: a classifier of the labelled views, without a teacher."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, normalize

from spkd.errors import UsageError
from spkd.outputs.target import EMBEDDING
from spkd.train.distributed import averaged, gathered, world
from spkd.train.losses.base import Loss, LossContext, LossInputs, TrainedClassifier
from spkd.train.losses.settings import AAMSettings
from spkd.train.sharding import Division, cross_entropy_of_parts, divided, whole


class AAM(Loss):
    """Cross-entropy over `scale * cos(theta_k + margin [k = y])` (Deng et al., ArcFace, CVPR 2019, eq. 3).

    theta_k is the angle between the embedding (B, D) and row k of `weight` (classes, D). Where theta_y + margin
    would exceed pi, the cosine is lowered by 1 - cos(margin) instead, which keeps the logit monotonic and
    continuous (the field's "not easy margin"). With several sub-centres (Deng et al., Sub-center ArcFace, ECCV 2020)
    theta_k is the angle to the nearest of a class's rows, and `weight` is (classes * sub-centres, D). With `sharded`,
    each rank has the rows of some classes, and computes their logits for the views of all ranks. The mean is over the
    views that have a label; it is 0 where a batch has none.
    """

    Settings = AAMSettings
    learns_from = "speaker classes (every speed a class)"
    needs_labels = "some"

    def __init__(self, settings: AAMSettings, context: LossContext) -> None:
        """Make the classifier. Raises UsageError: fewer than two classes, or, where divided, fewer than ranks."""
        super().__init__(settings, context)
        if context.num_classes < 2:
            raise UsageError(f"a classifier over {context.num_classes} speaker classes learns nothing; it needs two")
        if settings.sharded and context.num_classes < world().world:
            raise UsageError(f"loss.aam.sharded: {context.num_classes} speaker classes are fewer than the ranks")
        self.margin, self.scale, self.subcentres = settings.margin, settings.scale, settings.subcentres
        self._warmup = settings.margin_warmup
        rows = context.num_classes * settings.subcentres
        weight = nn.init.xavier_normal_(torch.empty(rows, context.levels[EMBEDDING].dim))
        self._division = Division(rows, settings.subcentres) if settings.sharded and world().world > 1 else None
        self.weight = nn.Parameter(weight) if self._division is None else divided(weight, self._division)

    def forward(self, student: dict[str, Tensor], inputs: LossInputs) -> Tensor:
        margin = margin_of(self.margin, self._warmup, inputs)
        embedding = normalize(student[EMBEDDING].float(), dim=-1)
        if self._division is None:
            return mean_cross_entropy(
                self.scale * add_margin(self._cosines(embedding), inputs.label, margin), inputs.label
            )
        label, first = gathered(inputs.label), self._division.own.start // self.subcentres
        cosine = self._cosines(gathered(embedding))
        is_own = (label >= first) & (label < first + cosine.shape[1])
        cosine = add_margin(cosine, torch.where(is_own, label - first, -1), margin)
        return cross_entropy_of_parts(self.scale * cosine, label, first)

    def _cosines(self, embedding: Tensor) -> Tensor:
        """Cosines (B, classes) of unit embeddings (B, D) with the nearest centre of each of this rank's classes."""
        cosine = linear(embedding, normalize(self.weight.float(), dim=-1))
        return cosine.unflatten(1, (-1, self.subcentres)).amax(-1)

    def classifier(self) -> TrainedClassifier | None:
        # With several sub-centres no single row represents a class.
        if self.subcentres > 1:
            return None
        weight = self.weight if self._division is None else whole(self.weight, self._division)
        return TrainedClassifier(weight, self.scale)


def mean_cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Mean cross-entropy () over the views of all ranks that have a label; 0 where none has one.

    Each rank divides the sum over its views by the ranks' mean count of such views, since gradients are averaged over
    the ranks.

    Args:
        logits: (B, classes).
        label: (B,) class of each view, -1 where it has none.
    """
    labelled = averaged((label >= 0).sum().float())
    total = cross_entropy(logits, label, ignore_index=-1, reduction="sum")
    # A mean count below one is still a count; where there are no labelled views, the sum is 0.
    return total / labelled.clamp_min(1 / world().world)


def margin_of(margin: float, between: list[float], inputs: LossInputs) -> float:
    """Margin of a step: that of large-margin fine-tuning, or the loss's own margin times its ramp."""
    return margin * margin_ramp(inputs.progress, between) if inputs.margin is None else inputs.margin


def margin_ramp(progress: float, between: list[float]) -> float:
    """Fraction of the margin that applies when a fraction `progress` of the run is over.

    It is 0 before `between`, 1 after it, and 1 - 0.001^x at a fraction x of that interval (WeSpeaker's exponential
    margin schedule).
    """
    start, end = between
    if progress >= end:
        return 1.0
    return 0.0 if progress < start else 1.0 - 0.001 ** ((progress - start) / (end - start))


def add_margin(cosine: Tensor, label: Tensor, margin: float) -> Tensor:
    """Cosines (B, classes) with cos(theta_y + margin) at the entry of each view's label.

    Args:
        cosine: (B, classes).
        label: (B,) class of each view; a row with label -1 is unchanged.
        margin: angle (rad).
    """
    at_label = cosine.gather(1, label.clamp_min(0)[:, None])
    # The floor keeps the gradient of the root finite at cosine 1.
    sine = (1.0 - at_label.square()).clamp_min(1e-7).sqrt()
    shifted = at_label * math.cos(margin) - sine * math.sin(margin)
    beyond = at_label <= math.cos(math.pi - margin)
    shifted = torch.where(beyond, at_label - (1.0 - math.cos(margin)), shifted)
    shifted = torch.where(label[:, None] >= 0, shifted, at_label)
    return cosine.scatter(1, label.clamp_min(0)[:, None], shifted)
