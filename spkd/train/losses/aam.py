"""Additive angular margin softmax: the classifier alone, no teacher."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, normalize

from spkd.cache import EMBEDDING, Target
from spkd.config import LossConfig
from spkd.train.losses.base import Loss, Said


class AAM(Loss):
    """Cross-entropy over `scale * cos(theta_k + margin [k = y])` (Deng et al., ArcFace, CVPR 2019, eq. 3).

    theta_k is the angle between the embedding (B, D) and row k of `weight` (classes, D). Where theta_y + margin
    would pass pi, the cosine is lowered by 1 - cos(margin) instead, which keeps the logit monotonic and
    continuous (the field's "not easy margin"). With several sub-centres (Deng et al., Sub-center ArcFace, ECCV 2020)
    theta_k is the angle to the nearest of a class's rows, `weight` (classes * sub-centres, D).
    """

    needs_labels = True

    def __init__(self, config: LossConfig, levels: dict[str, Target], targets: dict[str, Target], classes: int) -> None:
        super().__init__(config, levels, targets, classes)
        self.margin, self.scale, self.subcentres = config.margin, config.scale, config.subcentres
        self._rise = config.margin_rise
        rows = classes * config.subcentres
        self.weight = nn.Parameter(nn.init.xavier_normal_(torch.empty(rows, levels[EMBEDDING].dim)))

    def forward(self, student: dict[str, Tensor], said: Said) -> Tensor:
        cosine = linear(normalize(student[EMBEDDING].float(), dim=-1), normalize(self.weight.float(), dim=-1))
        cosine = cosine.unflatten(1, (-1, self.subcentres)).amax(-1)
        margin = self.margin * risen(said.done, self._rise)
        return cross_entropy(self.scale * add_margin(cosine, said.label, margin), said.label)


def risen(done: float, between: list[float]) -> float:
    """How much of the margin is there when a fraction `done` of the run is: 0 before `between`, 1 behind, and
    1 - 0.001^x at the fraction x of the way (WeSpeaker's exponential margin schedule)."""
    start, end = between
    if done >= end:
        return 1.0
    return 0.0 if done < start else 1.0 - 0.001 ** ((done - start) / (end - start))


def add_margin(cosine: Tensor, label: Tensor, margin: float) -> Tensor:
    """cos(theta_y + margin) at the labelled entries of (B, classes), the rest unchanged; rows labelled -1 keep all."""
    at_label = cosine.gather(1, label.clamp_min(0)[:, None])
    # The floor keeps the gradient of the root finite at cosine 1.
    sine = (1.0 - at_label.square()).clamp_min(1e-7).sqrt()
    shifted = at_label * math.cos(margin) - sine * math.sin(margin)
    beyond = at_label <= math.cos(math.pi - margin)
    shifted = torch.where(beyond, at_label - (1.0 - math.cos(margin)), shifted)
    shifted = torch.where(label[:, None] >= 0, shifted, at_label)
    return cosine.scatter(1, label.clamp_min(0)[:, None], shifted)
