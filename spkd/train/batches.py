"""Training batches: a pure function of (seed, step), so that a run resumes exactly and loaders cannot reorder it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

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
from spkd.train.labels import Labels, Siblings

# Both go to the loader's processes, which not every system forks: they can be pickled.
Order = Callable[[int], np.ndarray]  # epoch -> its views in order, batch after batch
Positives = Callable[[np.ndarray, np.random.RandomState], np.ndarray]


@dataclass(frozen=True)
class InputSource:
    """Source of the student's input features.

    Attributes:
        kind: kind of features, one of FEATURES.
        loader: loader of the audio of a view, where the cache does not hold the features; None where it does.
        augment: augmentation of the audio, drawn anew in each step; None: none.
        speeds: speed factors, of which one is drawn anew for each crop.
    """

    kind: Target
    loader: ViewLoader | None = None
    augment: Augmentation | None = None
    speeds: tuple[float, ...] = (1.0,)


@dataclass(frozen=True)
class BatchContent:
    """Content of batches: what is read of each view.

    Attributes:
        targets: names of the targets to read, for the first crop.
        teacher_label: (views,) class of each view among those of the teacher's logits; empty: no logits.
    """

    cache: CacheSource
    labels: Labels
    source: InputSource
    targets: Sequence[str] = ()
    teacher_label: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))


class ViewOrder:
    """Views of every step. An epoch passes over all views of an order; its last, incomplete batch is dropped."""

    def __init__(self, order: Order, batch_size: int) -> None:
        self._order, self.batch_size = order, batch_size
        self._epoch, self._views = 0, order(0)
        self.per_epoch = max(len(self._views) // batch_size, 1)

    def views(self, step: int) -> np.ndarray:
        """Views (B,) of a step."""
        epoch, place = divmod(step, self.per_epoch)
        if self._epoch != epoch:
            self._epoch, self._views = epoch, self._order(epoch)
        return self._views[place * self.batch_size : (place + 1) * self.batch_size]


@dataclass(frozen=True)
class CropPlan:
    """Crops of the views of a batch.

    Attributes:
        seconds: length of each crop of a view, one or several (s). Crops after the first may be cut from another view
            of the same instance, or from a mined positive.
        later: number of the batch from which the first crop, and all of the same length, have another length, and that
            length (s); None: the length never changes.
        drawn: lengths (s) of which each batch before `later` has one, in place of that of the first crop and of all of
            its length; (): that does not change.
        seed: seed of these draws.
        to_shortest: whether crops are shortened to the shortest view of the batch.
        positives: function that gives for each view the one from which further crops are cut; None: another view of the
            same instance.
        level: the student's frames, where they are compared with frames of the teacher; None: they are not.
    """

    seconds: tuple[float, ...]
    later: tuple[int, float] | None = None
    drawn: tuple[float, ...] = ()
    seed: int = 0
    to_shortest: bool = False
    positives: Positives | None = None
    level: Target | None = None

    def samples(self, which: int, step: int) -> int:
        """Length (samples) of crop number `which` at a step."""
        seconds = self.seconds[which]
        if seconds != self.seconds[0]:
            return whole_hops(seconds)
        if self.later is not None and step >= self.later[0]:
            seconds = self.later[1]
        elif self.drawn:
            seconds = self.drawn[random_state(Purpose.CROP_LENGTH, self.seed, step).randint(len(self.drawn))]
        return whole_hops(seconds)


@dataclass
class HostBatch:
    """A batch as it is stored, before it is decoded on the training device.

    With two crops, the targets `embedding` (192) and `frames` (512, every 20 ms), and fp16 in the cache:

        views           (B,) int64, numbers of the views in the cache
        label           (B,) int64, -1 where the speaker is unknown
        instance        (B,) int64
        teacher_label   (B,) int64, -1 where the teacher has no such class; (0,) without logits
        crops           [{"fbank": (B, 200, 80) fp16, "embedding": (B, 192) fp16, "frames": (B, 100, 512) fp16},
                         {"fbank": (B, 200, 80) fp16}]
        other_instance  [(B,) int64], of each crop after the first
        alignments      {"frames": Alignment}, times of the teacher's frames in frames of the student
    """

    views: Tensor
    label: Tensor
    instance: Tensor
    teacher_label: Tensor
    crops: list[dict[str, Tensor]] = field(default_factory=list)
    other_instance: list[Tensor] = field(default_factory=list)
    alignments: dict[str, Alignment] = field(default_factory=dict)

    def pin_memory(self) -> HostBatch:
        """The batch in pinned memory; torch's loader calls this where the run is on CUDA."""
        self.crops = [{name: values.pin_memory() for name, values in crop.items()} for crop in self.crops]
        self.alignments = {name: alignment.pin_memory() for name, alignment in self.alignments.items()}
        return self


