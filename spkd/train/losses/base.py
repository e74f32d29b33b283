"""Base class of losses."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from spkd.outputs.target import Target
from spkd.students import Network
from spkd.train.alignment import Alignment
from spkd.train.losses.settings import LossSettings


@dataclass(frozen=True)
class LossInputs:
    """What a loss may use of a batch of B views, beside the student's levels of their first crops.

    Attributes:
        targets: the teacher's, by name, float32; frames may be in half precision, as they are stored: to convert them
            all costs as much as to compare them.
        alignments: how the student's frames meet those of each target at frame level, by name.
        label: (B,) class of each view, -1 unknown.
        instance: (B,) one number per instance (see spkd.train.labels): views that share it are of one speaker
            whatever the labels are.
        teacher_label: (B,) the label among the classes of the teacher's logits, -1 where it has none (empty: no
            logits).
        teacher_scale: of the teacher's cosine logits; None where they are of another kind.
        progress: fraction of the run that is over (1 in large-margin fine-tuning).
        margin: that angular margins have in the place of their own; None: their own.
        negatives: (B, N, D) teacher embeddings that are hard to tell from each view's, where they are mined.
        is_negative: (B, N) which of these may be used; None: all.
        crops: input features (B, T_i, F) of every crop.
        other_levels: the student's levels of the crops after the first.
        other_instance: (B,) the instance of each of these crops, which differs from that of the first where positives
            are mined; empty: those of the first.
        finetune_levels: its levels of other, labelled views through the adapters (see OneStep).
        finetune_label: their classes.
        precision: of the matrix products of further networks (None: fp32). A loss itself is computed in fp32; levels
            may come in half precision.
    """

    targets: dict[str, Tensor]
    label: Tensor
    instance: Tensor
    teacher_label: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    teacher_scale: float | None = None
    progress: float = 1.0
    margin: float | None = None
    negatives: Tensor | None = None
    is_negative: Tensor | None = None
    crops: list[Tensor] = field(default_factory=list)
    other_levels: list[dict[str, Tensor]] = field(default_factory=list)
    other_instance: list[Tensor] = field(default_factory=list)
    finetune_levels: dict[str, Tensor] = field(default_factory=dict)
    finetune_label: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    precision: torch.dtype | None = None
    alignments: dict[str, Alignment] = field(default_factory=dict)


@dataclass(frozen=True)
class LossContext:
    """What a loss is built for.

    Attributes:
        levels: the student's, by name.
        targets: the teacher's, by name.
        num_classes: speaker classes of the labelled views.
    """

    levels: dict[str, Target]
    targets: dict[str, Target]
    num_classes: int


class TrainedClassifier(NamedTuple):
    """The student's own speaker classifier, kept with it.

    Attributes:
        weight: (classes, D) rows of a cosine classifier.
        scale: of its logits.
        over_teacher: whether its classes are those of the teacher's logits; else they are the speakers of the views.
    """

    weight: Tensor
    scale: float
    over_teacher: bool = False


class Loss(nn.Module):
    """Student levels and teacher targets -> one scalar.

    A new loss is a subclass in a file of its own and its name in spkd.registry.LOSSES. The trainer knows a loss by what
    is declared here alone.

    Attributes:
        Settings: dataclass of its section `loss.NAME`, with what the trainer asks before the loss is built.
        learns_from: in a few words, for `spkd train --losses` and the docs.
        needs: names of the targets, where they do not depend on the settings. Where several teachers are kept
            separate, a loss with `needs` is there once for each.
        needs_labels: which views must have a speaker label: none (empty), some or all.
        averages_weights: whether it makes a moving average of the student itself.
        partner: another network that it trains beside the student, and what belongs to it.
    """

    Settings: ClassVar[type[LossSettings]] = LossSettings
    learns_from: ClassVar[str] = ""
    needs: ClassVar[tuple[str, ...]] = ()
    needs_labels: ClassVar[Literal["", "some", "all"]] = ""
    averages_weights: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        # The settings of an installed package's loss may be a plain dataclass.
        if not issubclass(cls.Settings, LossSettings):
            cls.Settings = type(cls.Settings.__name__, (cls.Settings, LossSettings), {})

    def __init__(self, settings: Any, context: LossContext) -> None:
        super().__init__()
        self.partner: nn.Module | None = None

    def join(self, network: Network) -> None:
        """Before the first step: take what is needed of the student."""

    def after_step(self, network: Network, progress: float) -> None:
        """After every step of the optimiser, when a fraction `progress` of the run is over."""

    def trained_network(self, network: Network) -> Network:
        """What the run is for: the student itself, unless the loss made a better one of it."""
        return network

    def classifier(self) -> TrainedClassifier | None:
        """The speaker classifier that it trained; None where it trained none that can be kept. All ranks call it."""
        return None

    def report(self) -> dict[str, Any]:
        """What happened, for the checkpoint's record."""
        return {}

    @abstractmethod
    def forward(self, student: dict[str, Tensor], inputs: LossInputs) -> Tensor:
        """(): the mean over the batch."""


@dataclass(frozen=True)
class ChosenLoss:
    """A loss of a run.

    Attributes:
        name: in the registry.
        kind: its class.
        settings: its own, a LossSettings.
        weight: in the sum.
        final_weight: at the end of the run; None: the same.
    """

    name: str
    kind: type[Loss]
    settings: Any
    weight: float = 1.0
    final_weight: float | None = None

    def weight_at(self, progress: float) -> float:
        """In the sum, when a fraction of the run is over."""
        return (
            self.weight + (self.final_weight - self.weight) * progress if self.final_weight is not None else self.weight
        )

    @property
    def needed_targets(self) -> tuple[str, ...]:
        """Names of the targets."""
        return self.settings.needed_targets() or self.kind.needs

    @property
    def depends_on_progress(self) -> bool:
        """Whether its weight or the loss itself changes over the run."""
        return self.final_weight is not None or self.settings.depends_on_progress()


def projection(source: int, target: int) -> nn.Module:
    """Student width to teacher width, dropped at export; nothing where they are equal."""
    return nn.Identity() if source == target else nn.Linear(source, target, bias=False)
