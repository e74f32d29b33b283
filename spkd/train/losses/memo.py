"""Self-distillation without labels and without a teacher: DINO, and MeMo's two architectures with two heads each."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, linear, normalize

from spkd import models
from spkd.cache import EMBEDDING, Target
from spkd.config import LossConfig, MeMoConfig, StudentConfig
from spkd.errors import UsageError
from spkd.models import Network
from spkd.models.network import each
from spkd.progress import say
from spkd.train.losses.base import Loss, Said
from spkd.train.losses.contrastive import Contrastive

MODES = ("self", "cross")
GLOBALS = 2  # long crops, which the teachers hear too
PROBE = 10  # steps between two looks at the gradients
SMOOTH = 0.9  # of what is watched, over PROBEs
EARLIEST = 0.2  # fraction of the run before which nothing is judged: fresh networks say the same of all views, and
# while the learning rate rises the contrastive term does too
PATIENCE = 0.1  # fraction of the run for which it may stand still
LEAST_INFORMATION = 0.05  # nats that a view's prototypes tell about which view it is
INVERSE_TEMPERATURE = 1 / 0.07  # before the contrastive term, in the authors' code


class Head(nn.Module):
    """DINO's head (Caron et al., ICCV 2021): three linear layers with batch-norm and GELU between, an L2-normalised
    bottleneck, and a last layer of unit vectors: cosines to `prototypes`."""

    def __init__(self, inputs: int, config: MeMoConfig) -> None:
        super().__init__()
        hidden, out = config.hidden, config.bottleneck
        self.mlp = nn.Sequential(
            nn.Linear(inputs, hidden),
            nn.BatchNorm1d(hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.BatchNorm1d(hidden),
            nn.GELU(),
            nn.Linear(hidden, out),
        )
        self.last = nn.Parameter(nn.init.trunc_normal_(torch.empty(config.prototypes, out), std=0.02))

    def forward(self, embedding: Tensor, frozen: bool = False) -> Tensor:
        """(B, D) -> (B, prototypes). frozen: the last layer learns nothing yet."""
        last = self.last.detach() if frozen else self.last
        return linear(normalize(self.mlp(embedding).float(), dim=-1), normalize(last, dim=-1))


class Learner(nn.Module):
    """One architecture: its heads, and its teacher's network and heads, their moving averages.

    The centres (one for each mode) belong to the teacher: EMA of the mean of its outputs.
    """

    def __init__(self, inputs: int, config: MeMoConfig, modes: tuple[str, ...]) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({mode: Head(inputs, config) for mode in modes})
        self.teacher_heads = _still(self.heads)
        self.centre = nn.ParameterDict(
            {mode: nn.Parameter(torch.zeros(config.prototypes), requires_grad=False) for mode in modes}
        )

    def join(self, network: Network) -> None:
        self.teacher = _still(network)

    @torch.no_grad()
    def teach(self, crops: list[Tensor]) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        """The teacher's embeddings of the long crops, and what each of its heads says of them."""
        embeddings = [levels[EMBEDDING] for levels in each(self.teacher, crops)]
        joined = torch.cat(embeddings)
        return embeddings, {mode: list(head(joined).chunk(len(crops))) for mode, head in self.teacher_heads.items()}

    @torch.no_grad()
    def follow(self, network: Network, momentum: float) -> None:
        """The teacher takes 1 - momentum of the student's parameters; its batch-norms keep statistics of their own."""
        pairs = ((self.teacher, network), (self.teacher_heads, self.heads))
        for teacher, student in pairs:
            for mine, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
                mine.lerp_(theirs, 1.0 - momentum)


