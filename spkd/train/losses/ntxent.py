"""Self-supervised contrast between two crops: what label-free distillation has to beat."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from spkd.outputs.target import EMBEDDING
from spkd.train.distributed import gathered, own_rows
from spkd.train.losses.base import Loss, LossContext, LossInputs
from spkd.train.losses.settings import NTXentSettings


class NTXent(Loss):
    """NT-Xent of SimCLR (Chen et al., ICML 2020, eq. 1): no teacher, no labels.

    With u (2B, D) the normalised embeddings of two crops of each instance, in the order of the views, and p(i) the
    other
    crop of i: mean_i -log( exp(u_i.u_p(i) / tau) / sum_{k != i} exp(u_i.u_k / tau) ). Views of one instance (the same
    utterance at the same speed) that meet in a batch are no negatives of one another.
    """

    Settings = NTXentSettings
    learns_from = "another crop of the same instance"

    def __init__(self, settings: NTXentSettings, context: LossContext) -> None:
        super().__init__(settings, context)
        self.temperature = settings.temperature

    @classmethod
    def further_crops(cls, settings: NTXentSettings) -> tuple[float, ...]:
        return (0.0,)

    def forward(self, student: dict[str, Tensor], inputs: LossInputs) -> Tensor:
        first, second = (normalize(levels[EMBEDDING].float(), dim=-1) for levels in (student, inputs.other_levels[0]))
        own, unit = torch.cat([first, second]), torch.cat([gathered(first), gathered(second)])
        batch = len(unit) // 2
        rows = own_rows(first)
        positive = torch.cat([rows + batch, rows])
        mine, instance = inputs.instance.repeat(2), gathered(inputs.instance).repeat(2)
        excluded = (mine[:, None] == instance).scatter(1, positive[:, None], False)
        return cross_entropy((own @ unit.mT / self.temperature).masked_fill(excluded, -torch.inf), positive)
