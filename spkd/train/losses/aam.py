"""Additive angular margin softmax: the classifier alone, no teacher."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, normalize

from spkd.cache import EMBEDDING
from spkd.config import LossConfig
from spkd.train.losses.base import Loss, Said


class AAM(Loss):
    """Cross-entropy over `scale * cos(theta_k + margin [k = y])` (Deng et al., ArcFace, CVPR 2019, eq. 3).

    theta_k is the angle between the embedding (B, D) and row k of `weight` (classes, D). Where theta_y + margin
    would pass pi, the cosine is lowered by 1 - cos(margin) instead, which keeps the logit monotonic and
    continuous (the field's "not easy margin").
    """

    needs_labels = True

    def __init__(self, config: LossConfig, levels: dict[str, int], targets: dict[str, int], classes: int) -> None:
        super().__init__(config, levels, targets, classes)
        self.margin, self.scale = config.margin, config.scale
        self.weight = nn.Parameter(nn.init.xavier_normal_(torch.empty(classes, levels[EMBEDDING])))

    def forward(self, student: dict[str, Tensor], said: Said) -> Tensor:
        cosine = linear(normalize(student[EMBEDDING].float(), dim=-1), normalize(self.weight.float(), dim=-1))
        return cross_entropy(self.scale * add_margin(cosine, said.label, self.margin), said.label)


def add_margin(cosine: Tensor, label: Tensor, margin: float) -> Tensor:
    """cos(theta_y + margin) at the labelled entries of (B, classes), the rest unchanged."""
    at_label = cosine.gather(1, label[:, None])
    # The floor keeps the gradient of the root finite at cosine 1.
    sine = (1.0 - at_label.square()).clamp_min(1e-7).sqrt()
    shifted = at_label * math.cos(margin) - sine * math.sin(margin)
    beyond = at_label <= math.cos(math.pi - margin)
    shifted = torch.where(beyond, at_label - (1.0 - math.cos(margin)), shifted)
    return cosine.scatter(1, label[:, None], shifted)
