"""Base classes of models that give vectors, and of teachers: frozen models that declare their targets beforehand."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from spkd.corpus.audio import SAMPLE_RATE
from spkd.corpus.augment import Augmentation
from spkd.corpus.loader import WASTE, ViewLoader, batched
from spkd.corpus.manifest import Manifest
from spkd.corpus.view import Views
from spkd.outputs.head import Head
from spkd.outputs.target import EMBEDDING, Target
from spkd.outputs.teacher_card import TeacherCard
from spkd.progress import log
from spkd.students.description import Training
from spkd.teachers.settings import ModelConfig


class EmbeddingModel(ABC):
    """Base class of models that turn waveforms into vectors, on one device: frozen ones, and students in training.

    Attributes:
        targets: all its outputs, by name: dimension, frame rate and window are declared, not guessed.
        min_samples: shortest waveform it accepts (16 kHz).
        max_samples: longest waveform whose memory stays bounded; None where any does.
        takes_lengths: whether views of different lengths can share a batch, each with the outputs it has alone.
        device: where it runs.
        precision: of its matrix products and convolutions; None: of its weights.
        num_parameters: of the model; None where that is not known.
        training: on whom it was trained; None where that is not known.
        weights_sha256: digest of its weights; "" where they lie nowhere.
    """

    targets: dict[str, Target]
    min_samples: int = 400
    max_samples: int | None = None
    takes_lengths: bool = False
    device: torch.device = torch.device("cpu")
    precision: torch.dtype | None = None
    num_parameters: int | None = None
    training: Training | None = None

    @abstractmethod
    def forward(self, waves: Tensor, names: list[str], lengths: Tensor | None = None) -> dict[str, Tensor]:
        """The named outputs of a batch.

        Args:
            waves: (B, samples), on the model's device.
            names: of targets; others may be in the result.
            lengths: (B,) samples of each view, where shorter ones are padded with zeros; only given to models that
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

    def extract(
        self, waves: Tensor, names: list[str], halves: Collection[str] = (), lengths: Tensor | None = None
    ) -> dict[str, np.ndarray]:
        """The named targets of a batch of waveforms (B, samples), on any device.

        Args:
            lengths: as for `forward`.
            halves: targets to round to float16 on the model's device (half the bytes to carry, and no work for the
                writer); the others are float32.
        """
        lower = contextlib.nullcontext() if self.precision is None else torch.autocast(self.device.type, self.precision)
        with torch.inference_mode(), lower:
            given = {} if lengths is None else {"lengths": lengths.to(self.device)}
            outputs = self.forward(waves.to(self.device, non_blocking=True), names, **given)
            types = {name: torch.float16 if name in halves else torch.float32 for name in names}
            return {name: outputs[name].to(types[name]).cpu().numpy() for name in names}

    def embed(self, waves: Sequence[np.ndarray], batch_size: int = 32) -> np.ndarray:
        """Embeddings (N, D) of N waveforms (samples,) of any lengths.

        Args:
            batch_size: waveforms in one batch; of different length only where padding does not change the outputs.
        """
        embeddings = np.empty((len(waves), self.targets[EMBEDDING].dim), np.float32)
        samples = np.array([len(wave) for wave in waves], np.int64)
        for group in batched(np.arange(len(waves)), samples, batch_size, WASTE if self.takes_lengths else 0.0):
            lengths = torch.from_numpy(samples[group])
            batch = pad_sequence([torch.from_numpy(waves[index]) for index in group], True)
            given = lengths if len(lengths.unique()) > 1 else None
            embeddings[group] = self.extract(batch, [EMBEDDING], lengths=given)[EMBEDDING]
        return embeddings

    @property
    def weights_sha256(self) -> str:
        return ""


class Teacher(EmbeddingModel):
    """Base class of teachers: a frozen model with its weights, which describes itself on the card of a cache.

    A new family is a subclass in a file of its own and its name in spkd.registry.TEACHERS.

    Attributes:
        Settings: dataclass of its own settings, where it has any.
        family: its name in the registry.
        head: its own speaker classifier, where it has one.
        on_card: names of the own settings that `card` states itself, as they act (the layer that None stands for).
        own_settings: the values of the others, which are part of the card as they are.
    """

    family: str
    head: Head | None = None
    on_card: ClassVar[Collection[str]] = ()
    own_settings: Mapping[str, Any] = MappingProxyType({})

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

    @property
    def weights_sha256(self) -> str:
        return self.card().weights_sha256

    def described(self) -> TeacherCard:
        """The card of the teacher as it runs here: with its own settings, and its precision where that is not full."""
        card, further = self.card(), dict[str, Any]()
        if self.own_settings:
            further["own_settings"] = dict(self.own_settings)
        if self.precision is not None:
            further["precision"] = str(self.precision).removeprefix("torch.")
        return replace(card, details=card.details | further)
