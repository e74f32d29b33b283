"""The conventional embedding-level distillation losses (Wang et al., "Knowledge distillation for small foot-print
deep speaker embedding", ICASSP 2019)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cosine_similarity

from spkd.cache import EMBEDDING, Target
from spkd.config import LossConfig
from spkd.train.losses.base import Loss, Said, projection


class Cosine(Loss):
    """mean_i 1 - cos(P s_i, t_i): student (B, Ds) through a linear P where the widths differ, teacher (B, Dt)."""

    needs = (EMBEDDING,)

    def __init__(self, config: LossConfig, levels: dict[str, Target], targets: dict[str, Target], classes: int) -> None:
        super().__init__(config, levels, targets, classes)
        self.project = projection(levels[EMBEDDING].dim, targets[EMBEDDING].dim)

    def forward(self, student: dict[str, Tensor], said: Said) -> Tensor:
        return (1.0 - cosine_similarity(self.project(student[EMBEDDING]).float(), said.targets[EMBEDDING])).mean()


class MSE(Loss):
    """mean_i ||P s_i - t_i||^2, summed over dimensions: the gradient of a view does not shrink with the width."""

    needs = (EMBEDDING,)

    def __init__(self, config: LossConfig, levels: dict[str, Target], targets: dict[str, Target], classes: int) -> None:
        super().__init__(config, levels, targets, classes)
        self.project = projection(levels[EMBEDDING].dim, targets[EMBEDDING].dim)

    def forward(self, student: dict[str, Tensor], said: Said) -> Tensor:
        return (self.project(student[EMBEDDING]).float() - said.targets[EMBEDDING]).square().sum(-1).mean()
