"""What the trainer is fed: batches decoded on the device, and the labelled views of the second path."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from spkd.cache import EMBEDDING, LOGITS, Contents, Target
from spkd.cache.tars import Stream
from spkd.config import TrainConfig
from spkd.errors import SpkdError, UsageError
from spkd.manifest import Manifest
from spkd.models import Network
from spkd.train.data import CROP, Classes, Listening, Steps, decode
from spkd.train.losses import LOSSES, Said
from spkd.train.mining import Miner
from spkd.train.teacher import TeacherLogits

KNOWN = ("rows", "label", "voice", "teacher_label")  # what a batch carries beside what is stored


@dataclass(frozen=True)
class Heard:
    """A batch on the device: the features (B, T_i, F) of every crop, what is known of the views, and the features of
    those that tune."""

    crops: list[Tensor]
    said: Said
    tuning: Tensor | None = None


@dataclass(frozen=True)
class Feed:
    """The batches of a run.

    needs: the targets of the losses. tuning: the second path's views, where a loss takes it.
    """

    cache: Contents
    listening: Listening
    steps: Steps
    needs: list[str]
    logits: TeacherLogits | None
    miner: Miner | None
    tuning: Tuning | None

    def batches(self, first: int, config: TrainConfig, device: torch.device) -> Iterator[tuple[int, Heard]]:
        """Every step from `first` on, and what is heard there."""
        # A batch of cached features is a memory copy: worker processes would only add to it.
        players = (self.listening.player, None if self.tuning is None else self.tuning.listening.player)
        loader = DataLoader(
            _Both(self.steps, None if self.tuning is None else self.tuning.steps),
            batch_size=None,
            sampler=range(first, config.steps),
            num_workers=0 if players == (None, None) else config.workers,
            pin_memory=torch.cuda.is_available(),
        )
        for step, (batch, tuned) in enumerate(loader, first):
            heard = self.heard(batch, config.seed + step, device)
            yield step, heard if self.tuning is None else self.tuning.add(heard, tuned, device)

    def heard(self, batch: dict[str, Tensor], seed: int, device: torch.device) -> Heard:
        """What is known of a batch: decoded on the device, so that the loader and the bus carry the codes alone."""
        label, voice, teacher_label = (batch[name].to(device) for name in ("label", "voice", "teacher_label"))
        stored = _stored(batch, device)
        crops = []
        for which in range(1, len(self.listening.crops)):
            prefix = f"{CROP}{which}:"
            more = {key.removeprefix(prefix): stored.pop(key) for key in list(stored) if key.startswith(prefix)}
            crops.append(decode(self.cache, self.listening, more)[0])
        first, targets = decode(self.cache, self.listening, stored, self.needs)
        if self.logits is not None and self.logits.prototypes is not None:
            targets[LOGITS] = self.logits.of(targets[EMBEDDING])
        said = Said(targets, label, voice, teacher_label, None if self.logits is None else self.logits.scale)
        if self.miner is not None:
            drawn = self.miner.draw(batch["rows"].numpy(), seed)
            mined = {k: v.to(device) for k, v in self.cache.stored(drawn.ravel(), [EMBEDDING]).items()}
            hard = self.cache.decode(mined, [EMBEDDING])[EMBEDDING].float()
            said = replace(said, negatives=hard.unflatten(0, drawn.shape))
        return Heard([first, *crops], said)


@dataclass(frozen=True)
class Tuning:
    """The labelled views of the path through the adapters.

    cache: where they lie. classes: theirs. steps: their batches, one beside each of the other path's.
    """

    cache: Contents
    classes: Classes
    listening: Listening
    steps: Steps

    def add(self, heard: Heard, batch: dict[str, Tensor], device: torch.device) -> Heard:
        label = batch.pop("label").to(device)
        features, _ = decode(self.cache, self.listening, _stored(batch, device))
        return replace(heard, tuning=features, said=replace(heard.said, tuned_label=label))


def tuning(
    config: TrainConfig, losses: Sequence[str], cache: Contents, labelled: Contents | None, network: Network
) -> Tuning | None:
    """The second path of a student with adapters; None where no loss takes it.

    Raises:
        UsageError: a student without adapters, or settings that belong to the second path without it.
        SpkdError: too few labelled views.
    """
    if not any(LOSSES[name].tunes(config.loss) for name in losses):
        if labelled is not None:
            raise UsageError("labelled: only one-step hears labelled views apart; add --loss one-step")
        return None
    if not network.adapters:
        raise UsageError("--loss one-step needs a student with adapters: student=ssl student.adapters=64")
    if labelled is not None and any(LOSSES[name].needs_labels for name in losses):
        raise UsageError("labelled: the other losses have no labels then; leave it out, or them")
    theirs = cache if labelled is None else labelled
    classes = Classes.of(theirs)
    if int((classes.label[theirs.rows] >= 0).sum()) < config.batch_size:
        raise SpkdError(f"{theirs.name}: --loss one-step needs at least batch_size={config.batch_size} labelled views")
    hearing = listening(config, theirs, network.hears, (config.crop,))
    # Another order than that of the other path, where both hear the same cache.
    steps = Steps(theirs, [], classes, hearing, config.batch_size, config.seed + 1, labelled=True)
    return Tuning(theirs, classes, hearing, steps)


def listening(config: TrainConfig, cache: Contents, hears: Target, crops: tuple[float, ...]) -> Listening:
    """How the student hears a cache: from features there, or from the audio of `manifest`.

    Raises:
        SpkdError: there are no features and no manifest. UsageError: a stream cannot give several crops.
    """
    if len(crops) > 1 and isinstance(cache, Stream):
        raise UsageError("these losses hear several crops of each view, which a stream lacks; pull or import the cache")
    if hears.name in cache.names:
        return Listening(hears, None, crops)
    if config.manifest is None:
        raise SpkdError(
            f"{cache.name} holds no {hears.name}, so training needs the audio: give manifest=FILE, or extract with "
            f"{hears.name}=true"
        )
    return Listening(hears, cache.player(Manifest.load(config.manifest), config.noise, config.rir), crops)


class _Both(Dataset):
    """Two batches of each step, so that one loader prepares both."""

    def __init__(self, steps: Steps, tuning: Steps | None) -> None:
        self._steps, self._tuning = steps, tuning

    def __getitem__(self, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return self._steps[step], {} if self._tuning is None else self._tuning[step]


def _stored(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """What is stored of the views, without what is known of them, on the device."""
    return {key: values.to(device, non_blocking=True) for key, values in batch.items() if key not in KNOWN}
