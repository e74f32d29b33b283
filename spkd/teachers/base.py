"""Base classes of models that give vectors, and of teachers: frozen models that declare their targets."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from spkd.corpus.audio import SAMPLE_RATE
from spkd.corpus.loader import WASTE, ViewLoader, batched
from spkd.corpus.manifest import Manifest
from spkd.corpus.people import People
from spkd.corpus.view import ViewPlan, Views
from spkd.device import sent
from spkd.outputs.head import Head
from spkd.outputs.target import EMBEDDING, Target
from spkd.outputs.teacher_card import TeacherCard
from spkd.progress import log
from spkd.students.description import Training
from spkd.teachers.settings import ModelConfig


class EmbeddingModel(ABC):
    """Base class of models that turn waveforms into vectors on one device: frozen models, and students in training.

    Attributes:
        targets: all outputs by name, with their declared dimension, frame rate and window.
        min_samples: length of the shortest accepted waveform (samples at 16 kHz).
        max_samples: length of the longest waveform for which memory is bounded (samples); None: no limit.
        takes_lengths: whether views of different lengths can share a batch without changing their outputs.
        precision: precision of its matrix products and convolutions; None: that of its weights.
        num_parameters: number of parameters; None where it is not known.
        training: description of its training; None where it is not known.
        training_lost: whether spkd trained it, and its training is not known.
        weights_sha256: digest of its weights; "" where they are in no file.
    """

    targets: dict[str, Target]
    min_samples: int = 400
    max_samples: int | None = None
    takes_lengths: bool = False
    device: torch.device = torch.device("cpu")
    precision: torch.dtype | None = None
    num_parameters: int | None = None
    training: Training | None = None
    training_lost: bool = False

    @abstractmethod
    def forward(self, waves: Tensor, names: list[str], lengths: Tensor | None = None) -> dict[str, Tensor]:
        """Outputs of a batch, by name.

        Args:
            waves: (B, samples), on the model's device.
            names: names of the targets; the result may hold others too.
            lengths: (B,) number of samples of each view, where shorter views are padded with zeros; only passed to
                models that take lengths.
        Returns:
            (B, D) or (B, T, D) for each target. Frames that come from padding are undefined.
        """

    def view_loader(self, manifest: Manifest, views: Views, plan: ViewPlan, min_seconds: float) -> ViewLoader:
        """Loader of the views of a manifest.

        It refuses views that are too short or too long for this model, and utterances shorter than `min_seconds`. Its
        remarks on the audio are logged.

        Args:
            min_seconds: shortest utterance (s).
        """
        shortest, longest = self.limits(min_seconds)
        return ViewLoader(manifest, views, plan, shortest, log, longest)

    def limits(self, min_seconds: float) -> tuple[float, float | None]:
        """Length (s) of the shortest accepted utterance, and of the longest accepted view; None: no limit."""
        longest = None if self.max_samples is None else self.max_samples / SAMPLE_RATE
        return max(min_seconds, self.min_samples / SAMPLE_RATE), longest

    def extract(
        self, waves: Tensor, names: list[str], halves: Collection[str] = (), lengths: Tensor | None = None
    ) -> dict[str, np.ndarray]:
        """Targets of a batch as arrays, by name.

        Args:
            waves: (B, samples), on any device.
            halves: names of the targets to round to float16 on the model's device, which halves the transfer and saves
                work of the writer; the others are float32.
            lengths: as for `forward`.
        """
        return self.begin(waves, names, halves, lengths)()

    def begin(
        self, waves: Tensor, names: list[str], halves: Collection[str] = (), lengths: Tensor | None = None
    ) -> Callable[[], dict[str, np.ndarray]]:
        """Begin to compute what `extract` gives, with its arguments. A GPU works on while the host goes on.

        Returns:
            Function that waits for the arrays and returns them.
        """
        lower = contextlib.nullcontext() if self.precision is None else torch.autocast(self.device.type, self.precision)
        is_gpu = self.device.type == "cuda"
        with torch.inference_mode(), lower:
            given = {} if lengths is None else {"lengths": sent(lengths, self.device)}
            outputs = self.forward(waves.to(self.device, non_blocking=True), names, **given)
            types = {name: torch.float16 if name in halves else torch.float32 for name in names}
            # A copy that nobody waits for goes into pinned memory; only CUDA says when it is there.
            copies = {name: outputs[name].to(types[name]).to("cpu", non_blocking=is_gpu) for name in names}
        copied = torch.cuda.current_stream(self.device).record_event() if is_gpu else None

        def finish() -> dict[str, np.ndarray]:
            if copied is not None:
                copied.synchronize()
            return {name: values.numpy() for name, values in copies.items()}

        return finish

    def embed(self, waves: Sequence[np.ndarray], batch_size: int = 32) -> np.ndarray:
        """Embeddings (N, D) of N waveforms (samples,) of any lengths.

        Args:
            waves: waveforms at 16 kHz.
            batch_size: number of waveforms in one batch. A batch has different lengths only where padding does not
                change the outputs.
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
    def people(self) -> People:
        """People of whom a student of this model learns indirectly, as far as spkd trained it."""
        if self.training is None:
            return People(unknown=self.training_lost)
        return self.training.people_with_teachers

    @property
    def weights_sha256(self) -> str:
        """SHA-256 of its weights; "" where they are in no file."""
        return ""


class Teacher(EmbeddingModel):
    """Base class of teachers: frozen models with their weights, described on the card of a cache.

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
        """Load the teacher with its weights, on a device.

        Raises:
            UsageError: missing weights or packages, or invalid settings.
            SpkdError: damaged weights.
        """

    @abstractmethod
    def card(self) -> TeacherCard:
        """Card: family, digest of the weights, licence, preprocessing."""

    @property
    def weights_sha256(self) -> str:
        """SHA-256 of its weights; "" where they are in no file."""
        return self.card().weights_sha256

    def described(self) -> TeacherCard:
        """Card of the teacher as it runs here: with its own settings, and its precision where that is reduced."""
        card, further = self.card(), dict[str, Any]()
        if self.own_settings:
            further["own_settings"] = dict(self.own_settings)
        if self.precision is not None:
            further["precision"] = str(self.precision).removeprefix("torch.")
        return replace(card, details=card.details | further)
