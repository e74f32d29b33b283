"""Family without a teacher: the cache holds views and fbank alone, for students that learn only from labels."""

from __future__ import annotations

import torch
from torch import Tensor

from spkd.outputs.teacher_card import TeacherCard
from spkd.teachers.base import Teacher
from spkd.teachers.settings import ModelConfig


class NoTeacher(Teacher):
    """Teacher without outputs; extract then stores the fbank of every view."""

    family = "none"
    takes_lengths = True

    def __init__(self) -> None:
        self.targets = {}

    @classmethod
    def load(cls, config: ModelConfig, device: torch.device) -> NoTeacher:
        return cls()

    def card(self) -> TeacherCard:
        return TeacherCard(self.family, "", "none", "no teacher", "80-mel Kaldi fbank, 25/10 ms")

    def forward(self, waves: Tensor, names: list[str], lengths: Tensor | None = None) -> dict[str, Tensor]:
        return {}
