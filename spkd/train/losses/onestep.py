"""One-step distillation and fine-tuning (OS-KDFT: Heo et al., Interspeech 2023, arXiv 2305.17394)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, logsigmoid

from spkd.cache import EMBEDDING, Target
from spkd.config import LossConfig
from spkd.errors import UsageError
from spkd.models.network import FRAME_LEVEL
from spkd.train.losses.aam import AAM
from spkd.train.losses.base import Loss, Said
from spkd.train.losses.multilevel import align


class OneStep(Loss):
    """weight * KD + tuning * FT: two paths through one student in one batch.

    KD teaches the path without adapters, on views that need no label: from its last hidden layer h (B, T, D) one
    prediction head P_l (linear, GELU, linear) for each target l says the teacher's frames t_l (B, U, D_l):

        KD = mean_b sum_l [ mean_{t,d} |P_l(h) - t_l|  -  lambda * mean_t log sigmoid cos(P_l(h)_t, t_l,t) ]

    (DistilHuBERT's, as in the authors' code for HuBERT and WavLM, which sums the second term over t instead: `over_time
    = sum`, more than a thousand times FT in the end.) `distance = mse` is their variant for XLSR: the squared
    difference, which they weight by 100 and let fade linearly to 0 over the run (`fade`).
    FT classifies the speakers of other, labelled views from the path through the adapters: a plain softmax, or AAM.

    So FT alone reaches the adapters, the pooling and the embedding, KD alone the prediction heads, both the layers
    they share. At export the heads and the classifier are dropped.
    """

    @classmethod
    def tunes(cls, config: LossConfig) -> bool:
        return config.one_step.tuning > 0

    @classmethod
    def needed(cls, config: LossConfig) -> tuple[str, ...]:
        return tuple(config.one_step.targets)

    def __init__(self, config: LossConfig, levels: dict[str, Target], targets: dict[str, Target], classes: int) -> None:
        """Raises UsageError: a target that is no frames."""
        super().__init__(config, levels, targets, classes)
        self._config = config.one_step
        if not self._config.targets:
            raise UsageError("loss.one_step.targets: name at least one target")
        self._targets = [targets[name] for name in self._config.targets]
        if wrong := [target.name for target in self._targets if target.hop is None]:
            raise UsageError(f"loss.one_step.targets: {wrong[0]} is a vector, not frames")
        self._level = levels[FRAME_LEVEL]
        dim = self._level.dim
        self.predict = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, target.dim)) for target in self._targets
        )
        self.classify: nn.Module | None = None
        if self._config.tuning > 0 and self._config.classifier == "aam":
            self.classify = AAM(config, levels, targets, classes)
        elif self._config.tuning > 0:
            self.classify = nn.Linear(levels[EMBEDDING].dim, classes)

    def forward(self, student: dict[str, Tensor], said: Said) -> Tensor:
        weight = self._config.weight * (1.0 - said.done if self._config.fade else 1.0)
        total = weight * self.distillation(student[FRAME_LEVEL], said)
        return total + self._config.tuning * self.fine_tuning(said) if self._config.tuning > 0 else total

    def distillation(self, frames: Tensor, said: Said) -> Tensor:
        total = torch.zeros((), device=frames.device)
        for predict, target in zip(self.predict, self._targets, strict=True):
            mine, theirs = align(predict(frames.float()), said.targets[target.name].float(), self._level, target)
            if self._config.distance == "mse":
                total = total + (mine - theirs).square().mean()
                continue
            likeness = logsigmoid(cosine_similarity(mine, theirs, dim=-1))
            likeness = likeness.sum(1) if self._config.over_time == "sum" else likeness.mean(1)
            total = total + (mine - theirs).abs().mean() - self._config.cosine * likeness.mean()
        return total

    def fine_tuning(self, said: Said) -> Tensor:
        assert self.classify is not None
        if isinstance(self.classify, AAM):
            return self.classify(said.tuned, Said({}, said.tuned_label, said.voice, done=said.done))
        return cross_entropy(self.classify(said.tuned[EMBEDDING].float()), said.tuned_label)
