"""Training batches: a pure function of (seed, step), so that a run resumes exactly and loaders cannot reorder it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from spkd.cache import CacheSource, Crop, Rows
from spkd.corpus.audio import SAMPLE_RATE, AudioError, change_speed
from spkd.corpus.augment import Augmentation
from spkd.corpus.loader import ViewLoader
from spkd.errors import SpkdError
from spkd.outputs.features import HOP, input_features
from spkd.outputs.target import Target
from spkd.seeding import Purpose, random_state, seed_of
from spkd.train.alignment import Alignment
from spkd.train.distributed import ALONE, Ranks
from spkd.train.labels import Groups, Labels

Positives = Callable[[np.ndarray, np.random.RandomState], np.ndarray]


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
            same instance (the same utterance in the same voice, augmented otherwise), or of a mined positive.
        augment, speeds: what is done afresh to the audio; None and 1: nothing.
    """

    kind: Target
    loader: ViewLoader | None
    crops: tuple[float, ...]
    augment: Augmentation | None = None
    speeds: tuple[float, ...] = (1.0,)


@dataclass
class HostBatch:
    """A batch as it is stored, before it is decoded on the training device.

    Attributes:
        views: (B,) their numbers.
        label, instance, teacher_label: (B,); see LossInputs.
        crops: of each crop its input features, and of the first the targets too, by name, as stored.
        alignments: how the student's frames meet those of each target at frame level.
    """

    views: Tensor
    label: Tensor
    instance: Tensor
    teacher_label: Tensor
    crops: list[dict[str, Tensor]] = field(default_factory=list)
    alignments: dict[str, Alignment] = field(default_factory=dict)

    def pin_memory(self) -> HostBatch:
        """The loader calls this where there is CUDA."""
        self.crops = [{name: values.pin_memory() for name, values in crop.items()} for crop in self.crops]
        self.alignments = {name: alignment.pin_memory() for name, alignment in self.alignments.items()}
        return self


