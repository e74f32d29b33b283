"""Conventional embedding-level distillation losses (Wang et al., "Knowledge distillation for small foot-print
deep speaker embedding", ICASSP 2019)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cosine_similarity

from spkd.outputs.target import EMBEDDING
from spkd.train.losses.base import Loss, LossContext, LossInputs, projection
from spkd.train.losses.settings import LossSettings


class Cosine(Loss):
    """mean_i 1 - cos(P s_i, t_i): student (B, Ds) through a linear P where the widths differ, teacher (B, Dt)."""

    learns_from = "`embedding`"
    needs = (EMBEDDING,)

    def __init__(self, settings: LossSettings, context: LossContext) -> None:
        super().__init__(settings, context)
        self.project = projection(context.levels[EMBEDDING].dim, context.targets[EMBEDDING].dim)

    def forward(self, student: dict[str, Tensor], inputs: LossInputs) -> Tensor:
        return (1.0 - cosine_similarity(self.project(student[EMBEDDING].float()), inputs.targets[EMBEDDING])).mean()


class MSE(Cosine):
    """mean_i ||P s_i - t_i||^2, summed over dimensions: the gradient of a view does not shrink with the width."""

    def forward(self, student: dict[str, Tensor], inputs: LossInputs) -> Tensor:
        return (self.project(student[EMBEDDING].float()) - inputs.targets[EMBEDDING]).square().sum(-1).mean()
