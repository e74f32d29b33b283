"""Batches of a run on the training device, and those of the second, fine-tuning path."""

from __future__ import annotations

import copyreg
import io
import multiprocessing
import pickle
import re
import signal
import sys
import traceback
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from spkd.cache import CacheSource
from spkd.corpus.augment import Augmentation
from spkd.corpus.fetched import copy_to
from spkd.corpus.manifest import Manifest
from spkd.corpus.processes import lost
from spkd.device import sent
from spkd.errors import SpkdError, UsageError, first_line
from spkd.outputs.features import FBANKS, is_fbank
from spkd.outputs.target import EMBEDDING, LOGITS, Target
from spkd.progress import log
from spkd.students import Network
from spkd.train.batches import BatchContent, CropPlan, HostBatch, InputSource, StepBatches, ViewOrder, decode_crops
from spkd.train.distributed import ALONE, ProcessGroup
from spkd.train.labels import Labels
from spkd.train.losses.base import ChosenLoss, LossInputs
from spkd.train.mining import Miner
from spkd.train.samplers import shuffled_views
from spkd.train.settings import TrainConfig
from spkd.train.stopping import SIGNALS
from spkd.train.teacher_logits import TeacherLogits

# Beginning of torch's errors about a loader process that has ended: the signal in the system's words, or the exit code.
LOST = re.compile(
    r"DataLoader worker \(pid.*?\) (?:is killed by signal: (.+?)\.|exited unexpectedly(?: with exit code (\d+))?)"
)


@dataclass(frozen=True)
class TrainBatch:
    """Batch on the device, as `spkd.train.module.TrainingModule` takes it.

    For the batch that HostBatch shows:

        crops           [(B, 200, 80) float32, (B, 200, 80) float32]: input features
        inputs          LossInputs(targets={"embedding": (B, 192) float32, "frames": (B, 100, 512) float16},
                                   label=(B,), instance=(B,), teacher_label=(B,), other_instance=[(B,)],
                                   negatives=(B, N, 192) float32, is_negative=(B, N) bool, where they are mined)
        finetune_batch  (N, 200, 80) float32: the views that go through the adapters; None where no loss fine-tunes
    """

    crops: list[Tensor]
    inputs: LossInputs
    finetune_batch: Tensor | None = None


@dataclass(frozen=True)
class BatchLoader:
    """Batches of a run.

    Attributes:
        content: what is read of each view: cache, labels, input features and targets.
        batches: batches as stored.
        logits: the teacher's logits, where a loss learns from them.
        miner: miner of hard negatives and positives, where they are asked for.
        finetune: the second path, where a loss has one.
        mines_negatives: whether a loss takes hard negatives.
        class_means: (classes, D) mean teacher embedding of each class, which replaces those of labelled views, on the
            device of the run; None: each view has its own.
    """

    content: BatchContent
    batches: StepBatches
    logits: TeacherLogits | None = None
    miner: Miner | None = None
    finetune: FinetunePath | None = None
    mines_negatives: bool = False
    class_means: Tensor | None = None

    @property
    def decodes_audio(self) -> bool:
        """Whether audio is decoded during training."""
        sources = [self.content.source, *([] if self.finetune is None else [self.finetune.content.source])]
        return any(source.loader is not None for source in sources)

    def batches_from(self, first: int, last: int, config: TrainConfig, device: torch.device) -> Iterator[TrainBatch]:
        """Batches `first` to `last` - 1 on the device."""
        both = _Both(self.batches, None if self.finetune is None else self.finetune.batches)
        # A batch of cached features is a memory copy: worker processes would only add to it.
        workers = config.workers if self.decodes_audio else 0
        for number, (batch, labelled) in enumerate(_loaded(both, range(first, last), workers, device), first):
            on_device = self.on_device(batch, config.seed, number, device)
            if self.finetune is None or labelled is None:
                yield on_device
            else:
                yield self.finetune.add_to(on_device, labelled, device)

    def on_device(self, batch: HostBatch, seed: int, step: int, device: torch.device) -> TrainBatch:
        """Batch decoded on the device, so that the loader and the bus carry only the codes."""
        cache, source = self.content.cache, self.content.source
        # Input features of every crop, targets of the first.
        first, targets = decode_crops(cache, source, _moved(batch.crops[0], device), self.content.targets)
        others = [decode_crops(cache, source, _moved(crop, device))[0] for crop in batch.crops[1:]]
        if self.logits is not None and self.logits.prototypes is not None:
            targets[LOGITS] = self.logits.of(targets[EMBEDDING])
        label = sent(batch.label, device)
        if self.class_means is not None:
            means = self.class_means[label.clamp_min(0)]
            targets[EMBEDDING] = torch.where((label >= 0)[:, None], means, targets[EMBEDDING])
        inputs = LossInputs(
            targets,
            label,
            sent(batch.instance, device),
            sent(batch.teacher_label, device),
            None if self.logits is None else self.logits.scale,
            other_instance=[sent(instance, device) for instance in batch.other_instance],
            alignments={name: alignment.to(device) for name, alignment in batch.alignments.items()},
        )
        # Hard negatives, drawn for the whole batch.
        if self.miner is not None and self.mines_negatives:
            drawn = self.miner.negatives(self.batches.order.views(step), seed, step).part(self.batches.part)
            mined = _moved(cache.stored(drawn.views.ravel(), [EMBEDDING]), device)
            hard = cache.decode(mined, [EMBEDDING])[EMBEDDING].float().unflatten(0, drawn.views.shape)
            inputs = replace(inputs, negatives=hard, is_negative=sent(torch.from_numpy(drawn.found), device))
        return TrainBatch([first, *others], inputs)