class StepBatches(Dataset):
    """Item `step` is the whole batch of that step.

    Args:
        needs: the targets to gather, for the first crop.
        labelled: pass over the views with a speaker label only.
        order: of the views of an epoch; None: the cache's own.
        ranks: of which this one loads its part of every batch.
        bucketed: whether the crops of a batch are no longer than its shortest view.
        positives: another view for each of some, from which further crops are cut; None: one of the same instance.
        later: the batch from which the first crop has another length, and that length (s); None: it never has.
        level: the student's frames, where they meet frames of the teacher; None: none do.
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
        later: tuple[int, float] | None = None,
        order: Callable[[int], np.ndarray] | None = None,
        bucketed: bool = False,
        ranks: Ranks = ALONE,
        positives: Positives | None = None,
        level: Target | None = None,
    ) -> None:
        self._teacher_label = np.zeros(0, np.int64) if logits is None else logits.label
        self._cache, self._needs, self._labels, self._source = cache, needs, labels, source
        self._samples = [_whole_hops(seconds) for seconds in source.crops]
        self._later = None if later is None else (later[0], _whole_hops(later[1]))
        self.batch_size, self._seed, self._part = batch_size, seed, ranks.part(batch_size)
        self._left_out = labels.label < 0 if labelled else np.zeros(len(cache), bool)
        self._order_of = order or self._shuffled
        self._epoch, self._order, views = -1, np.zeros(0, np.int64), int((~self._left_out[cache.usable_views]).sum())
        if order is not None:
            self._epoch, self._order = 0, order(0)
            views = len(self._order)
        self.per_epoch, self._bucketed = max(views // batch_size, 1), bucketed
        self._positives = positives
        self._frames = {name: cache.target(name) for name in needs if cache.target(name).hop is not None}
        self._level = level
        # A student with fewer frames than its input has the same ones only where a crop starts at one of them.
        self._grid = level.hop if self._frames and level and level.hop and level.hop % HOP == 0 else HOP
        if len(self._samples) > 1 and positives is None:
            self._positives = Groups.of(labels.instance, cache.usable_views).same

    def views(self, step: int) -> np.ndarray:
        """The views of a step: every epoch passes over all of them in a fresh order; the last short batch is
        dropped."""
        epoch, position = divmod(step, self.per_epoch)
        if self._epoch != epoch:
            self._epoch, self._order = epoch, self._order_of(epoch)
        return self._order[position * self.batch_size : (position + 1) * self.batch_size]

    def _own(self, crop: Crop) -> Crop:
        """This rank's part of a batch's crops."""
        return Crop(crop.start[self._part], crop.samples, crop.grid)

    def _shuffled(self, epoch: int) -> np.ndarray:
        order = self._cache.order(self._seed, epoch)
        return order[~self._left_out[order]]

    def crop(self, step: int, views: np.ndarray, which: int = 0) -> Crop:
        """Where each view is cropped: at whole hops of the input features, so that cached ones are exactly the crop's,
        and where frames meet, of the student's frames."""
        random = random_state(Purpose.CROP, self._seed, step, which)
        samples = self._samples[which]
        if self._later is not None and step >= self._later[0] and samples == self._samples[0]:
            samples = self._later[1]
        if self._bucketed:
            samples = min(samples, max(int(self._cache.plan.views.samples[views].min()) // HOP * HOP, HOP))
        room = np.maximum(self._cache.plan.views.samples[views] - samples, 0) // self._grid + 1
        start = (random.random_sample(len(views)) * room).astype(np.int64) * self._grid
        return Crop(start, samples, self._grid)

    def _alignments(self, views: np.ndarray, crop: Crop) -> dict[str, Alignment]:
        if self._level is None:
            return {}
        level, samples = self._level, self._cache.plan.views.samples[views]
        return {name: Alignment.of(level, target, samples, crop) for name, target in self._frames.items()}

    def __getitem__(self, step: int) -> HostBatch:
        # Random numbers are drawn for the whole batch, so that they do not depend on the number of ranks.
        every, part = self.views(step), self._part
        views, crop = every[part], self._own(self.crop(step, every))
        seed = seed_of(Purpose.AUGMENT, self._seed, step) + part.start
        crops = [load_crops(self._cache, self._source, views, crop, self._needs, seed)]
        alignments = self._alignments(views, crop)
        for which in range(1, len(self._samples)):
            assert self._positives is not None
            others = self._positives(every, random_state(Purpose.CROP_VIEW, self._seed, step, which))
            crop = self._own(self.crop(step, others, which))
            seed = seed_of(Purpose.AUGMENT, self._seed, step, which) + part.start
            crops.append(load_crops(self._cache, self._source, others[part], crop, (), seed))
        return HostBatch(
            torch.from_numpy(views),
            torch.from_numpy(self._labels.label[views]),
            torch.from_numpy(self._labels.instance[views]),
            torch.from_numpy(self._teacher_label[views] if len(self._teacher_label) else views[:0]),
            crops,
            alignments,
        )


def _whole_hops(seconds: float) -> int:
    """Samples of a crop, at least one hop."""
    return HOP * max(round(seconds * SAMPLE_RATE / HOP), 1)


def load_crops(
    cache: CacheSource,
    source: InputSource,
    views: np.ndarray,
    crop: Crop,
    needs: Sequence[str] = (),
    seed: int | None = None,
) -> dict[str, Tensor]:
    """Input features of the crops and the teacher's targets of them, as stored.

    Args:
        seed: of fresh augmentation, where the source has any; None: without.
    """
    kind, loader = source.kind, source.loader
    if loader is None:
        return cache.stored(views, [*needs, kind.name], crop)
    batch = cache.stored(views, needs, crop) if needs else {}
    return batch | {kind.name: _from_audio(source, loader, views, crop, seed)}


def decode_crops(
    cache: CacheSource, source: InputSource, stored: dict[str, Tensor], needs: Sequence[str] = ()
) -> tuple[Tensor, dict[str, Tensor]]:
    """What `load_crops` gave, on any device: the input features (B, T, F) and the targets, float32; frames are as the
    cache's codec gives them, which may be half precision."""
    name = source.kind.name
    if source.loader is None:
        decoded = cache.decode(stored, [*needs, name])
    else:
        rest = {key: values for key, values in stored.items() if key != name}
        decoded = (cache.decode(rest, needs) if needs else {}) | {name: stored[name]}
    features = decoded.pop(name).float()
    return features, {key: values if values.ndim == 3 else values.float() for key, values in decoded.items()}


def _from_audio(source: InputSource, loader: ViewLoader, views: np.ndarray, crop: Crop, seed: int | None) -> Tensor:
    """Input features of the crops from the audio itself, each view as it was at extraction, and augmented afresh where
    that is asked for."""
    found, kind = [], source.kind
    for number, (view, start) in enumerate(zip(views, crop.start, strict=True)):
        try:
            wave, speed = loader(int(view)), 1.0
        except AudioError as error:
            raise SpkdError(f"training: {error}") from error
        if source.augment is not None and seed is not None:
            own = 104_729 * (seed + number) % 2**32
            speed = float(source.speeds[own % len(source.speeds)])
            wave = source.augment(change_speed(wave, speed), own)
        features = input_features(kind, torch.from_numpy(np.ascontiguousarray(wave))[None])[0]
        # Cut, and repeated past its end, as the cache does.
        here = Crop(np.array([int(start / speed) // HOP * HOP]), crop.samples, crop.grid)
        found.append(features[torch.from_numpy(Rows.of(kind, np.array([len(wave)]), here).numbers[0])])
    return torch.stack(found)
