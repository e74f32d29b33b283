"""Self-supervised contrastive loss between two crops: the baseline of label-free distillation."""

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

    With u (2B, D) the normalised embeddings of two crops of each view, in the order of the views, and p(i) the other
    crop of i:

        mean_i -log( exp(u_i.u_p(i) / tau) / sum_k exp(u_i.u_k / tau) ),   k = p(i) and the negatives of i

    The two crops of a view are of the same instance or, where positives are mined (SSPS, arXiv 2505.14561), of two
    instances that are assumed to be of one speaker. Crops of two views are not negatives of each other where the views
    share an instance: so a crop is never contrasted with its own instance, nor with that of its positive. (SimCLR and
    SSPS contrast with all other crops; in their large corpora such pairs are rare.)

    Shapes: student (B, D) for each of the two crops.
    """

    Settings = NTXentSettings
    learns_from = "another crop of the same instance"

    def __init__(self, settings: NTXentSettings, context: LossContext) -> None:
        super().__init__(settings, context)
        self.temperature = settings.temperature

    def forward(self, student: dict[str, Tensor], inputs: LossInputs) -> Tensor:
        first, second = (normalize(levels[EMBEDDING].float(), dim=-1) for levels in (student, inputs.other_levels[0]))
        local_units, unit = torch.cat([first, second]), torch.cat([gathered(first), gathered(second)])
        batch = len(unit) // 2
        rows = own_rows(first)
        positive = torch.cat([rows + batch, rows])
        # Instances of both crops of each view, (B, 2), and of the views of all ranks, (N, 2).
        second_instance = inputs.other_instance[0] if inputs.other_instance else inputs.instance
        own_pair = torch.stack([inputs.instance, second_instance], 1)
        pair = gathered(own_pair)
        linked = (own_pair[:, None, :, None] == pair[None, :, None, :]).flatten(2).any(2)
        excluded = linked.repeat(2, 2).scatter(1, positive[:, None], False)
        return cross_entropy((local_units @ unit.mT / self.temperature).masked_fill(excluded, -torch.inf), positive)
