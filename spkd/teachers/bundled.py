"""Student that comes with spkd: a demonstration, which needs no download."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from spkd.files.reading import read_text
from spkd.outputs.teacher_card import TeacherCard
from spkd.teachers.checkpoint import CheckpointTeacher
from spkd.teachers.settings import BUNDLED, ModelConfig

FOLDER = Path(__file__).parents[1] / "bundled"  # made by benchmarks/bundled.py
CARD = "card.md"
# What its exports state, in short; the card has all.
LICENCE = (
    "Apache-2.0; trained on LibriSpeech (CC BY 4.0) and speechocean762 (free for commercial and non-commercial use)"
)
SOURCE = "the model that comes with spkd"


class BundledTeacher(CheckpointTeacher):
    """Student that comes with spkd, as a teacher.

    Targets: every level of the network.
    """

    family = BUNDLED

    @classmethod
    def load(cls, config: ModelConfig, device: torch.device) -> BundledTeacher:
        return cls(FOLDER, device, config.dimension)

    def card(self) -> TeacherCard:
        return replace(super().card(), licence="apache-2.0", source="spkd")


def model_card() -> str:
    """Content of its card: what it was trained on, its error rates, licences."""
    return read_text(FOLDER / CARD)
