"""Self-distillation without labels and without a teacher: DINO, and MeMo's two architectures with two heads each."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, normalize

from spkd.errors import UsageError
from spkd.networks.network import forward_crops
from spkd.networks.settings import StudentConfig
from spkd.outputs.features import is_fbank
from spkd.outputs.target import EMBEDDING
from spkd.progress import log
from spkd.students import Network, make_student
from spkd.train.distributed import averaged, gathered, own_rows
from spkd.train.log import RunLog
from spkd.train.losses.base import Loss, LossContext, LossInputs
from spkd.train.losses.contrastive import Contrastive
from spkd.train.losses.settings import GLOBALS, NO_PARTNER, ContrastiveSettings, MeMoSettings

MODES = ("self", "cross")
PROBE = 10  # steps between two measurements of the gradients
SMOOTH = 0.9  # weight of earlier values in the moving averages of the measurements
EARLIEST = 0.2  # fraction of the run before which nothing is decided: fresh networks give one output for all views, and
# while the learning rate rises the contrastive term rises too
PATIENCE = 0.1  # fraction of the run for which the contrastive term may stop falling
LEAST_INFORMATION = 0.05  # nats of mutual information between view and prototype
INVERSE_TEMPERATURE = 1 / 0.07  # factor of the contrastive term in the authors' code


class ProjectionHead(nn.Module):
    """DINO's head (Caron et al., ICCV 2021).

    Three linear layers with batch-norm and GELU between them, an L2-normalised bottleneck, and a last layer of unit
    vectors, so that the outputs are cosines to `prototypes`.
    """

    def __init__(self, inputs: int, settings: MeMoSettings) -> None:
        super().__init__()
        hidden, out = settings.hidden, settings.bottleneck
        self.mlp = nn.Sequential(
            nn.Linear(inputs, hidden),
            nn.BatchNorm1d(hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.BatchNorm1d(hidden),
            nn.GELU(),
            nn.Linear(hidden, out),
        )
        self.last = nn.Parameter(nn.init.trunc_normal_(torch.empty(settings.prototypes, out), std=0.02))

    def forward(self, embedding: Tensor, frozen: bool = False) -> Tensor:
        """Cosines (B, prototypes) of embeddings (B, D).

        Args:
            embedding: (B, D).
            frozen: whether the last layer is not trained yet.
        """
        last = self.last.detach() if frozen else self.last
        return linear(normalize(self.mlp(embedding).float(), dim=-1), normalize(last, dim=-1))


class EmaPair(nn.Module):
    """Heads of one architecture, and its teacher: a network and heads that are moving averages of the student's.

    The teacher also has a centre for each mode: the moving average of the mean of its outputs.
    """

    def __init__(self, inputs: int, settings: MeMoSettings, modes: tuple[str, ...]) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({mode: ProjectionHead(inputs, settings) for mode in modes})
        self.teacher_heads = _frozen_copy(self.heads)
        self.centre = nn.ParameterDict(
            {mode: nn.Parameter(torch.zeros(settings.prototypes), requires_grad=False) for mode in modes}
        )

    def join(self, network: Network) -> None:
        self.teacher = _frozen_copy(network)

    @torch.no_grad()
    def teach(self, crops: list[Tensor], precision: torch.dtype | None) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        """The teacher's embeddings of the long crops, and the outputs of each of its heads, one tensor a crop."""
        embeddings = _embeddings(self.teacher, crops, precision)
        joined = torch.cat(embeddings)
        return embeddings, {mode: list(head(joined).chunk(len(crops))) for mode, head in self.teacher_heads.items()}

    @torch.no_grad()
    def follow(self, network: Network, momentum: float) -> None:
        """Move the teacher's parameters by 1 - momentum towards the student's; batch-norm statistics are not moved."""
        pairs = ((self.teacher, network), (self.teacher_heads, self.heads))
        for teacher, student in pairs:
            torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1.0 - momentum)


def _embeddings(network: nn.Module, crops: list[Tensor], precision: torch.dtype | None) -> list[Tensor]:
    """Embeddings of each crop, in fp32, from matrix products of that precision."""
    with torch.autocast(crops[0].device.type, precision, enabled=precision is not None):
        levels = forward_crops(network, crops)
    return [of[EMBEDDING].float() for of in levels]


