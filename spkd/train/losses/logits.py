"""Label-level distillation: the student's classifier learns the teacher's logits over all classes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from spkd.errors import UsageError
from spkd.outputs.target import EMBEDDING, LOGITS
from spkd.train.losses.aam import add_margin, margin_of, mean_cross_entropy
from spkd.train.losses.base import Loss, LossContext, LossInputs, TrainedClassifier
from spkd.train.losses.settings import LabelSettings, NonTargetSettings, TriageSettings


class LabelDistillation(Loss):
    """CE_margin(z_s, y) + w * T^2 * divergence(z_t, z_s), y and z over the teacher's classes.

    z_s = scale * cos(theta_k + margin [k = y]) are logits of the student's classifier, with `weight` (classes, Ds). z_t
    (B, classes) are the teacher's logits, with `teacher_margin` at the same entry where its head is cosine. w grows
    linearly to 1 over the first fraction `kd_warmup` of the run. The cross-entropy is the mean over the views with a
    label among the teacher's classes, the divergence the mean over all views for which it is defined.
    """

    Settings = LabelSettings
    needs = (LOGITS,)

    def __init__(self, settings: LabelSettings, context: LossContext) -> None:
        """Make the classifier. Raises UsageError: fewer than two classes."""
        super().__init__(settings, context)
        classes = context.targets[LOGITS].dim
        if classes < 2:
            raise UsageError(f"logits over {classes} class teach nothing; the teacher or the data need two speakers")
        self.margin, self.scale, self.temperature = settings.margin, settings.scale, settings.temperature
        self._teacher_margin = settings.teacher_margin
        self._margin_warmup, self._kd_warmup = settings.margin_warmup, settings.kd_warmup
        self.weight = nn.Parameter(nn.init.xavier_normal_(torch.empty(classes, context.levels[EMBEDDING].dim)))

    def classifier(self) -> TrainedClassifier:
        return TrainedClassifier(self.weight, self.scale, over_teacher=True)

    def forward(self, student: dict[str, Tensor], inputs: LossInputs) -> Tensor:
        cosine = linear(normalize(student[EMBEDDING].float(), dim=-1), normalize(self.weight.float(), dim=-1))
        label, teacher = inputs.teacher_label, inputs.targets[LOGITS].float()
        z_s = self.scale * add_margin(cosine, label, margin_of(self.margin, self._margin_warmup, inputs))
        if inputs.teacher_scale is not None:
            teacher = inputs.teacher_scale * add_margin(teacher / inputs.teacher_scale, label, self._teacher_margin)
        weight = 1.0 if inputs.progress >= self._kd_warmup else inputs.progress / self._kd_warmup
        entropy = mean_cross_entropy(z_s, label)
        t = self.temperature
        return entropy + weight * t**2 * self.divergence(teacher / t, z_s / t, label, inputs.progress)

    def divergence(self, teacher: Tensor, student: Tensor, label: Tensor, progress: float) -> Tensor:
        """Divergence (), the mean over the batch.

        Args:
            teacher: (B, classes) logits over the temperature.
            student: (B, classes) logits over the temperature.
            label: (B,) class of each view.
            progress: fraction of the run that is over.
        """
        raise NotImplementedError


class KLD(LabelDistillation):
    """Conventional label-level distillation: divergence = KL(softmax z_t || softmax z_s), summed over the classes
    (Hinton et al., arXiv 1503.02531; for speakers Wang et al., ICASSP 2019)."""

    learns_from = "`logits`"

    def divergence(self, teacher: Tensor, student: Tensor, label: Tensor, progress: float) -> Tensor:
        return _kl(teacher.log_softmax(1), student.log_softmax(1)).mean()


class NonTarget(LabelDistillation):
    """Emphasised non-target speakers (Truong et al., arXiv 2309.14838), the decoupled form of Zhao et al., CVPR 2022:

        divergence = KL(b_t || b_s) + gamma * KL(q_t || q_s),   b = [p_y, 1 - p_y],   q = softmax over all k != y

    In the ordinary divergence the second term has the weight 1 - p_y of the teacher, which is nearly 0 where it knows
    the speaker; here the weight is gamma. Both terms are computed from log-sum-exps: 1 - p_y computed from the
    probability loses all its digits where the teacher is certain. Values from the authors' code: gamma 2, T 1, scale
    32, both margins 0.2.
    """

    Settings = NonTargetSettings
    learns_from = "`logits`, of the non-target speakers above all"
    needs_labels = "all"

    def __init__(self, settings: NonTargetSettings, context: LossContext) -> None:
        super().__init__(settings, context)
        self.gamma = settings.gamma

    def divergence(self, teacher: Tensor, student: Tensor, label: Tensor, progress: float) -> Tensor:
        (b_t, q_t), (b_s, q_s) = (_decoupled(z, label) for z in (teacher, student))
        return (_kl(b_t, b_s) + self.gamma * _kl(q_t, q_s)).mean()


class Triage(LabelDistillation):
    """Triage distillation, TRKD (Kim et al., arXiv 2601.14699). The teacher's posterior p has three parts: the target
    speaker y; the confusion set C, the fewest non-target speakers whose probabilities sum to at least `cutoff` of
    1 - p_y; the background, all others.

        divergence = KL(m_t || m_s) + gamma * KL(c_t || c_s),   m = masses of target, confusion set and background,
                                                               c = softmax over the confusion set

    The student's probabilities are split into the same three parts as the teacher's. The distribution within the
    background is not distilled. The abstract says all this, and that the cut-off shrinks over training. The linear
    decrease, its values and gamma are this project's choice.
    """

    Settings = TriageSettings
    learns_from = "`logits`, of the speakers that the teacher confuses"
    needs_labels = "all"

    def __init__(self, settings: TriageSettings, context: LossContext) -> None:
        super().__init__(settings, context)
        self.gamma, self.cutoff = settings.gamma, tuple(settings.cutoff)

    def divergence(self, teacher: Tensor, student: Tensor, label: Tensor, progress: float) -> Tensor:
        first, last = self.cutoff
        confused = confusion_set(teacher, label, first + (last - first) * progress)
        masses, within = zip(*(_triaged(z, label, confused) for z in (teacher, student)), strict=True)
        return (_kl(*masses) + self.gamma * _kl(*within)).mean()


def confusion_set(logits: Tensor, label: Tensor, cutoff: float) -> Tensor:
    """Confusion set of each view, (B, classes) bool.

    It has the fewest non-target classes, at least one, whose probabilities sum to at least `cutoff` of that of all
    non-target classes.

    Args:
        logits: (B, classes).
        label: (B,) target class of each view.
        cutoff: cumulative probability.
    """
    at_label = label[:, None]
    non_targets = logits.scatter(1, at_label, -torch.inf).softmax(1)
    ranked, order = non_targets.sort(1, descending=True)
    before = ranked.cumsum(1) - ranked
    chosen = before < cutoff
    chosen[:, 0] = True
    # The target class comes last: its probability among the non-target classes is 0.
    return torch.zeros_like(chosen).scatter(1, order, chosen).scatter(1, at_label, False)


def _triaged(logits: Tensor, label: Tensor, confused: Tensor) -> tuple[Tensor, Tensor]:
    """Log masses (B, 3) of target, confusion set and background, and log-probabilities (B, classes) within the
    confusion set, -inf outside of it.

    Args:
        logits: (B, classes).
        label: (B,) target class of each view.
        confused: (B, classes) confusion set.
    """
    target = torch.zeros_like(confused).scatter(1, label[:, None], True)
    parts = [logits.masked_fill(~part, -torch.inf).logsumexp(1) for part in (target, confused, ~target & ~confused)]
    within = logits.masked_fill(~confused, -torch.inf)
    return torch.stack(parts, 1).log_softmax(1), within.log_softmax(1)


def _decoupled(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """log b (B, 2) and log q (B, classes; -inf at the target) of NonTarget, from logits (B, classes)."""
    at_label = logits.gather(1, label[:, None])
    rest = logits.scatter(1, label[:, None], -torch.inf)
    binary = torch.cat([at_label, rest.logsumexp(1, keepdim=True)], 1)
    return binary.log_softmax(1), rest.log_softmax(1)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(exp p || exp q) of log-probabilities (B, C): (B,). Where p is -inf, q is -inf too, and the term is 0."""
    absent = p.isneginf()
    p, q = p.masked_fill(absent, 0.0), q.masked_fill(absent, 0.0)
    return (p.exp() * (p - q)).masked_fill(absent, 0.0).sum(1)
