"""Label-free distillation by contrast (Peng et al., arXiv 2212.03090)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from spkd.cache import EMBEDDING, Target
from spkd.config import LossConfig
from spkd.train.losses.base import Loss, Said, projection

CEILING = 0.95  # teacher cosine of what is likely the same voice


class Contrastive(Loss):
    """-mean_i log( exp(s_i.t_i / tau) / sum_j exp(s_i.t_j / tau) ), s and t L2-normalised, j over the batch and, where
    they are mined, over the hard negatives of view i.

    The abstract says that the contrastive loss of self-supervised learning replaces cosine and MSE; the equation,
    tau = 0.05 and what follows are this project's reading. A view j is no negative of i where it is known or likely
    to be the same voice: the same utterance at the same speed, or teacher cosine t_i.t_j above the ceiling. Labels
    are never looked at.

    Shapes: student (B, Ds) through a linear map where the widths differ, teacher (B, Dt).
    """

    needs = (EMBEDDING,)

    def __init__(self, config: LossConfig, levels: dict[str, Target], targets: dict[str, Target], classes: int) -> None:
        super().__init__(config, levels, targets, classes)
        self.temperature = config.temperature
        self.ceiling = CEILING if config.ceiling is None else config.ceiling
        self.project = projection(levels[EMBEDDING].dim, targets[EMBEDDING].dim)

    def forward(self, student: dict[str, Tensor], said: Said) -> Tensor:
        teacher = normalize(said.targets[EMBEDDING], dim=-1)
        mine = normalize(self.project(student[EMBEDDING]).float(), dim=-1)
        similarity = mine @ teacher.mT / self.temperature
        same_voice = (said.voice[:, None] == said.voice) | (teacher @ teacher.mT > self.ceiling)
        positive = torch.eye(len(teacher), dtype=torch.bool, device=teacher.device)
        logits = similarity.masked_fill(same_voice & ~positive, -torch.inf)
        if said.negatives is not None:
            hard = normalize(said.negatives.float(), dim=-1)
            logits = torch.cat([logits, torch.einsum("bd,bnd->bn", mine, hard) / self.temperature], 1)
        return cross_entropy(logits, torch.arange(len(teacher), device=teacher.device))