class StepBatches(Dataset):
    """Batches by step: item `step` is the whole batch of that step, or the rows of one rank.

    Args:
        seed: seed of crop positions, further views and augmentation.
        part: rows of this rank in a batch; None: all.
    """

    def __init__(
        self, content: BatchContent, order: ViewOrder, crops: CropPlan, seed: int, part: slice | None = None
    ) -> None:
        self._content, self._crops, self._seed = content, crops, seed
        self.order = order
        self.part = slice(0, order.batch_size) if part is None else part
        self._positives = crops.positives
        targets = ((name, content.cache.target(name)) for name in content.targets)
        self._frames = {name: target for name, target in targets if target.hop is not None}
        # A student with fewer frames than its input has the same ones only where a crop starts at one of them.
        level = crops.level
        self._grid = level.hop if self._frames and level and level.hop and level.hop % HOP == 0 else HOP
        if len(crops.seconds) > 1 and crops.positives is None:
            self._positives = Siblings(content.cache, content.labels.instance).same

    def crop(self, step: int, views: np.ndarray, which: int = 0) -> Crop:
        """Position of the crop of each view (B,).

        Crops begin at whole hops of the input features, so that cached features are exactly those of the crop. Where
        frames are compared, they begin at whole hops of the student's frames.
        """
        random, lengths = random_state(Purpose.CROP, self._seed, step, which), self._content.cache.plan.views.samples
        # Length: that of the plan, or of the shortest view, in whole hops.
        samples = self._crops.samples(which, step)
        if self._crops.to_shortest:
            samples = min(samples, max(int(lengths[views].min()) // HOP * HOP, HOP))
        # Start: any hop from which the crop fits; the first one where the view is shorter.
        starts = np.maximum(lengths[views] - samples, 0) // self._grid + 1
        return Crop((random.random_sample(len(views)) * starts).astype(np.int64) * self._grid, samples, self._grid)

    def __getitem__(self, step: int) -> HostBatch:
        # Random numbers are drawn for the whole batch, so that they do not depend on the number of ranks.
        every = self.order.views(step)
        labels, teacher_label, views = self._content.labels, self._content.teacher_label, every[self.part]
        others = [self._further(step, every, which) for which in range(1, len(self._crops.seconds))]
        return HostBatch(
            torch.from_numpy(views),
            torch.from_numpy(labels.label[views]),
            torch.from_numpy(labels.instance[views]),
            torch.from_numpy(teacher_label[views] if len(teacher_label) else views[:0]),
            [self._stored(step, every, 0), *(self._stored(step, other, n) for n, other in enumerate(others, 1))],
            [torch.from_numpy(labels.instance[other[self.part]]) for other in others],
            self._alignments(step, every),
        )

    def _alignments(self, step: int, every: np.ndarray) -> dict[str, Alignment]:
        """Alignment of the student's frames with those of each target, for the first crops of this rank's views."""
        level = self._crops.level
        if level is None or not self._frames:
            return {}
        views, crop = every[self.part], self.crop(step, every)
        samples = self._content.cache.plan.views.samples[views]
        part = Crop(crop.start[self.part], crop.samples, crop.grid)
        return {name: Alignment.of(level, target, samples, part) for name, target in self._frames.items()}

    def _further(self, step: int, every: np.ndarray, which: int) -> np.ndarray:
        """View (B,) from which crop number `which` of each view is cut."""
        assert self._positives is not None
        return self._positives(every, random_state(Purpose.CROP_VIEW, self._seed, step, which))

    def _stored(self, step: int, every: np.ndarray, which: int) -> dict[str, Tensor]:
        """Features of crop number `which` of this rank's views, as stored; for the first crop, the targets too."""
        content, crop = self._content, self.crop(step, every, which)
        seed = seed_of(Purpose.AUGMENT, self._seed, step, which) + self.part.start
        part = Crop(crop.start[self.part], crop.samples, crop.grid)
        return load_crops(content.cache, content.source, every[self.part], part, () if which else content.targets, seed)


def whole_hops(seconds: float) -> int:
    """Length of a crop in samples: whole hops, at least one."""
    return HOP * max(round(seconds * SAMPLE_RATE / HOP), 1)


def load_crops(
    cache: CacheSource,
    source: InputSource,
    views: np.ndarray,
    crop: Crop,
    needs: Sequence[str] = (),
    seed: int | None = None,
) -> dict[str, Tensor]:
    """Input features and teacher targets of crops, as stored.

    Args:
        views: (B,) numbers of the views.
        seed: seed of the augmentation, where the source has one; None: without augmentation.
    """
    kind, loader = source.kind, source.loader
    if loader is None:
        return cache.stored(views, [*needs, kind.name], crop)
    batch = cache.stored(views, needs, crop) if needs else {}
    return batch | {kind.name: _from_audio(source, loader, views, crop, seed)}


def decode_crops(
    cache: CacheSource, source: InputSource, stored: dict[str, Tensor], needs: Sequence[str] = ()
) -> tuple[Tensor, dict[str, Tensor]]:
    """Input features (B, T, F) and targets, decoded from the result of `load_crops` on any device.

    All are float32, but frames have the type that the cache's codec gives, which may be half precision.
    """
    name = source.kind.name
    if source.loader is None:
        decoded = cache.decode(stored, [*needs, name])
    else:
        rest = {key: values for key, values in stored.items() if key != name}
        decoded = (cache.decode(rest, needs) if needs else {}) | {name: stored[name]}
    features = decoded.pop(name).float()
    return features, {key: values if values.ndim == 3 else values.float() for key, values in decoded.items()}


def _from_audio(source: InputSource, loader: ViewLoader, views: np.ndarray, crop: Crop, seed: int | None) -> Tensor:
    """Input features (B, T, F) of crops, computed from the audio.

    Each view is loaded as it was at extraction, and augmented anew where the source asks for it.
    """
    crops, kind = [], source.kind
    for number, (view, start) in enumerate(zip(views, crop.start, strict=True)):
        try:
            wave, speed = loader(int(view)), 1.0
        except AudioError as error:
            raise SpkdError(f"training: {error}") from error
        if source.augment is not None and seed is not None:
            crop_seed = 104_729 * (seed + number) % 2**32
            speed = float(source.speeds[crop_seed % len(source.speeds)])
            wave = source.augment(change_speed(wave, speed), crop_seed)
        features = input_features(kind, torch.from_numpy(np.ascontiguousarray(wave))[None])[0]
        # Cut, and repeated beyond the end of the view, as the cache does.
        place = Crop(np.array([int(start / speed) // HOP * HOP]), crop.samples, crop.grid)
        crops.append(features[torch.from_numpy(Rows.of(kind, np.array([len(wave)]), place).numbers[0])])
    return torch.stack(crops)
