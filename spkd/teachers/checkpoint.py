"""Student trained by spkd as a teacher, or as a model that `spkd eval` scores."""

from __future__ import annotations

from pathlib import Path

import torch

from spkd.outputs.features import FBANKS
from spkd.outputs.head import Head
from spkd.outputs.teacher_card import TeacherCard
from spkd.students import Training, load_student
from spkd.teachers.settings import ModelConfig
from spkd.teachers.toolkit import FrontEnd, NetworkTeacher, kaldi_front_end


class CheckpointTeacher(NetworkTeacher):
    """Student trained by spkd as a teacher.

    Targets: every level of the network (frames at 100 Hz, stats, ..., embedding), and logits where it has a classifier
    of the embedding that is taken.

    Attributes:
        part: number of numbers of the embedding, the first ones, that are taken; None: all.
    """

    family = "checkpoint"
    training: Training

    def __init__(self, folder: Path, device: torch.device, dimension: int | None = None) -> None:
        checkpoint = load_student(folder, dimension)
        self.folder, self.part, self._digest = folder, checkpoint.part, checkpoint.digest
        network = checkpoint.network
        head = None if checkpoint.head is None else Head(checkpoint.head, checkpoint.classes, checkpoint.scale)
        toolkit = next((name for name, kind in FBANKS.items() if kind == network.input_kind), None)
        words = "waveform, normalised per view" if toolkit is None else kaldi_front_end(toolkit).words
        super().__init__(network, FrontEnd(network.input_kind, network.features, words), head, device)
        self.training = checkpoint.training

    @classmethod
    def load(cls, config: ModelConfig, device: torch.device) -> CheckpointTeacher:
        return cls(Path(config.weights or "student"), device, config.dimension)

    def card(self) -> TeacherCard:
        part = {} if self.part is None else {"dimension": self.part}
        return TeacherCard(
            family=self.family,
            weights_sha256=self._digest,
            licence="the owner's",
            source=self.folder.name,
            preprocessing=self.front_end.words,
            details={"network": type(self.network).__name__, "settings": self.network.settings, **part},
        )