def _loaded(both: _Both, steps: range, workers: int, device: torch.device) -> Iterator[_Batches]:
    """Batches of steps, by worker processes where there are some. Raises SpkdError where one cannot be loaded."""
    pinned, others = device.type == "cuda", set(multiprocessing.active_children())
    given: dict[str, Any] = {"batch_size": None, "sampler": steps, "pin_memory": pinned}
    try:
        found = iter(DataLoader(both, num_workers=workers, worker_init_fn=_leave_signals, **given))
    except OSError as error:
        _end(set(multiprocessing.active_children()) - others)
        _release(error)
        log(
            f"note: no processes could be started to load audio ({error.strerror or first_line(error)}; they need "
            "descriptors, ulimit -n, and room in /dev/shm); the run itself loads it"
        )
        found = iter(DataLoader(both, **given))
    processes = set(multiprocessing.active_children()) - others
    try:
        for each in found:
            loaded = each.unpacked() if isinstance(each, _Packed) else each
            if isinstance(loaded, SpkdError):
                raise loaded
            yield loaded
    finally:
        del found  # which asks its processes to end, and gives them some seconds
        _end(processes)


def _end(processes: Collection[multiprocessing.process.BaseProcess]) -> None:
    """End loader processes at once: one that is stopped, or never learns that it is to end, would be waited for."""
    for process in processes:
        process.kill()


def _release(error: OSError) -> None:
    """Release a loader of torch that could not start its processes, without the errors of its finaliser."""
    before, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        traceback.clear_frames(error.__traceback__)
    finally:
        sys.unraisablehook = before


def loader_killed(error: RuntimeError, config: TrainConfig) -> str | None:
    """Advice where an error of torch, raised at any moment, means that a loader process was killed; None for others."""
    if not (of_loader := LOST.match(str(error))):
        return None
    of_loader = LOST.match(str(error.__cause__)) or of_loader  # of which the error itself may leave out the signal
    by_signal, code = of_loader.groups()
    codes = [-number for number in signal.valid_signals() if signal.strsignal(number) == by_signal]
    codes += [] if code is None else [int(code)]
    return f"{lost(codes, config.workers, config.batch_size)}, which continues from what was saved last"


@dataclass(frozen=True)
class FinetunePath:
    """Labelled views of the path through the adapters.

    Attributes:
        batches: one batch for each batch of the other path.
    """

    content: BatchContent
    batches: StepBatches

    def add_to(self, batch: TrainBatch, labelled: HostBatch, device: torch.device) -> TrainBatch:
        features, _ = decode_crops(self.content.cache, self.content.source, _moved(labelled.crops[0], device))
        inputs = replace(batch.inputs, finetune_label=sent(labelled.label, device))
        return replace(batch, finetune_batch=features, inputs=inputs)


def finetune_path(
    config: TrainConfig,
    losses: dict[str, ChosenLoss],
    cache: CacheSource,
    finetune_cache: CacheSource | None,
    network: Network,
    ranks: ProcessGroup = ALONE,
) -> FinetunePath | None:
    """Second path of a student with adapters; None where no loss fine-tunes.

    Raises:
        UsageError: a student without adapters, or another loss that needs labels.
        SpkdError: too few labelled views.
    """
    loss = next((name for name, chosen in losses.items() if chosen.settings.finetunes()), None)
    if loss is None:
        return None
    if not network.adapters:
        raise UsageError(f"--loss {loss} needs a student with adapters: student=ssl student.ssl.adapters=64")
    if finetune_cache is not None and (needy := [n for n, other in losses.items() if other.kind.needs_labels]):
        raise UsageError(f"finetune_cache= cannot be combined with losses that need labels ({', '.join(needy)})")
    labelled = cache if finetune_cache is None else finetune_cache
    labels = Labels.of(labelled)
    usable = labelled.usable_views
    chosen = None if labelled.labelled else labels.label >= 0
    if (len(usable) if chosen is None else int(chosen[usable].sum())) < config.batch_size:
        raise SpkdError(f"{labelled.name}: --loss {loss} needs at least batch_size={config.batch_size} labelled views")
    content = BatchContent(labelled, labels, input_source(config, labelled, network.input_kind))
    # The order differs from that of the other path even where both use the same cache.
    seed = config.seed + 1
    order = ViewOrder(shuffled_views(labelled, seed, chosen), config.batch_size)
    # The views of both paths go through the network together, and so have crops of one length.
    crops = CropPlan((config.crop,), second_crop(config), tuple(config.student.nested_crops), config.seed)
    return FinetunePath(content, StepBatches(content, order, crops, seed, ranks.part(config.batch_size)))


