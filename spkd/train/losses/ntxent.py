"""Self-supervised contrast between two crops: what label-free distillation has to beat."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from spkd.cache import EMBEDDING, Target
from spkd.config import LossConfig
from spkd.train.losses.base import Loss, Said


class NTXent(Loss):
    """NT-Xent of SimCLR (Chen et al., ICML 2020, eq. 1): no teacher, no labels.

    With u (2B, D) the normalised embeddings of two crops of each voice, in the order of the views, and p(i) the other
    crop of i: mean_i -log( exp(u_i.u_p(i) / tau) / sum_{k != i} exp(u_i.u_k / tau) ). Views of one voice (the same
    utterance at the same speed) that meet in a batch are no negatives of one another.
    """

    def __init__(self, config: LossConfig, levels: dict[str, Target], targets: dict[str, Target], classes: int) -> None:
        super().__init__(config, levels, targets, classes)
        self.temperature = config.temperature

    @classmethod
    def crops(cls, config: LossConfig) -> tuple[float, ...]:
        return (0.0,)

    def forward(self, student: dict[str, Tensor], said: Said) -> Tensor:
        pair = torch.cat([student[EMBEDDING], said.others[0][EMBEDDING]])
        unit = normalize(pair.float(), dim=-1)
        batch = len(said.voice)
        positive = torch.arange(2 * batch, device=unit.device).roll(batch)
        voice = torch.cat([said.voice, said.voice])
        excluded = (voice[:, None] == voice).scatter(1, positive[:, None], False)
        return cross_entropy((unit @ unit.mT / self.temperature).masked_fill(excluded, -torch.inf), positive)
