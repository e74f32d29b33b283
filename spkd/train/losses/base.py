"""What every loss is."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from spkd.cache import Target
from spkd.config import LossConfig


@dataclass(frozen=True)
class Said:
    """What is known of a batch of B views.

    targets: the teacher's, by name, float32. label: (B,) class of each view, -1 unknown. voice: (B,) one number per
    (utterance, speed): views that share it are the same voice whatever the labels say. teacher_label: (B,) the label
    among the classes of the teacher's logits, -1 where it has none (empty: no logits here). teacher_scale: of the
    teacher's cosine logits; None where they are of another kind. done: fraction of the run that is over. negatives:
    (B, N, D) teacher embeddings of voices that are hard to tell from each view's, where they are mined.
    """

    targets: dict[str, Tensor]
    label: Tensor
    voice: Tensor
    teacher_label: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    teacher_scale: float | None = None
    done: float = 1.0
    negatives: Tensor | None = None


class Loss(nn.Module):
    """Student levels and what the teacher said -> one scalar.

    Class attributes:
        needs: names of the targets. needs_labels: whether every view must have a speaker label.
    """

    needs: tuple[str, ...] = ()
    needs_labels: bool = False

    def __init__(self, config: LossConfig, levels: dict[str, int], targets: dict[str, Target], classes: int) -> None:
        """levels: widths of the student's levels. targets: the cache's. classes: number of speakers."""
        super().__init__()

    @classmethod
    def needed(cls, config: LossConfig) -> tuple[str, ...]:
        """`needs`, where they do not depend on the settings."""
        return cls.needs

    @abstractmethod
    def forward(self, student: dict[str, Tensor], said: Said) -> Tensor:
        """(): the mean over the batch."""


def projection(source: int, target: int) -> nn.Module:
    """Student width to teacher width, dropped at export; nothing where they are equal."""
    return nn.Identity() if source == target else nn.Linear(source, target, bias=False)
