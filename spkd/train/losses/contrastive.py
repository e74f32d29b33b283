"""Label-free distillation by contrast (Peng et al., arXiv 2212.03090)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from spkd.outputs.target import EMBEDDING
from spkd.train.distributed import gathered, own_rows
from spkd.train.losses.base import Loss, LossContext, LossInputs, projection
from spkd.train.losses.settings import ContrastiveSettings

CEILING = 0.95  # teacher cosine above which two views are likely to be of one speaker


class Contrastive(Loss):
    """-mean_i log( exp(s_i.t_i / tau) / sum_j exp(s_i.t_j / tau) ), s and t L2-normalised.

    The sum is over the views j of the batch and, where they are mined, over the hard negatives of view i.

    The abstract says that the contrastive loss of self-supervised learning replaces cosine and MSE; the equation,
    tau = 0.05 and the following are this project's reading. A view j is not used as a negative of i where it is known
    or likely to be of the same speaker: it is of the same instance, or its teacher cosine t_i.t_j exceeds the ceiling.
    Hard negatives above the ceiling are left out too. Labels are never used.

    Shapes: student (B, Ds) through a linear map where the widths differ, teacher (B, Dt).
    """

    Settings = ContrastiveSettings
    learns_from = "`embedding`, against the batch and mined negatives"
    needs = (EMBEDDING,)

    def __init__(self, settings: ContrastiveSettings, context: LossContext) -> None:
        super().__init__(settings, context)
        self.temperature = settings.temperature
        self.ceiling = CEILING if settings.ceiling is None else settings.ceiling
        self.project = projection(context.levels[EMBEDDING].dim, context.targets[EMBEDDING].dim)

    def forward(self, student: dict[str, Tensor], inputs: LossInputs) -> Tensor:
        teacher = normalize(inputs.targets[EMBEDDING], dim=-1)
        student_unit = normalize(self.project(student[EMBEDDING].float()), dim=-1)
        all_teachers, instance, own_columns = gathered(teacher), gathered(inputs.instance), own_rows(teacher)
        similarity = student_unit @ all_teachers.mT / self.temperature
        same_speaker = (inputs.instance[:, None] == instance) | (teacher @ all_teachers.mT > self.ceiling)
        positive = own_columns[:, None] == torch.arange(len(all_teachers), device=own_columns.device)
        logits = similarity.masked_fill(same_speaker & ~positive, -torch.inf)
        if inputs.negatives is not None:
            hard = normalize(inputs.negatives.float(), dim=-1)
            allowed = torch.einsum("bd,bnd->bn", teacher, hard) <= self.ceiling
            if inputs.is_negative is not None:
                allowed = allowed & inputs.is_negative
            against = torch.einsum("bd,bnd->bn", student_unit, hard) / self.temperature
            logits = torch.cat([logits, against.masked_fill(~allowed, -torch.inf)], 1)
        return cross_entropy(logits, own_columns)