class MeMo(Loss):
    """Multi-head multi-mode self-distillation (Jin, Tu and Mak, Interspeech 2024): two architectures a, b, each with a
    teacher that is its own moving average, each with a self head h and a cross head g on its embedding.

        L_a = H(h(T_a), h(S_a)) + cross * H(g(T_b), g(S_a)) + contrastive * InfoNCE(S_a, T_a),   L_b alike,
        H(T, S) = mean over long crops i and crops v != i of -softmax((T_i - c) / tau_t) . log softmax(S_v / tau_s)

    c is the centre of that teacher head. The teachers take the 2 long crops of an instance; the students take these and
    the short ones. tau_t rises linearly, the momentum of the averages as half a cosine. The network that is kept is the
    teacher of the student's architecture. With `partner = none` only the self mode of one architecture remains: DINO.

    InfoNCE compares the embedding of one long crop with the teacher's embedding of the other, among the 2B of the
    batch. Its logits are w * cos with a learnt w > 0 (initially 10; the authors' bias b cancels), and it is multiplied
    by 1 / 0.07. The paper stops this term dynamically, by a rule that is neither in its abstract nor in the authors'
    code. Here it stops as soon as its gradient on the embeddings opposes that of the distillation (smoothed cosine
    below 0), or where it has not fallen for a tenth of the run; neither is decided in the first fifth. Step and reason
    are in the checkpoint's record.

    A collapse (equal outputs for all views) is measured by the mutual information of view and prototype: the entropy of
    the mean teacher output minus the mean of the entropies. It is reported once this falls below 0.05 nats in the last
    four fifths of the run.

    `teacher_weight` adds a third mode: InfoNCE of every student against a frozen teacher's cached embeddings, with
    mined negatives where there are any (see Contrastive).
    """

    step: Tensor
    stopped: Tensor
    collapsed: Tensor
    stood: Tensor
    agreement: Tensor
    level: Tensor
    best: Tensor
    information: Tensor
    opposed: Tensor

    Settings = MeMoSettings
    learns_from = "moving averages of two students; on request also a cached teacher"
    averages_weights = True

    def __init__(self, settings: MeMoSettings, context: LossContext) -> None:
        super().__init__(settings, context)
        self._settings = settings
        paired = settings.partner != NO_PARTNER
        modes = MODES if paired else MODES[:1]
        dim = context.levels[EMBEDDING].dim
        self.own = EmaPair(dim, settings, modes)
        self.sharpness = nn.Parameter(torch.tensor(10.0))
        if paired:
            self.other = EmaPair(dim, settings, modes)
            chosen = StudentConfig(settings.partner, settings.partner_channels, dim)
            self.partner = nn.ModuleDict({"network": make_student(chosen), "heads": self.other.heads})
        if settings.teacher_weight > 0:
            contrast = ContrastiveSettings(settings.frozen_temperature, settings.ceiling)
            self.frozen = nn.ModuleList(Contrastive(contrast, context) for _ in range(2 if paired else 1))
        self._centres: list[tuple[Tensor, Tensor]] = []
        # Measurements, in buffers, since a run that is continued needs them.
        for name, value in (("step", 0), ("stopped", -1), ("collapsed", -1), ("stood", 0)):
            self.register_buffer(name, torch.tensor(value))
        for name, number in (("agreement", 1.0), ("level", 0.0), ("best", math.inf), ("information", math.nan)):
            self.register_buffer(name, torch.tensor(number))
        self.register_buffer("opposed", torch.tensor(False))
        # Copies on the host of values that every step reads, so that no step waits for the device.
        self._steps, self._is_stopped = 0, False
        self.register_load_state_dict_post_hook(self._mirror)

    @staticmethod
    def _mirror(module: MeMo, _: Any) -> None:
        module._steps, module._is_stopped = int(module.step), int(module.stopped) >= 0

    def join(self, network: Network) -> None:
        self.own.join(network)
        if self.partner is not None:
            partner = self._partner()
            if is_fbank(partner.input_kind) and is_fbank(network.input_kind):
                partner.take(network.input_kind)
            if partner.input_kind != network.input_kind:
                raise UsageError(
                    f"loss.memo.partner={self._settings.partner} takes {partner.input_kind.name} input, "
                    f"the student takes {network.input_kind.name}"
                )
            self.other.join(partner)

    def forward(self, student: dict[str, Tensor], inputs: LossInputs) -> Tensor:
        crops = inputs.crops[: GLOBALS + self._settings.locals]
        student_embeddings = [levels[EMBEDDING].float() for levels in [student, *inputs.other_levels][: len(crops)]]
        own_embeddings, own_outputs = self.own.teach(crops[:GLOBALS], inputs.precision)
        distilled = self._distance("self", self.own, own_outputs, student_embeddings, self.own, inputs)
        contrast, embeddings = self._contrast(student_embeddings, own_embeddings), [student_embeddings]
        if self.partner is not None:
            partner_embeddings = _embeddings(self._partner(), crops, inputs.precision)
            other_embeddings, other_outputs = self.other.teach(crops[:GLOBALS], inputs.precision)
            distilled = distilled + self._distance(
                "self", self.other, other_outputs, partner_embeddings, self.other, inputs
            )
            across = self._distance("cross", self.other, other_outputs, student_embeddings, self.own, inputs)
            across = across + self._distance("cross", self.own, own_outputs, partner_embeddings, self.other, inputs)
            distilled = distilled + self._settings.cross_weight * across
            contrast = contrast + self._contrast(partner_embeddings, other_embeddings)
            embeddings.append(partner_embeddings)
        if self.training:
            long = [embedding for network in embeddings for embedding in network[:GLOBALS]]
            self._watch(distilled, contrast, long, own_outputs["self"], inputs.progress)
        total = distilled
        if not self._is_stopped:
            total = total + self._settings.contrastive_weight * contrast
        if self._settings.teacher_weight > 0:
            for loss, (first, *_) in zip(self.frozen, embeddings, strict=True):
                total = total + self._settings.teacher_weight * loss({EMBEDDING: first}, inputs)
        return total

    def _distance(
        self,
        mode: str,
        teacher: EmaPair,
        teacher_outputs: dict[str, list[Tensor]],
        embeddings: list[Tensor],
        student: EmaPair,
        inputs: LossInputs,
    ) -> Tensor:
        """H of one mode: cross-entropy of a teacher's head for the long crops and a student's head for all crops."""
        settings, warmup = self._settings, self._settings.teacher_temperature_warmup
        ramp = min(inputs.progress / warmup, 1.0) if warmup > 0 else 1.0
        low, high = settings.teacher_temperature
        tau = low + (high - low) * ramp
        frozen = inputs.progress < settings.frozen_prototypes
        targets = [((logits - teacher.centre[mode]) / tau).softmax(-1) for logits in teacher_outputs[mode]]
        outputs = student.heads[mode](torch.cat(embeddings), frozen) / settings.student_temperature
        log_probabilities = outputs.log_softmax(-1).split([len(e) for e in embeddings])
        terms = [
            -(target * log_p).sum(-1).mean()
            for i, target in enumerate(targets)
            for v, log_p in enumerate(log_probabilities)
            if v != i
        ]
        if self.training:
            with torch.no_grad():
                # Used from the next step on.
                self._centres.append((teacher.centre[mode], averaged(torch.cat(teacher_outputs[mode]).mean(0))))
        return torch.stack(terms).mean()

    def _contrast(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        """InfoNCE over the rows [teacher of one long crop; student of the other], both ways, times 1 / 0.07."""
        terms = []
        for i, v in ((0, 1), (1, 0)):
            teacher_unit, student_unit = (normalize(x.float(), dim=-1) for x in (teacher[i], student[v]))
            rows = torch.cat([teacher_unit, student_unit])
            all_rows = torch.cat([gathered(teacher_unit), gathered(student_unit)])
            similarity = self.sharpness.clamp_min(1e-6) * rows @ all_rows.mT
            first, batch = own_rows(teacher_unit), len(all_rows) // 2
            itself, partner = torch.cat([first, first + batch]), torch.cat([first + batch, first])
            terms.append(cross_entropy(similarity.scatter(1, itself[:, None], -torch.inf), partner))
        return INVERSE_TEMPERATURE * torch.stack(terms).mean()

    def _watch(
        self,
        distilled: Tensor,
        contrast: Tensor,
        embeddings: list[Tensor],
        outputs: list[Tensor],
        progress: float,
    ) -> None:
        """Measure whether the networks have collapsed, and decide whether the contrastive term stops.

        Measurements stay on the device. Decisions wait for it, and are taken only where the run logs, which waits too.
        """
        if self._steps % PROBE:
            return
        decides = progress >= EARLIEST and RunLog.is_due(self._steps)
        # Collapse: mutual information of view and prototype.
        with torch.no_grad():
            p = (torch.cat(outputs) / self._settings.student_temperature).softmax(-1)
            information = _entropy(averaged(p.mean(0))) - averaged(_entropy(p).mean())
            before = torch.where(self.information.isnan(), information, self.information)
            self.information.copy_(SMOOTH * before + (1 - SMOOTH) * information)
        if decides and int(self.collapsed) < 0 and float(self.information) < LEAST_INFORMATION:
            self.collapsed.fill_(int(self.step))
            log(
                f"warning: memo has collapsed at step {int(self.step)}: the mutual information of view and prototype "
                f"is {float(self.information):.3f} nats; raise loss.memo.contrastive_weight, or lower "
                "loss.memo.teacher_temperature or optim.lr"
            )
        if self._is_stopped or not self._settings.dynamic_stop or self._settings.contrastive_weight == 0:
            return
        # Cosine of the gradients of both terms on the embeddings, from their products on all ranks.
        of_distilled = torch.autograd.grad(distilled, embeddings, retain_graph=True)
        of_contrast = torch.autograd.grad(contrast, embeddings, retain_graph=True)
        a, b = (torch.cat([g.flatten() for g in gradients]) for gradients in (of_distilled, of_contrast))
        product, square_a, square_b = averaged(torch.stack([a @ b, a @ a, b @ b]))
        cosine, contrast = product / (square_a * square_b).sqrt().clamp_min(1e-30), averaged(contrast)
        first = self._steps == 0
        self.agreement.copy_(cosine if first else SMOOTH * self.agreement + (1 - SMOOTH) * cosine)
        self.level.copy_(contrast if first else SMOOTH * self.level + (1 - SMOOTH) * contrast)
        if not decides:
            return
        # Stop where the gradients oppose each other, or where the term has not fallen for long.
        if self.level < self.best:
            self.best.copy_(self.level)
            self.stood.copy_(self.step)
        steps_in_all = int(self.step) / progress
        self.opposed.fill_(bool(self.agreement < 0))
        if self.opposed or int(self.step - self.stood) > PATIENCE * steps_in_all:
            self.stopped.fill_(int(self.step))
            self._is_stopped = True
            log(f"memo: contrastive term stopped at step {int(self.step)}: {self._reason()}")

    def _reason(self) -> str:
        if self.opposed:
            return f"its gradient opposes the distillation's (smoothed cosine {float(self.agreement):.3f})"
        return f"it has not fallen since step {int(self.stood)} ({float(self.best):.2f})"

    @torch.no_grad()
    def after_step(self, network: Network, progress: float) -> None:
        low, high = self._settings.momentum
        momentum = high - (high - low) * (math.cos(math.pi * progress) + 1) / 2
        self.own.follow(network, momentum)
        if self.partner is not None:
            self.other.follow(self._partner(), momentum)
        for centre, mean in self._centres:
            centre.lerp_(mean, 1 - self._settings.centre)
        self._centres.clear()
        self.step += 1
        self._steps += 1

    def trained_network(self, network: Network) -> Network:
        return self.own.teacher

    def report(self) -> dict[str, Any]:
        stopped, collapsed = int(self.stopped), int(self.collapsed)
        return {
            "contrastive_stopped": stopped if stopped >= 0 else None,
            "reason": self._reason() if stopped >= 0 else None,
            "collapsed": collapsed if collapsed >= 0 else None,
            "information_nats": round(float(self.information), 4),
        }

    def _partner(self) -> Network:
        assert isinstance(self.partner, nn.ModuleDict)
        network = self.partner["network"]
        assert isinstance(network, Network)
        return network


def _frozen_copy(module: Any) -> Any:
    """Copy of a module without trained parameters."""
    return copy.deepcopy(module).requires_grad_(False)


def _entropy(p: Tensor) -> Tensor:
    """Entropy (nats) of probabilities: (..., K) -> (...)."""
    return -(p * p.clamp_min(1e-30).log()).sum(-1)
