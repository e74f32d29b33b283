"""A model trained by spkd as a teacher, or as what `spkd eval` scores."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from spkd import digest
from spkd.cache.card import TeacherCard
from spkd.cache.head import Head
from spkd.config import ModelConfig
from spkd.features import FBANKS, WAVE, WINDOW
from spkd.students import load_student
from spkd.students.network import FRAME_LEVEL, count_parameters
from spkd.target import EMBEDDING, LOGITS, Target
from spkd.teachers.base import Teacher

FRAME_BYTES = 1 << 29  # of the frames of one view at the widest layer; a forward holds several of that size


PREPROCESSING = {
    FBANKS["kaldi"].name: "80-mel Kaldi fbank, 25/10 ms, mean-normalised per view",
    FBANKS["wespeaker"].name: "80-mel fbank with a Hamming window, 25/10 ms, mean-normalised per view",
    FBANKS["3d-speaker"].name: "80-mel Kaldi fbank of samples in [-1, 1], 25/10 ms, mean-normalised per view",
    WAVE.name: "waveform, normalised per view",
}


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
        frames = self.network.levels[FRAME_LEVEL]
        self.max_samples = (frames.hop or 1) * (FRAME_BYTES // (4 * frames.dim))
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
            preprocessing=PREPROCESSING[self.network.input_kind.name],
            details={"network": type(self.network).__name__, "settings": self.network.settings},
        )

    def forward(self, waves: Tensor, names: list[str]) -> dict[str, Tensor]:
        outputs = self.network(self.network.features(waves))
        if self.head is not None and LOGITS in names:
            outputs[LOGITS] = self.head.logits(outputs[EMBEDDING])
        return outputs
