"""Training batches: a pure function of (seed, step), so that a run resumes exactly and loaders cannot reorder it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.data import Dataset

from spkd.audio import SAMPLE_RATE, AudioError
from spkd.cache import EMBEDDING, FBANK, Contents, Crop
from spkd.errors import SpkdError
from spkd.features import HOP, fbank
from spkd.view import Player

READ_AT_ONCE = 4096  # views
NEGATIVE = "negative:"  # before the keys of the hard negatives in a batch


@dataclass(frozen=True)
class Classes:
    """Speaker classes of the views: a speaker at another speed is another voice, so another class.

    names: of each class, `speaker` or `speaker@speed`. label: (views,), -1 where the speaker is unknown.
    voice: (views,), one number per (utterance, speed).
    """

    names: list[str]
    label: np.ndarray
    voice: np.ndarray

    @classmethod
    def of(cls, cache: Contents) -> Classes:
        views, rows = cache.plan.views, np.arange(len(cache))
        speeds, which = np.unique(views.speed, return_inverse=True)
        speaker = cache.speaker(rows).astype(np.int64)
        key = speaker * len(speeds) + which
        used, label = np.unique(key[speaker >= 0], return_inverse=True)
        labels = np.full(len(rows), -1, np.int64)
        labels[speaker >= 0] = label
        names = []
        for k in used:
            name, speed = cache.plan.speakers[k // len(speeds)], float(speeds[k % len(speeds)])
            names.append(name if round(speed, 2) == 1.0 else f"{name}@{speed:.2f}")
        return cls(names, labels, views.utterance.astype(np.int64) * len(speeds) + which)


class TeacherLabels(Protocol):
    """label: (views,), the class of each view among those of the teacher's logits."""

    @property
    def label(self) -> np.ndarray: ...


class Drawer(Protocol):
    """Draws `count` hard negatives for each of the views `rows`: (B, count) views."""

    def draw(self, rows: np.ndarray, count: int, random: np.random.RandomState) -> np.ndarray: ...


class Steps(Dataset):
    """Item `step` is the whole batch of that step: features, targets (both as stored), labels.

    Args:
        player: plays the audio of a view where the cache holds no fbank; None where it does.
        crop: seconds. needs: the targets to gather.
    """

    def __init__(
        self,
        cache: Contents,
        needs: list[str],
        classes: Classes,
        crop: float,
        batch_size: int,
        seed: int,
        player: Player | None,
        logits: TeacherLabels | None = None,
        negatives: Drawer | None = None,
        count: int = 0,
    ) -> None:
        self._negatives, self._count = negatives, count
        self._teacher_label = np.zeros(0, np.int64) if logits is None else logits.label
        self._cache, self._needs, self._classes = cache, needs, classes
        self._crop = HOP * round(crop * SAMPLE_RATE / HOP)
        self._batch_size, self._seed, self._player = batch_size, seed, player
        self._epoch, self._order = -1, np.zeros(0, np.int64)

    def rows(self, step: int) -> np.ndarray:
        """The views of a step: every epoch passes over all of them in a fresh order, the last short batch is left."""
        per_epoch = max(len(self._cache.rows) // self._batch_size, 1)
        epoch, position = divmod(step, per_epoch)
        if self._epoch != epoch:
            self._epoch, self._order = epoch, self._cache.order(self._seed, epoch)
        return self._order[position * self._batch_size : (position + 1) * self._batch_size]

    def crop(self, step: int, rows: np.ndarray) -> Crop:
        """Where the student listens in each view: whole hops, so that cached frames match to the sample."""
        random = np.random.RandomState((self._seed * 1_000_003 + step) % 2**32)
        room = np.maximum(self._cache.plan.views.samples[rows] - self._crop, 0) // HOP + 1
        return Crop((random.random_sample(len(rows)) * room).astype(np.int64) * HOP, self._crop)

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        rows = self.rows(step)
        crop = self.crop(step, rows)
        from_cache = self._needs if self._player else [*self._needs, FBANK.name]
        batch = self._cache.stored(rows, from_cache, crop)
        if self._player is not None:
            batch[FBANK.name] = self._listen(rows, crop)
        batch["label"] = torch.from_numpy(self._classes.label[rows])
        batch["voice"] = torch.from_numpy(self._classes.voice[rows])
        batch["teacher_label"] = torch.from_numpy(self._teacher_label[rows] if len(self._teacher_label) else rows[:0])
        if self._negatives is not None:
            random = np.random.RandomState((self._seed * 1_000_003 + step + 1) % 2**32)
            drawn = self._negatives.draw(rows, self._count, random).ravel()
            stored = self._cache.stored(drawn, [EMBEDDING])
            batch |= {NEGATIVE + name: values for name, values in stored.items()}
        return batch

    def _listen(self, rows: np.ndarray, crop: Crop) -> Tensor:
        """fbank of the crops from the audio itself, replaying each view as the teacher heard it."""
        assert self._player is not None
        features = []
        for row, start in zip(rows, crop.start, strict=True):
            try:
                wave = torch.from_numpy(np.ascontiguousarray(self._player(int(row))))
            except AudioError as error:
                raise SpkdError(f"training: {error}") from error
            view = fbank(wave[None])[0]
            frames = FBANK.count(crop.samples)
            first = int(start) // HOP
            # Repeated past its end, as the cache does.
            features.append(view[(first + torch.arange(frames)) % len(view)])
        return torch.stack(features)


def mean_embeddings(cache: Contents, group: np.ndarray, groups: int) -> Tensor:
    """Mean of the teacher's normalised embeddings of each group of views, normalised: (groups, D).

    Args:
        group: (views,) of every view its group.
    """
    total = torch.zeros(groups, cache.dim(EMBEDDING))
    for start in range(0, len(cache.rows), READ_AT_ONCE):
        rows = cache.rows[start : start + READ_AT_ONCE]
        said = cache.decode(cache.stored(rows, [EMBEDDING]), [EMBEDDING])[EMBEDDING]
        total.index_add_(0, torch.from_numpy(group[rows]), normalize(said.float(), dim=-1))
    return normalize(total, dim=-1)


def mask(features: Tensor, frames: int, bands: int, generator: torch.Generator) -> Tensor:
    """SpecAugment (Park et al., Interspeech 2019) without warping: per crop one stretch of up to `frames` frames and
    one of up to `bands` mel bands take the crop's mean. (B, T, 80) -> (B, T, 80); the generator is on the CPU."""
    mean = features.mean(1, keepdim=True)
    for axis, widest in ((1, frames), (2, bands)):
        size = features.shape[axis]
        width = torch.rand(len(features), generator=generator) * min(widest, size)
        start = torch.rand(len(features), generator=generator) * (size - width)
        position = torch.arange(size)
        hidden = (position >= start.floor()[:, None]) & (position < (start.floor() + width.floor())[:, None])
        hidden = hidden.to(features.device)
        features = torch.where(hidden[:, :, None] if axis == 1 else hidden[:, None, :], mean, features)
    return features