class MeMo(Loss):
    """Multi-head multi-mode self-distillation (Jin, Tu and Mak, Interspeech 2024): two architectures a, b, each with a
    teacher that is its own moving average, each with a self head h and a cross head g on its embedding.

        L_a = H(h(T_a), h(S_a)) + cross * H(g(T_b), g(S_a)) + contrastive * InfoNCE(S_a, T_a),   L_b alike,
        H(T, S) = mean over long crops i and crops v != i of -softmax((T_i - c) / tau_t) . log softmax(S_v / tau_s)

    c the centre of that teacher head. The teachers hear the 2 long crops of a voice, the students these and the short
    ones. tau_t rises linearly, the momentum of the averages as half a cosine. What is kept is the teacher of the
    student's architecture. `partner = none` leaves the self mode of one architecture: DINO.

    InfoNCE compares the embedding of one long crop with the teacher's of the other among the 2B of the batch, at w *
    cos with a learnt w > 0 (from 10; the authors' bias b cancels), times 1 / 0.07. The paper stops it when it has
    done its work, by a rule that its abstract does not tell and the authors' code lacks; ours: as soon as its gradient
    on the embeddings points against the distillation's (smoothed cosine below 0), or it has not fallen for a tenth
    of the run; neither is judged in the first fifth. Step and reason go to the checkpoint's record.

    A collapse (all views alike) shows in the mutual information of view and prototype, the entropy of the mean teacher
    output minus the mean of the entropies: it is reported once it falls below 0.05 nats in the last four fifths.

    `teacher` adds a third mode: InfoNCE of every student against a frozen teacher's cached embeddings, with mined
    negatives where there are any (see Contrastive).
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

    @classmethod
    def needed(cls, config: LossConfig) -> tuple[str, ...]:
        return (EMBEDDING,) if config.memo.teacher > 0 else ()

    @classmethod
    def crops(cls, config: LossConfig) -> tuple[float, ...]:
        return (0.0,) * (GLOBALS - 1) + (config.memo.local_crop,) * config.memo.locals

    def __init__(self, config: LossConfig, levels: dict[str, Target], targets: dict[str, Target], classes: int) -> None:
        super().__init__(config, levels, targets, classes)
        self._config = config.memo
        paired = self._config.partner != "none"
        modes = MODES if paired else MODES[:1]
        dim = levels[EMBEDDING].dim
        self.own = Learner(dim, self._config, modes)
        self.sharpness = nn.Parameter(torch.tensor(10.0))
        if paired:
            self.other = Learner(dim, self._config, modes)
            chosen = StudentConfig(self._config.partner, self._config.partner_channels, dim)
            self.partner = nn.ModuleDict({"network": models.student(chosen), "heads": self.other.heads})
        if self._config.teacher > 0:
            count = 2 if paired else 1
            self.frozen = nn.ModuleList(Contrastive(config, levels, targets, classes) for _ in range(count))
        self._centres: list[tuple[Tensor, Tensor]] = []
        # What is watched. A run that continues needs it, so it lies in buffers.
        for name, value in (("step", 0), ("stopped", -1), ("collapsed", -1), ("stood", 0)):
            self.register_buffer(name, torch.tensor(value))
        for name, number in (("agreement", 1.0), ("level", 0.0), ("best", math.inf), ("information", math.nan)):
            self.register_buffer(name, torch.tensor(number))
        self.register_buffer("opposed", torch.tensor(False))

    def join(self, network: Network) -> None:
        self.own.join(network)
        if self.partner is not None:
            partner = self._partner()
            if partner.hears != network.hears:
                raise UsageError(
                    f"loss.memo.partner={self._config.partner} hears {partner.hears.name}, the student not"
                )
            self.other.join(partner)

    def forward(self, student: dict[str, Tensor], said: Said) -> Tensor:
        crops = said.crops[: GLOBALS + self._config.locals]
        mine = [levels[EMBEDDING] for levels in [student, *said.others][: len(crops)]]
        own_embeddings, own_says = self.own.teach(crops[:GLOBALS])
        distilled = self._distance("self", self.own, own_says, mine, self.own, said)
        contrast, embeddings = self._contrast(mine, own_embeddings), [mine]
        if self.partner is not None:
            theirs = [levels[EMBEDDING] for levels in each(self._partner(), crops)]
            other_embeddings, other_says = self.other.teach(crops[:GLOBALS])
            distilled = distilled + self._distance("self", self.other, other_says, theirs, self.other, said)
            across = self._distance("cross", self.other, other_says, mine, self.own, said)
            across = across + self._distance("cross", self.own, own_says, theirs, self.other, said)
            distilled = distilled + self._config.cross * across
            contrast = contrast + self._contrast(theirs, other_embeddings)
            embeddings.append(theirs)
        if self.training:
            heard = [embedding for network in embeddings for embedding in network[:GLOBALS]]
            self._watch(distilled, contrast, heard, own_says["self"], said.done)
        total = distilled
        if int(self.stopped) < 0:
            total = total + self._config.contrastive * contrast
        if self._config.teacher > 0:
            for loss, (first, *_) in zip(self.frozen, embeddings, strict=True):
                total = total + self._config.teacher * loss({EMBEDDING: first}, said)
        return total

    def _distance(
        self,
        mode: str,
        teacher: Learner,
        said_by: dict[str, list[Tensor]],
        embeddings: list[Tensor],
        student: Learner,
        said: Said,
    ) -> Tensor:
        """H of one mode: what a teacher's head said of the long crops against a student's head on all crops."""
        config = self._config
        risen = min(said.done / config.teacher_rise, 1.0) if config.teacher_rise > 0 else 1.0
        low, high = config.teacher_temperature
        tau = low + (high - low) * risen
        frozen = said.done < config.head_frozen
        targets = [((logits - teacher.centre[mode]) / tau).softmax(-1) for logits in said_by[mode]]
        spoken = student.heads[mode](torch.cat(embeddings), frozen) / config.student_temperature
        spoken = spoken.log_softmax(-1).split([len(e) for e in embeddings])
        terms = [
            -(target * log_p).sum(-1).mean()
            for i, target in enumerate(targets)
            for v, log_p in enumerate(spoken)
            if v != i
        ]
        if self.training:
            with torch.no_grad():
                # Used from the next step on.
                self._centres.append((teacher.centre[mode], torch.cat(said_by[mode]).mean(0)))
        return torch.stack(terms).mean()

    def _contrast(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        """InfoNCE over the rows [teacher of one long crop; student of the other], both ways, times 1 / 0.07."""
        terms = []
        for i, v in ((0, 1), (1, 0)):
            rows = normalize(torch.cat([teacher[i], student[v]]).float(), dim=-1)
            similarity = self.sharpness.clamp_min(1e-6) * rows @ rows.mT
            itself = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
            partner = torch.arange(len(rows), device=rows.device).roll(len(rows) // 2)
            terms.append(cross_entropy(similarity.masked_fill(itself, -torch.inf), partner))
        return INVERSE_TEMPERATURE * torch.stack(terms).mean()

    def _watch(
        self,
        distilled: Tensor,
        contrast: Tensor,
        embeddings: list[Tensor],
        said_by: list[Tensor],
        done: float,
    ) -> None:
        """Decide whether the contrastive term has done its work, and whether the networks have collapsed."""
        if int(self.step) % PROBE:
            return
        with torch.no_grad():
            p = (torch.cat(said_by) / self._config.student_temperature).softmax(-1)
            information = _entropy(p.mean(0)) - _entropy(p).mean()
            before = information if self.information.isnan() else self.information
            self.information.copy_(SMOOTH * before + (1 - SMOOTH) * information)
        if done >= EARLIEST and int(self.collapsed) < 0 and float(self.information) < LEAST_INFORMATION:
            self.collapsed.fill_(int(self.step))
            say(
                f"warning: memo has collapsed at step {int(self.step)}: its prototypes tell "
                f"{float(self.information):.3f} nats about a view; raise loss.memo.contrastive, or lower "
                "loss.memo.teacher_temperature or optim.lr"
            )
        if int(self.stopped) >= 0 or self._config.contrastive == 0:
            return
        toward = torch.autograd.grad(distilled, embeddings, retain_graph=True)
        pulled = torch.autograd.grad(contrast, embeddings, retain_graph=True)
        cosine = cosine_similarity(
            torch.cat([g.flatten() for g in toward]), torch.cat([g.flatten() for g in pulled]), 0
        )
        first = int(self.step) == 0
        self.agreement.copy_(cosine if first else SMOOTH * self.agreement + (1 - SMOOTH) * cosine)
        self.level.copy_(contrast.detach() if first else SMOOTH * self.level + (1 - SMOOTH) * contrast.detach())
        if done < EARLIEST:
            return
        if self.level < self.best:
            self.best.copy_(self.level)
            self.stood.copy_(self.step)
        steps_in_all = int(self.step) / done
        self.opposed.fill_(bool(self.agreement < 0))
        if self.opposed or int(self.step - self.stood) > PATIENCE * steps_in_all:
            self.stopped.fill_(int(self.step))
            say(f"memo: contrastive term stopped at step {int(self.step)}: {self._reason()}")

    def _reason(self) -> str:
        if self.opposed:
            return f"its gradient opposes the distillation's (smoothed cosine {float(self.agreement):.3f})"
        return f"it has not fallen since step {int(self.stood)} ({float(self.best):.2f})"

    @torch.no_grad()
    def after_step(self, network: Network, done: float) -> None:
        low, high = self._config.momentum
        momentum = high - (high - low) * (math.cos(math.pi * done) + 1) / 2
        self.own.follow(network, momentum)
        if self.partner is not None:
            self.other.follow(self._partner(), momentum)
        for centre, mean in self._centres:
            centre.lerp_(mean, 1 - self._config.centre)
        self._centres.clear()
        self.step += 1

    def kept(self, network: Network) -> Network:
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


def _still(module: Any) -> Any:
    """A copy that no optimiser moves."""
    return copy.deepcopy(module).requires_grad_(False)


def _entropy(p: Tensor) -> Tensor:
    """(..., K) -> (...): in nats."""
    return -(p * p.clamp_min(1e-30).log()).sum(-1)
