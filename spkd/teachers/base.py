"""What every teacher is: a frozen model that declares its targets before it is run."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from spkd.corpus.audio import SAMPLE_RATE
from spkd.corpus.augment import Augmentation
from spkd.corpus.loader import ViewLoader
from spkd.corpus.manifest import Manifest
from spkd.corpus.view import Views
from spkd.outputs.head import Head
from spkd.outputs.target import Target
from spkd.outputs.teacher_card import TeacherCard
from spkd.progress import log
from spkd.teachers.settings import ModelConfig


class Teacher(ABC):
    """A frozen model on one device.

    A new family is a subclass in a file of its own and its name in spkd.registry.TEACHERS.

    Attributes:
        family: its name in the registry.
        targets: all its outputs, by name: dimension, frame rate and window are declared, not guessed.
        min_samples: shortest waveform it accepts (16 kHz).
        max_samples: longest waveform whose memory stays bounded; None where any does.
        head: its own speaker classifier, where it has one.
        takes_lengths: whether views of different lengths can share a batch, each with the outputs it has alone.
        device: where it runs.
        precision: of its matrix products and convolutions; None: of its weights.
        num_parameters: of the model; None where that is not known.
    """

    family: str
    targets: dict[str, Target]
    min_samples: int = 400
    max_samples: int | None = None
    head: Head | None = None
    takes_lengths: bool = False
    device: torch.device = torch.device("cpu")
    precision: torch.dtype | None = None
    num_parameters: int | None = None

    @classmethod
    @abstractmethod
    def load(cls, config: ModelConfig, device: torch.device) -> Teacher:
        """The teacher with its weights, on a device.

        Raises:
            UsageError: missing weights or packages, or settings it cannot have. SpkdError: damaged weights.
        """

    @abstractmethod
    def card(self) -> TeacherCard:
        """Family, digest of the weights, licence, preprocessing: what a colleague needs to know."""

    @abstractmethod
    def forward(self, waves: Tensor, names: list[str], lengths: Tensor | None = None) -> dict[str, Tensor]:
        """The named outputs of a batch.

        Args:
            waves: (B, samples), on the teacher's device.
            names: of targets; others may be in the result.
            lengths: (B,) samples of each view, where shorter ones are padded with zeros; only given to teachers that
                take lengths.
        Returns:
            (B, D) or (B, T, D) per target. Frames that come from padding are undefined.
        """

    def view_loader(
        self, manifest: Manifest, views: Views, augmentation: Augmentation, min_seconds: float
    ) -> ViewLoader:
        """A loader of the views, which refuses those that are too short or too long for this model, and utterances
        below `min_seconds`. What it notices about the audio is logged."""
        shortest, longest = self.limits(min_seconds)
        return ViewLoader(manifest, views, augmentation, shortest, log, longest)

    def limits(self, min_seconds: float) -> tuple[float, float | None]:
        """Seconds of the shortest utterance and of the longest view that are taken."""
        longest = None if self.max_samples is None else self.max_samples / SAMPLE_RATE
        return max(min_seconds, self.min_samples / SAMPLE_RATE), longest

    def described(self) -> TeacherCard:
        """The card of the teacher as it runs here: with its precision, where that is not full."""
        card = self.card()
        if self.precision is None:
            return card
        return replace(card, details=card.details | {"precision": str(self.precision).removeprefix("torch.")})

    def extract(
        self, waves: Tensor, names: list[str], halves: Collection[str] = (), lengths: Tensor | None = None
    ) -> dict[str, np.ndarray]:
        """The named targets of a batch of waveforms (B, samples), on any device.

        Args:
            lengths: as for `forward`.
            halves: targets to round to float16 on the teacher's device (half the bytes to carry, and no work for the
                writer); the others are float32.
        """
        lower = contextlib.nullcontext() if self.precision is None else torch.autocast(self.device.type, self.precision)
        with torch.inference_mode(), lower:
            given = {} if lengths is None else {"lengths": lengths.to(self.device)}
            outputs = self.forward(waves.to(self.device, non_blocking=True), names, **given)
            types = {name: torch.float16 if name in halves else torch.float32 for name in names}
            return {name: outputs[name].to(types[name]).cpu().numpy() for name in names}
