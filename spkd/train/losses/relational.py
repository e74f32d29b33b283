"""Distillation of the relations between views instead of the views themselves."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from spkd.outputs.target import EMBEDDING
from spkd.train.distributed import gathered, own_rows
from spkd.train.losses.base import Loss, LossInputs


class Relational(Loss):
    """mean over i != j of (cos(s_i, s_j) - cos(t_i, t_j))^2: the student learns the teacher's similarities.

    Relational distillation was introduced by Park et al., CVPR 2019, with distances and angles; the cosine, by which
    speakers are compared, is this project's choice. Widths may differ, since there is no learnt projection. The loss of
    a batch of one view is 0.
    """

    learns_from = "similarities of `embedding` within the batch"
    needs = (EMBEDDING,)

    def forward(self, student: dict[str, Tensor], inputs: LossInputs) -> Tensor:
        s, t = normalize(student[EMBEDDING].float(), dim=-1), normalize(inputs.targets[EMBEDDING].float(), dim=-1)
        all_students = gathered(s)
        difference = (s @ all_students.mT - t @ gathered(t).mT).square()
        different = own_rows(s)[:, None] != torch.arange(len(all_students), device=s.device)
        return torch.where(different, difference, 0.0).sum() / max(len(s) * (len(all_students) - 1), 1)