def second_crop(config: TrainConfig) -> tuple[int, float] | None:
    """Number of the first batch of large-margin fine-tuning and the length of its crops (s); None without it."""
    later = config.large_margin
    return (config.steps * config.accumulate, later.crop) if later.steps else None


def input_source(config: TrainConfig, cache: CacheSource, kind: Target) -> InputSource:
    """Source of the student's input features: the cache, or the audio of `manifest`.

    Raises:
        UsageError: fresh augmentation without a manifest.
        SpkdError: the cache holds no features and there is no manifest, or a file of `augment.rir` is no response.
    """
    fresh = config.augment
    if kind.name in cache.names and not fresh.is_used:
        return InputSource(kind)
    if config.manifest is None and fresh.is_used:
        raise UsageError("augment: fresh augmentation needs the audio: give manifest=FILE")
    if config.manifest is None:
        raise UsageError(
            f"{cache.name} holds no {kind.name}, so training needs the audio: give manifest=FILE, or extract with "
            f"{_extracted_by(kind)}{_other_fbank(cache, kind)}"
        )
    manifest = Manifest.load(config.manifest)
    copy_to(config, manifest)
    loader = cache.view_loader(manifest, config.noise, config.rir)
    if not fresh.is_used:
        return InputSource(kind, loader)
    augmentation = Augmentation.of(fresh)
    augmentation.check()
    return InputSource(kind, loader, augmentation, tuple(fresh.speeds))


def _extracted_by(kind: Target) -> str:
    """Settings of `spkd extract` that store features of a kind."""
    name, _, toolkit = kind.name.partition(".")
    return f"{name}=true" + (f" features={toolkit}" if toolkit else "")


def _other_fbank(cache: CacheSource, kind: Target) -> str:
    """Hint at another toolkit's fbank in the cache, with the setting that uses it; "" where there is none."""
    held = [toolkit for toolkit, other in FBANKS.items() if other.name in cache.names]
    if not held or not is_fbank(kind):
        return ""
    return f"; it holds the fbank of {held[0]}, for student.features={held[0]}"


_Batches = tuple[HostBatch, HostBatch | None]  # of both paths at a step
_Loaded = _Batches | SpkdError  # the error, as errors raised in a loader process come with a traceback


class _Both(Dataset):
    """Batches of both paths at each step, so that one loader prepares both."""

    def __init__(self, batches: StepBatches, finetune: StepBatches | None) -> None:
        self._batches, self._finetune = batches, finetune

    def __getitem__(self, step: int) -> _Loaded | _Packed:
        """Both batches, packed where this is a loader process."""
        return self._loaded(step) if get_worker_info() is None else _Packed.of(self._loaded(step))

    def _loaded(self, step: int) -> _Loaded:
        try:
            return self._batches[step], None if self._finetune is None else self._finetune[step]
        except SpkdError as error:
            return error


@dataclass(frozen=True)
class _Packed:
    """Batches on their way from a loader process, as bytes that go through its pipe.

    A tensor would be passed in a file of /dev/shm, which has 64 MB in many containers, by a descriptor, of which there
    may be few. Where there is no more of them, torch raises in a thread that nobody waits for.
    """

    content: bytes

    @classmethod
    def of(cls, loaded: _Loaded) -> _Packed:
        packed = io.BytesIO()
        pickler = pickle.Pickler(packed, pickle.HIGHEST_PROTOCOL)
        pickler.dispatch_table = copyreg.dispatch_table | {Tensor: lambda x: (torch.from_numpy, (x.numpy(),))}
        pickler.dump(loaded)
        return cls(packed.getvalue())

    def unpacked(self) -> _Loaded:
        loaded: _Loaded = pickle.loads(self.content)
        return loaded

    def pin_memory(self) -> _Loaded:
        """The batches in pinned memory; torch's loader calls this where the run is on CUDA."""
        if isinstance(loaded := self.unpacked(), SpkdError):
            return loaded
        batch, labelled = loaded
        return batch.pin_memory(), None if labelled is None else labelled.pin_memory()


def _leave_signals(worker: int) -> None:
    """Ignore the signals that ask the run to end, which a terminal or a scheduler sends to all of its processes.

    The run ends after a step, and needs its batch. A forked process has the run's own handlers, others would end.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _moved(stored: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: sent(values, device) for name, values in stored.items()}
