"""A model trained by spkd as a teacher, or as what `spkd eval` scores."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from spkd import digest
from spkd.cache.card import TeacherCard
from spkd.cache.head import Head
from spkd.config import ModelConfig
from spkd.features import WAVE, WINDOW
from spkd.students import load_student
from spkd.students.network import count_parameters
from spkd.target import EMBEDDING, LOGITS, Target
from spkd.teachers.base import Teacher


class CheckpointTeacher(Teacher):
    """Targets: every level of the network (frames at 100 Hz, stats, ..., embedding), and logits where it has a head."""

    family = "checkpoint"
    min_samples = WINDOW

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._folder, self.device = folder, device
        checkpoint = load_student(folder)
        self.network = checkpoint.network.to(device)
        self.num_parameters = count_parameters(self.network)
        if checkpoint.head is not None:
            self.head = Head(checkpoint.head, checkpoint.classes, checkpoint.scale)
        self.targets = dict(self.network.levels)
        if self.head is not None:
            self.targets[LOGITS] = Target(LOGITS, len(self.head.classes))

    @classmethod
    def load(cls, config: ModelConfig, device: torch.device) -> CheckpointTeacher:
        return cls(Path(config.weights or "student"), device)

    def card(self) -> TeacherCard:
        return TeacherCard(
            family=self.family,
            weights_sha256=digest.of_file(self._folder / "model.safetensors"),
            licence="the owner's",
            source=self._folder.name,
            preprocessing="waveform, normalised per view"
            if self.network.input_kind == WAVE
            else "80-mel Kaldi fbank, 25/10 ms, mean-normalised per view",
            details={"network": type(self.network).__name__, "settings": self.network.settings},
        )

    def forward(self, waves: Tensor, names: list[str]) -> dict[str, Tensor]:
        outputs = self.network(self.network.features(waves))
        if self.head is not None and LOGITS in names:
            outputs[LOGITS] = self.head.logits(outputs[EMBEDDING])
        return outputs
