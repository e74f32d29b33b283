"""Relations between views instead of the views themselves."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from spkd.outputs.target import EMBEDDING
from spkd.train.distributed import gathered, own_rows
from spkd.train.losses.base import Loss, LossInputs


class Relational(Loss):
    """mean over i != j of (cos(s_i, s_j) - cos(t_i, t_j))^2: the student's similarities are the teacher's.

    Relational distillation as Park et al., CVPR 2019, introduced it, with the cosine (by which speakers are
    compared) in the place of their distances and angles: this project's choice. Widths may differ; nothing is learnt.
    A batch of one view has no relations and no loss.
    """

    learns_from = "similarities of `embedding` within the batch"
    needs = (EMBEDDING,)

    def forward(self, student: dict[str, Tensor], inputs: LossInputs) -> Tensor:
        s, t = normalize(student[EMBEDDING].float(), dim=-1), normalize(inputs.targets[EMBEDDING].float(), dim=-1)
        every = gathered(s)
        difference = (s @ every.mT - t @ gathered(t).mT).square()
        others = own_rows(s)[:, None] != torch.arange(len(every), device=s.device)
        return torch.where(others, difference, 0.0).sum() / max(len(s) * (len(every) - 1), 1)
