"""Label-level distillation: the student's classifier learns what the teacher's says of every class."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, normalize

from spkd.cache import EMBEDDING, LOGITS, Target
from spkd.config import LossConfig
from spkd.train.losses.aam import add_margin, risen
from spkd.train.losses.base import Loss, Said


class Classifier(Loss):
    """CE_margin(z_s, y) + w * T^2 * divergence(z_t, z_s), y and z over the teacher's classes.

    z_s = scale * cos(theta_k + margin [k = y]) with `weight` (classes, Ds) of the student's own; z_t (B, classes) is
    the teacher's, with `teacher_margin` put on the same entry where its head is cosine. w rises linearly to 1 over
    the first `kd_rise` of the run. The cross-entropy is the mean over the views with a label among the teacher's
    classes, the divergence that over all views it is defined for.
    """

    needs = (LOGITS,)

    def __init__(self, config: LossConfig, levels: dict[str, Target], targets: dict[str, Target], classes: int) -> None:
        super().__init__(config, levels, targets, classes)
        self.margin, self.scale, self.temperature = config.margin, config.scale, config.kd_temperature
        self._teacher_margin, self._rise, self._kd_rise = config.teacher_margin, config.margin_rise, config.kd_rise
        self.weight = nn.Parameter(nn.init.xavier_normal_(torch.empty(targets[LOGITS].dim, levels[EMBEDDING].dim)))

    def forward(self, student: dict[str, Tensor], said: Said) -> Tensor:
        cosine = linear(normalize(student[EMBEDDING].float(), dim=-1), normalize(self.weight.float(), dim=-1))
        label, teacher = said.teacher_label, said.targets[LOGITS].float()
        z_s = self.scale * add_margin(cosine, label, self.margin * risen(said.done, self._rise))
        if said.teacher_scale is not None:
            teacher = said.teacher_scale * add_margin(teacher / said.teacher_scale, label, self._teacher_margin)
        weight = 1.0 if said.done >= self._kd_rise else said.done / self._kd_rise
        known = label >= 0
        entropy = cross_entropy(z_s[known], label[known]) if known.any() else z_s.sum() * 0.0
        t = self.temperature
        return entropy + weight * t**2 * self.divergence(teacher / t, z_s / t, label)

    def divergence(self, teacher: Tensor, student: Tensor, label: Tensor) -> Tensor:
        """Of logits (B, classes) over the temperature: (), the mean over the batch."""
        raise NotImplementedError


class KLD(Classifier):
    """The conventional label-level distillation: divergence = KL(softmax z_t || softmax z_s), summed over the classes
    (Hinton et al., arXiv 1503.02531; for speakers Wang et al., ICASSP 2019)."""

    def divergence(self, teacher: Tensor, student: Tensor, label: Tensor) -> Tensor:
        return _kl(teacher.log_softmax(1), student.log_softmax(1)).mean()


class NonTarget(Classifier):
    """Emphasised non-target speakers (Truong et al., arXiv 2309.14838), the decoupled form of Zhao et al., CVPR 2022:

        divergence = KL(b_t || b_s) + gamma * KL(q_t || q_s),   b = [p_y, 1 - p_y],   q = softmax over all k != y

    In the ordinary divergence the second part has the weight 1 - p_y of the teacher, nearly 0 where it knows the
    speaker; gamma takes its place. Both parts are computed from log-sum-exps: at scale 32 the mass of the rest
    underflows. Values from the authors' code: gamma 2, T 1, scale 32, both margins 0.2.
    """

    needs_labels = True

    def __init__(self, config: LossConfig, levels: dict[str, Target], targets: dict[str, Target], classes: int) -> None:
        super().__init__(config, levels, targets, classes)
        self.gamma = config.gamma

    def divergence(self, teacher: Tensor, student: Tensor, label: Tensor) -> Tensor:
        (b_t, q_t), (b_s, q_s) = (_decoupled(z, label) for z in (teacher, student))
        return (_kl(b_t, b_s) + self.gamma * _kl(q_t, q_s)).mean()


def _decoupled(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """log b (B, 2) and log q (B, classes - 1)."""
    at_label = logits.gather(1, label[:, None])
    others = torch.ones_like(logits, dtype=torch.bool).scatter(1, label[:, None], False)
    rest = logits[others].view(len(logits), -1)
    binary = torch.cat([at_label, rest.logsumexp(1, keepdim=True)], 1)
    return binary.log_softmax(1), rest.log_softmax(1)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(exp p || exp q) of log-probabilities (B, C): (B,)."""
    return (p.exp() * (p - q)).sum(1)
