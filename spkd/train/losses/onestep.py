"""One-step distillation and fine-tuning (OS-KDFT: Heo et al., Interspeech 2023, arXiv 2305.17394)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, logsigmoid

from spkd.errors import UsageError
from spkd.networks.network import FRAME_LEVEL
from spkd.outputs.target import EMBEDDING
from spkd.train.alignment import align, mean_over_frames
from spkd.train.losses.aam import AAM
from spkd.train.losses.base import Loss, LossContext, LossInputs, TrainedClassifier
from spkd.train.losses.multilevel import cosines
from spkd.train.losses.settings import OneStepSettings


class OneStep(Loss):
    """weight * KD + finetune_weight * FT: two paths through one student in one batch.

    KD teaches the path without adapters, on views that need no label: from its last hidden layer h (B, T, D) one
    prediction head P_l (linear, GELU, linear) for each target l predicts the teacher's frames t_l (B, U, D_l):

        KD = mean_b sum_l [ mean_{t,d} |P_l(h) - t_l|  -  lambda * mean_t log sigmoid cos(P_l(h)_t, t_l,t) ]

    (DistilHuBERT's, as in the authors' code for HuBERT and WavLM, which sums the second term over t instead:
    `time_reduction = sum`, more than a thousand times FT in the end.) `distance = mse` is their variant for XLSR: the
    squared difference, which they weight by 100 and let decay linearly to 0 over the run (`linear_decay`).
    FT classifies the speakers of other, labelled views from the path through the adapters: a plain softmax, or AAM.

    So FT alone reaches the adapters, the pooling and the embedding, KD alone the prediction heads, both the layers
    they share. At export the heads and the classifier are dropped.
    """

    Settings = OneStepSettings
    learns_from = "frames through one path, speaker classes through the adapters"

    def __init__(self, settings: OneStepSettings, context: LossContext) -> None:
        """Raises UsageError: a target that is no frames."""
        super().__init__(settings, context)
        self._settings, levels = settings, context.levels
        self._targets = [context.targets[name] for name in settings.targets]
        if wrong := [target.name for target in self._targets if target.hop is None]:
            raise UsageError(f"loss.one_step.targets: {wrong[0]} is a vector, not frames")
        dim = levels[FRAME_LEVEL].dim
        self.predict = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, target.dim)) for target in self._targets
        )
        self.classify: nn.Module | None = None
        if settings.finetune_weight > 0 and settings.classifier == "aam":
            self.classify = AAM(settings.aam, context)
        elif settings.finetune_weight > 0:
            self.classify = nn.Linear(levels[EMBEDDING].dim, context.num_classes)

    def classifier(self) -> TrainedClassifier | None:
        return self.classify.classifier() if isinstance(self.classify, AAM) else None

    def forward(self, student: dict[str, Tensor], inputs: LossInputs) -> Tensor:
        weight = self._settings.weight * (1.0 - inputs.progress if self._settings.linear_decay else 1.0)
        total = weight * self.distillation(student[FRAME_LEVEL], inputs)
        return (
            total + self._settings.finetune_weight * self.finetuning(inputs)
            if self._settings.finetune_weight > 0
            else total
        )

    def distillation(self, frames: Tensor, inputs: LossInputs) -> Tensor:
        total = torch.zeros((), device=frames.device)
        for predict, target in zip(self.predict, self._targets, strict=True):
            name = target.name
            mine, theirs, kept = align(predict(frames.float()), inputs.targets[name], inputs.alignments[name])
            if self._settings.distance == "mse":
                total = total + mean_over_frames((mine - theirs).square().mean(-1), kept)
                continue
            likeness = logsigmoid(cosines(mine, theirs))
            if self._settings.time_reduction == "sum":
                summed = (likeness if kept is None else likeness * kept).sum(1).mean()
            else:
                summed = mean_over_frames(likeness, kept)
            total = total + mean_over_frames((mine - theirs).abs().mean(-1), kept) - self._settings.cosine * summed
        return total

    def finetuning(self, inputs: LossInputs) -> Tensor:
        assert self.classify is not None
        if isinstance(self.classify, AAM):
            labelled = LossInputs(
                {}, inputs.finetune_label, inputs.instance, progress=inputs.progress, margin=inputs.margin
            )
            return self.classify(inputs.finetune_levels, labelled)
        return cross_entropy(self.classify(inputs.finetune_levels[EMBEDDING].float()), inputs.finetune_label)
