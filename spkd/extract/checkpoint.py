"""A model trained by spkd as a teacher, or as what `spkd eval` scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spkd.cache import EMBEDDING, LOGITS, WAVE, Head, Target
from spkd.extract.teacher import Teacher, digest_files
from spkd.features import WINDOW
from spkd.models import load


class CheckpointTeacher(Teacher):
    """Targets: every level of the network (frames at 100 Hz, stats, ..., embedding), and logits where it has a head."""

    family = "checkpoint"
    min_samples = WINDOW

    def __init__(self, weights: str | None, device: torch.device) -> None:
        self._folder = Path(weights or "student")
        checkpoint = load(self._folder)
        self.network = checkpoint.network.to(device)
        self._device, self._training = device, checkpoint.training
        if checkpoint.head is not None:
            self.head = Head(checkpoint.head, checkpoint.classes, checkpoint.scale)
        self.targets = dict(self.network.levels)
        if self.head is not None:
            self.targets[LOGITS] = Target(LOGITS, len(self.head.classes))

    def card(self) -> dict[str, Any]:
        return {
            "family": self.family,
            "weights_sha256": digest_files([self._folder / "model.safetensors"]),
            "licence": "the owner's",
            "source": self._folder.name,
            "preprocessing": "waveform, normalised per view"
            if self.network.hears == WAVE
            else "80-mel Kaldi fbank, 25/10 ms, mean-normalised per view",
            "network": type(self.network).__name__,
            "settings": self.network.settings,
        }

    def run(self, waves: Tensor, names: list[str]) -> dict[str, Tensor]:
        said = self.network(self.network.features(waves.to(self._device)))
        if self.head is not None and LOGITS in names:
            said[LOGITS] = self.head.logits(said[EMBEDDING])
        return said
