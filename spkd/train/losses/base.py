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
    """Inputs of a loss for a batch of B views, in addition to the student's levels of their first crops.

    Attributes:
        targets: the teacher's targets by name, float32. Frames may be in half precision, as they are stored:
            converting them all costs as much as comparing them.
        alignments: alignment of the student's frames with those of each target at frame level, by name.
        label: (B,) class of each view, -1 where the speaker is unknown.
        instance: (B,) number of the instance of each view (see spkd.train.labels): views of the same instance are of
            one speaker, whatever the labels are.
        teacher_label: (B,) class of each view among those of the teacher's logits, -1 where it has none; empty without
            logits.
        teacher_scale: scale of the teacher's cosine logits; None where they are of another kind.
        progress: fraction of the run that is over (1 in large-margin fine-tuning).
        margin: angular margin of the step, which replaces that of the loss; None: the loss's own.
        negatives: (B, N, D) hard negatives of each view, as teacher embeddings, where they are mined.
        is_negative: (B, N) whether each of these may be used; None: all.
        crops: input features (B, T_i, F) of every crop.
        other_levels: the student's levels of each crop after the first.
        other_instance: (B,) instances of each of these crops, which differ from those of the first where positives are
            mined; empty: the same.
        finetune_levels: the student's levels of other, labelled views through the adapters (see OneStep).
        finetune_label: classes of these views.
        precision: precision of the matrix products of further networks; None: fp32. The loss itself is computed in
            fp32; levels may come in half precision.
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
    """Student, teacher and labels for which a loss is built.

    Attributes:
        num_classes: number of speaker classes of the labelled views.
        nested: sizes of the student's embedding at which it is usable by its first numbers alone; (): the whole.
        nested_crops: length (s) of the shortest crops that train each of these sizes; (): all crops train all sizes.
    """

    levels: dict[str, Target]
    targets: dict[str, Target]
    num_classes: int
    nested: tuple[int, ...] = ()
    nested_crops: tuple[float, ...] = ()


class TrainedClassifier(NamedTuple):
    """Speaker classifier trained with the student, and kept with it.

    Attributes:
        weight: (classes, D) rows of a cosine classifier.
        scale: scale of its logits.
        over_teacher: whether its classes are those of the teacher's logits; else they are the speakers of the views.
    """

    weight: Tensor
    scale: float
    over_teacher: bool = False


class Loss(nn.Module):
    """Function of student levels and teacher targets, whose value is a scalar.

    A new loss is a subclass in a file of its own and its name in spkd.registry.LOSSES. The trainer knows a loss by what
    is declared here alone.

    Attributes:
        Settings: dataclass of its section `loss.NAME`; it also answers what the trainer asks before the loss is built.
        learns_from: source of the training signal in a few words, for `spkd train --losses` and the docs.
        needs: names of the targets, where they do not depend on the settings. Where several teachers are kept
            separate, there is one such loss for each teacher.
        needs_labels: views that must have a speaker label: "" for none, some or all.
        averages_weights: whether the loss keeps a moving average of the student's weights.
        partner: another network trained together with the student, and its heads.
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
        """Called before the first step, with the student."""

    def after_step(self, network: Network, progress: float) -> None:
        """Called after every step of the optimiser, when a fraction `progress` of the run is over."""

    def trained_network(self, network: Network) -> Network:
        """Network to keep at the end of the run: the student, or the loss's moving average of it."""
        return network

    def classifier(self) -> TrainedClassifier | None:
        """Trained speaker classifier; None where there is none that can be kept. All ranks call this."""
        return None

    def report(self) -> dict[str, Any]:
        """Report of the loss on the run, for the checkpoint's record."""
        return {}

    @abstractmethod
    def forward(self, student: dict[str, Tensor], inputs: LossInputs) -> Tensor:
        """Value of the loss: (), the mean over the batch."""


@dataclass(frozen=True)
class ChosenLoss:
    """A loss of a run, with its settings and weight.

    Attributes:
        final_weight: weight at the end of the run; None: the same.
    """

    name: str
    kind: type[Loss]
    settings: Any
    weight: float = 1.0
    final_weight: float | None = None

    def weight_at(self, progress: float) -> float:
        """Weight in the sum when a fraction `progress` of the run is over."""
        return (
            self.weight + (self.final_weight - self.weight) * progress if self.final_weight is not None else self.weight
        )

    @property
    def needed_targets(self) -> tuple[str, ...]:
        """Names of the targets that the loss needs."""
        return self.settings.needed_targets() or self.kind.needs

    @property
    def depends_on_progress(self) -> bool:
        """Whether the weight or the loss itself changes over the run."""
        return self.final_weight is not None or self.settings.depends_on_progress()


def projection(source: int, target: int) -> nn.Module:
    """Linear map from the student's width to the teacher's, dropped at export; the identity where they are equal."""
    return nn.Identity() if source == target else nn.Linear(source, target, bias=False)
