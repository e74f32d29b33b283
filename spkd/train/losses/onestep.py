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

    KD trains the path without adapters, on views that need no label. For each target l, a prediction head P_l (linear,
    GELU, linear) predicts the teacher's frames t_l (B, U, D_l) from the last hidden layer h (B, T, D) of this path:

        KD = mean_b sum_l [ mean_{t,d} |P_l(h) - t_l|  -  lambda * mean_t log sigmoid cos(P_l(h)_t, t_l,t) ]

    This is the loss of DistilHuBERT, as in the authors' code for HuBERT and WavLM. Their code sums the second term over
    t instead (`time_reduction = sum`), so that it is more than a thousand times FT at the end. `distance = mse` is
    their variant for XLSR: the squared difference, which they weight by 100 and decrease linearly to 0 over the run
    (`linear_decay`). FT classifies the speakers of other, labelled views from the path through the adapters, by a plain
    softmax or AAM.

    The adapters, the pooling and the embedding are trained by FT alone, the prediction heads by KD alone, and the
    shared layers by both. At export the heads and the classifier are dropped.
    """

    Settings = OneStepSettings
    learns_from = "frames through one path, speaker classes through the adapters"

    def __init__(self, settings: OneStepSettings, context: LossContext) -> None:
        """Make the heads and the classifier. Raises UsageError: a target that is not frames."""
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
            predicted, teacher, kept = align(predict(frames.float()), inputs.targets[name], inputs.alignments[name])
            if self._settings.distance == "mse":
                total = total + mean_over_frames((predicted - teacher).square().mean(-1), kept)
                continue
            likeness = logsigmoid(cosines(predicted, teacher))
            if self._settings.time_reduction == "sum":
                summed = (likeness if kept is None else likeness * kept).sum(1).mean()
            else:
                summed = mean_over_frames(likeness, kept)
            total = (
                total + mean_over_frames((predicted - teacher).abs().mean(-1), kept) - self._settings.cosine * summed
            )
        return total

    def finetuning(self, inputs: LossInputs) -> Tensor:
        assert self.classify is not None
        if isinstance(self.classify, AAM):
            labelled = LossInputs(
                {}, inputs.finetune_label, inputs.instance, progress=inputs.progress, margin=inputs.margin
            )
            return self.classify(inputs.finetune_levels, labelled)
        return cross_entropy(self.classify(inputs.finetune_levels[EMBEDDING].float()), inputs.finetune_label)
