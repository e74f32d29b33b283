"""What every loss is."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spkd.cache import Target
from spkd.config import LossConfig
from spkd.models import Network


@dataclass(frozen=True)
class Said:
    """What is known of a batch of B views, and what the student said beside its levels of the first crops.

    targets: the teacher's, by name, float32. label: (B,) class of each view, -1 unknown. voice: (B,) one number per
    (utterance, speed): views that share it are the same voice whatever the labels say. teacher_label: (B,) the label
    among the classes of the teacher's logits, -1 where it has none (empty: no logits here). teacher_scale: of the
    teacher's cosine logits; None where they are of another kind. done: fraction of the run that is over. negatives:
    (B, N, D) teacher embeddings of voices that are hard to tell from each view's, where they are mined.

    crops: the student's features (B, T_i, F) of every crop. others: its levels of the crops after the first. tuned,
    tuned_label: its levels of other, labelled views through the adapters, and their classes (see OneStep).
    """

    targets: dict[str, Tensor]
    label: Tensor
    voice: Tensor
    teacher_label: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    teacher_scale: float | None = None
    done: float = 1.0
    negatives: Tensor | None = None
    crops: list[Tensor] = field(default_factory=list)
    others: list[dict[str, Tensor]] = field(default_factory=list)
    tuned: dict[str, Tensor] = field(default_factory=dict)
    tuned_label: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))


class Loss(nn.Module):
    """Student levels and what the teacher said -> one scalar.

    Class attributes:
        needs: names of the targets. needs_labels: whether every view must have a speaker label.

    partner: another network that it trains beside the student, and what belongs to it.
    """

    needs: tuple[str, ...] = ()
    needs_labels: bool = False

    def __init__(self, config: LossConfig, levels: dict[str, Target], targets: dict[str, Target], classes: int) -> None:
        """levels: the student's. targets: the cache's. classes: number of speakers."""
        super().__init__()
        self.partner: nn.Module | None = None

    @classmethod
    def needed(cls, config: LossConfig) -> tuple[str, ...]:
        """`needs`, where they do not depend on the settings."""
        return cls.needs

    @classmethod
    def tunes(cls, config: LossConfig) -> bool:
        """Whether it fine-tunes besides, on labelled views that go through the student's adapters."""
        return False

    @classmethod
    def crops(cls, config: LossConfig) -> tuple[float, ...]:
        """How long further crops of each voice have to be (s; 0: as long as the first)."""
        return ()

    def join(self, network: Network) -> None:
        """Before the first step: take what is wanted of the student."""

    def after_step(self, network: Network, done: float) -> None:
        """After every step of the optimiser, when a fraction `done` of the run is over."""

    def kept(self, network: Network) -> Network:
        """What the run is for: the student itself, unless the loss made a better one of it."""
        return network

    def report(self) -> dict[str, Any]:
        """What happened, for the checkpoint's record."""
        return {}

    @abstractmethod
    def forward(self, student: dict[str, Tensor], said: Said) -> Tensor:
        """(): the mean over the batch."""


def projection(source: int, target: int) -> nn.Module:
    """Student width to teacher width, dropped at export; nothing where they are equal."""
    return nn.Identity() if source == target else nn.Linear(source, target, bias=False)
