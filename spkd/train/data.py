"""Training batches: a pure function of (seed, step), so that a run resumes exactly and loaders cannot reorder it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.data import Dataset

from spkd.audio import SAMPLE_RATE, AudioError
from spkd.cache import EMBEDDING, Contents, Crop, Target
from spkd.cache.target import features
from spkd.errors import SpkdError
from spkd.features import HOP
from spkd.view import Player

READ_AT_ONCE = 4096  # views
CROP = "crop"  # before the number and the keys of every crop of a batch but the first


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


@dataclass(frozen=True)
class Listening:
    """How a student hears a cache.

    hears: its features. player: plays the audio of a view where the cache does not hold them; None where it does.
    crops: how long it listens to each view, once or several times (s); after the first it may be given another view
    of the same voice (the same utterance at the same speed, augmented otherwise).
    """

    hears: Target
    player: Player | None
    crops: tuple[float, ...]


class Steps(Dataset):
    """Item `step` is the whole batch of that step: features, targets (both as stored), labels, `rows` (the views).

    Args:
        needs: the targets to gather, for the first crop. labelled: pass over the views with a speaker label only.
    """

    def __init__(
        self,
        cache: Contents,
        needs: list[str],
        classes: Classes,
        listening: Listening,
        batch_size: int,
        seed: int,
        logits: TeacherLabels | None = None,
        labelled: bool = False,
    ) -> None:
        self._teacher_label = np.zeros(0, np.int64) if logits is None else logits.label
        self._cache, self._needs, self._classes, self._listening = cache, needs, classes, listening
        self._samples = [HOP * max(round(seconds * SAMPLE_RATE / HOP), 1) for seconds in listening.crops]
        self._batch_size, self._seed = batch_size, seed
        self._left_out = classes.label < 0 if labelled else np.zeros(len(cache), bool)
        self._per_epoch = max(int((~self._left_out[cache.rows]).sum()) // batch_size, 1)
        self._epoch, self._order = -1, np.zeros(0, np.int64)
        self._of_voice = Groups.of(classes.voice, cache.rows) if len(self._samples) > 1 else None

    def rows(self, step: int) -> np.ndarray:
        """The views of a step: every epoch passes over all of them in a fresh order, the last short batch is left."""
        epoch, position = divmod(step, self._per_epoch)
        if self._epoch != epoch:
            order = self._cache.order(self._seed, epoch)
            self._epoch, self._order = epoch, order[~self._left_out[order]]
        return self._order[position * self._batch_size : (position + 1) * self._batch_size]

    def crop(self, step: int, rows: np.ndarray, which: int = 0) -> Crop:
        """Where the student listens in each view: whole hops, so that cached frames match to the sample."""
        random = np.random.RandomState((self._seed * 1_000_003 + step + which * 7_368_787) % 2**32)
        samples = self._samples[which]
        room = np.maximum(self._cache.plan.views.samples[rows] - samples, 0) // HOP + 1
        return Crop((random.random_sample(len(rows)) * room).astype(np.int64) * HOP, samples)

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        rows = self.rows(step)
        batch = heard(self._cache, self._listening, rows, self.crop(step, rows), self._needs)
        for which in range(1, len(self._samples)):
            assert self._of_voice is not None
            random = np.random.RandomState((self._seed * 1_000_003 + step + which * 15_485_863) % 2**32)
            views = self._of_voice.pick(self._of_voice.group[rows], random)
            more = heard(self._cache, self._listening, views, self.crop(step, views, which))
            batch |= {f"{CROP}{which}:{name}": values for name, values in more.items()}
        batch["rows"] = torch.from_numpy(rows)
        batch["label"] = torch.from_numpy(self._classes.label[rows])
        batch["voice"] = torch.from_numpy(self._classes.voice[rows])
        batch["teacher_label"] = torch.from_numpy(self._teacher_label[rows] if len(self._teacher_label) else rows[:0])
        return batch


def heard(
    cache: Contents, listening: Listening, rows: np.ndarray, crop: Crop, needs: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Features of the crops and what the teacher said of them, as stored."""
    hears, player = listening.hears, listening.player
    if player is None:
        return cache.stored(rows, [*needs, hears.name], crop)
    batch = cache.stored(rows, needs, crop) if needs else {}
    return batch | {hears.name: _listen(player, hears, rows, crop)}


def decode(
    cache: Contents, listening: Listening, batch: dict[str, Tensor], needs: Sequence[str] = ()
) -> tuple[Tensor, dict[str, Tensor]]:
    """What `heard` gave, on any device: the features (B, T, F) and the targets, float32."""
    name = listening.hears.name
    if listening.player is None:
        said = cache.decode(batch, [*needs, name])
    else:
        rest = {key: values for key, values in batch.items() if key != name}
        said = (cache.decode(rest, needs) if needs else {}) | {name: batch[name]}
    return said.pop(name).float(), {key: values.float() for key, values in said.items()}


def _listen(player: Player, hears: Target, rows: np.ndarray, crop: Crop) -> Tensor:
    """Features of the crops from the audio itself, replaying each view as the teacher heard it."""
    found = []
    for row, start in zip(rows, crop.start, strict=True):
        try:
            wave = torch.from_numpy(np.ascontiguousarray(player(int(row))))
        except AudioError as error:
            raise SpkdError(f"training: {error}") from error
        view = features(hears, wave[None])[0]
        first = int(start) // HOP
        # Repeated past its end, as the cache does.
        found.append(view[(first + torch.arange(hears.count(crop.samples))) % len(view)])
    return torch.stack(found)


@dataclass(frozen=True)
class Groups:
    """Views by voice: those of group g are views[first[g] : first[g + 1]]; group: (views,)."""

    views: np.ndarray
    first: np.ndarray
    group: np.ndarray

    @classmethod
    def of(cls, voice: np.ndarray, rows: np.ndarray) -> Groups:
        _, number = np.unique(voice[rows], return_inverse=True)
        group = np.full(len(voice), -1, np.int64)
        group[rows] = number
        first = np.concatenate([[0], np.cumsum(np.bincount(number))])
        return cls(rows[np.argsort(number, kind="stable")], first, group)

    def pick(self, group: np.ndarray, random: np.random.RandomState) -> np.ndarray:
        """A random view of each group."""
        size = self.first[group + 1] - self.first[group]
        return self.views[self.first[group] + (random.random_sample(group.shape) * size).astype(np.int64)]


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
