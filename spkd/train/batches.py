"""Training batches: a pure function of (seed, step), so that a run resumes exactly and loaders cannot reorder it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from spkd.audio import SAMPLE_RATE, AudioError
from spkd.cache import CacheSource, Crop
from spkd.errors import SpkdError
from spkd.features import HOP, input_features
from spkd.loader import ViewLoader
from spkd.seeding import Purpose, random_state
from spkd.target import Target
from spkd.train.labels import Groups, Labels


class TeacherLabels(Protocol):
    """label: (views,), the class of each view among those of the teacher's logits."""

    @property
    def label(self) -> np.ndarray: ...


@dataclass(frozen=True)
class InputSource:
    """Where the student's input features come from.

    Attributes:
        kind: which of FEATURES.
        loader: of the audio of a view, where the cache does not hold the features; None where it does.
        crops: length of each crop of a view (s), one or several; those after the first may be of another view of the
            same instance (the same utterance at the same speed, augmented otherwise).
    """

    kind: Target
    loader: ViewLoader | None
    crops: tuple[float, ...]


@dataclass
class HostBatch:
    """A batch as it is stored, before it is decoded on the training device.

    Attributes:
        views: (B,) their numbers.
        label, instance, teacher_label: (B,); see LossInputs.
        crops: of each crop its input features, and of the first the targets too, by name, as stored.
    """

    views: Tensor
    label: Tensor
    instance: Tensor
    teacher_label: Tensor
    crops: list[dict[str, Tensor]] = field(default_factory=list)

    def pin_memory(self) -> HostBatch:
        """The loader calls this where there is CUDA."""
        self.crops = [{name: values.pin_memory() for name, values in crop.items()} for crop in self.crops]
        return self


class StepBatches(Dataset):
    """Item `step` is the whole batch of that step.

    Args:
        needs: the targets to gather, for the first crop.
        labelled: pass over the views with a speaker label only.
    """

    def __init__(
        self,
        cache: CacheSource,
        needs: list[str],
        labels: Labels,
        source: InputSource,
        batch_size: int,
        seed: int,
        logits: TeacherLabels | None = None,
        labelled: bool = False,
    ) -> None:
        self._teacher_label = np.zeros(0, np.int64) if logits is None else logits.label
        self._cache, self._needs, self._labels, self._source = cache, needs, labels, source
        self._samples = [HOP * max(round(seconds * SAMPLE_RATE / HOP), 1) for seconds in source.crops]
        self._batch_size, self._seed = batch_size, seed
        self._left_out = labels.label < 0 if labelled else np.zeros(len(cache), bool)
        self._per_epoch = max(int((~self._left_out[cache.usable_views]).sum()) // batch_size, 1)
        self._epoch, self._order = -1, np.zeros(0, np.int64)
        self._of_instance = Groups.of(labels.instance, cache.usable_views) if len(self._samples) > 1 else None

    def views(self, step: int) -> np.ndarray:
        """The views of a step: every epoch passes over all of them in a fresh order; the last short batch is
        dropped."""
        epoch, position = divmod(step, self._per_epoch)
        if self._epoch != epoch:
            order = self._cache.order(self._seed, epoch)
            self._epoch, self._order = epoch, order[~self._left_out[order]]
        return self._order[position * self._batch_size : (position + 1) * self._batch_size]

    def crop(self, step: int, views: np.ndarray, which: int = 0) -> Crop:
        """Where each view is cropped: at whole hops, so that cached frames match to the sample."""
        random = random_state(Purpose.CROP, self._seed, step, which)
        samples = self._samples[which]
        room = np.maximum(self._cache.plan.views.samples[views] - samples, 0) // HOP + 1
        return Crop((random.random_sample(len(views)) * room).astype(np.int64) * HOP, samples)

    def __getitem__(self, step: int) -> HostBatch:
        views = self.views(step)
        crops = [load_crops(self._cache, self._source, views, self.crop(step, views), self._needs)]
        for which in range(1, len(self._samples)):
            assert self._of_instance is not None
            random = random_state(Purpose.CROP_VIEW, self._seed, step, which)
            others = self._of_instance.pick(self._of_instance.group[views], random)
            crops.append(load_crops(self._cache, self._source, others, self.crop(step, others, which)))
        return HostBatch(
            torch.from_numpy(views),
            torch.from_numpy(self._labels.label[views]),
            torch.from_numpy(self._labels.instance[views]),
            torch.from_numpy(self._teacher_label[views] if len(self._teacher_label) else views[:0]),
            crops,
        )


def load_crops(
    cache: CacheSource, source: InputSource, views: np.ndarray, crop: Crop, needs: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Input features of the crops and the teacher's targets of them, as stored."""
    kind, loader = source.kind, source.loader
    if loader is None:
        return cache.stored(views, [*needs, kind.name], crop)
    batch = cache.stored(views, needs, crop) if needs else {}
    return batch | {kind.name: _from_audio(loader, kind, views, crop)}


def decode_crops(
    cache: CacheSource, source: InputSource, stored: dict[str, Tensor], needs: Sequence[str] = ()
) -> tuple[Tensor, dict[str, Tensor]]:
    """What `load_crops` gave, on any device: the input features (B, T, F) and the targets, float32."""
    name = source.kind.name
    if source.loader is None:
        decoded = cache.decode(stored, [*needs, name])
    else:
        rest = {key: values for key, values in stored.items() if key != name}
        decoded = (cache.decode(rest, needs) if needs else {}) | {name: stored[name]}
    return decoded.pop(name).float(), {key: values.float() for key, values in decoded.items()}


def _from_audio(loader: ViewLoader, kind: Target, views: np.ndarray, crop: Crop) -> Tensor:
    """Input features of the crops from the audio itself, each view as it was at extraction."""
    found = []
    for view, start in zip(views, crop.start, strict=True):
        try:
            wave = torch.from_numpy(np.ascontiguousarray(loader(int(view))))
        except AudioError as error:
            raise SpkdError(f"training: {error}") from error
        features = input_features(kind, wave[None])[0]
        first = int(start) // HOP
        # Repeated past its end, as the cache does.
        found.append(features[(first + torch.arange(kind.num_frames(crop.samples))) % len(features)])
    return torch.stack(found)
