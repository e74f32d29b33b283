"""`spkd train`: distil a student from a teacher cache."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from spkd.cache.combined import open_caches
from spkd.config import TrainConfig
from spkd.device import resolve
from spkd.errors import SpkdError
from spkd.features import is_fbank
from spkd.files import writable_folder
from spkd.progress import log, track
from spkd.seeding import Purpose, seed_of
from spkd.students import Checkpoint, load_student, make_student, save_student
from spkd.students.network import count_macs, count_parameters
from spkd.target import LOGITS, Target
from spkd.train import resume
from spkd.train.batches import StepBatches
from spkd.train.ceiling import mining_ceiling, with_ceilings
from spkd.train.checks import check_labels, check_settings, check_targets, stored_targets
from spkd.train.labels import Labels
from spkd.train.loading import BatchLoader, TrainBatch, finetune_path, input_source
from spkd.train.log import RunLog
from spkd.train.losses import LossContext, WeightedSum, chosen_losses, for_teachers
from spkd.train.mining import Miner
from spkd.train.module import TrainingModule
from spkd.train.optim import clip_gradients, learning_rate, make_optimiser
from spkd.train.specaugment import mask
from spkd.train.teacher_logits import TeacherLogits, teacher_logits


@dataclass
class Result:
    """A finished run.

    Attributes:
        out: folder of the student.
        parameters: of the student.
        terms: mean of each loss term over the last tenth.
    """

    out: Path
    parameters: int
    terms: dict[str, float]


def train(config: TrainConfig) -> Result:
    """Train a student with the sum of the chosen losses; continue where the same command was interrupted.

    Raises:
        UsageError: unknown losses, or settings no student can have.
        SpkdError: a target or labels that the cache lacks (with the command that would extract them), or an `out`
            that holds another run.
    """
    losses = chosen_losses(config.loss)
    device = resolve(config.device)
    cache = open_caches(config.cache, config.teachers)
    labels = Labels.of(cache)
    check_labels(cache, losses)
    logits = teacher_logits(cache, labels, losses)
    check_targets(cache, losses, logits)
    check_settings(cache, losses, config)
    losses = with_ceilings(losses, cache)
    out = writable_folder(config.out)
    finetune_cache = open_caches(config.finetune_cache) if config.finetune_cache else None
    settings = resume.run_settings(config, losses, cache, finetune_cache)
    if resume.is_finished(out, settings, losses):
        log(f"{out}: this run is finished already")
        checkpoint = load_student(out)
        terms = checkpoint.training.get("last_terms", {})
        return Result(out, count_parameters(checkpoint.network), terms if isinstance(terms, dict) else {})

    torch.manual_seed(config.seed)
    network = make_student(config.student)
    finetune = finetune_path(config, losses, cache, finetune_cache, network)
    targets = {name: cache.target(name) for name in cache.names}
    if logits is not None:
        targets[LOGITS] = Target(LOGITS, len(logits.classes))
    terms = for_teachers(losses, cache.names)
    speakers = labels.names if finetune is None else finetune.labels.names
    objective = WeightedSum(terms, LossContext(network.levels, targets, len(speakers)))
    module = TrainingModule(network, objective, config.optim.swa_fraction).to(device)
    log(
        f"{config.student.name}: {count_parameters(network):,} parameters, "
        f"{count_macs(network) / 1e6:,.0f} M MACs per second of speech"
    )
    optimiser = make_optimiser(config.optim, module)

    further = max((loss.further_crops for loss in losses.values()), key=len)
    crops = (config.crop, *(seconds or config.crop for seconds in further))
    source = input_source(config, cache, network.input_kind, crops)
    needs = sorted({name + suffix for loss, suffix in terms.values() for name in stored_targets(loss, logits)})
    batches = StepBatches(cache, needs, labels, source, config.batch_size, config.seed, logits)
    with resume.locked(out):
        miner = None
        if config.mining.negatives:
            miner = Miner(cache, labels, source, config.mining, mining_ceiling(losses))
        first = resume.resume(out, module, optimiser, miner, config.steps)
        loader = BatchLoader(cache, source, batches, needs, logits, miner, finetune)
        recent = _run(config, out, device, module, optimiser, loader, first, settings)
        return _finish(out, module, speakers, logits, config, settings, recent)


def _run(
    config: TrainConfig,
    out: Path,
    device: torch.device,
    module: TrainingModule,
    optimiser: torch.optim.Optimizer,
    loader: BatchLoader,
    first: int,
    settings: dict[str, Any],
) -> Sequence[dict[str, float]]:
    """Every step from `first` on. Returns the loss terms of the last tenth."""
    recent: deque[dict[str, float]] = deque(maxlen=max(config.steps // 10, 1))
    run_log, miner = RunLog(out, first), loader.miner
    try:
        with track("training", config.steps * config.batch_size, "utterances", first * config.batch_size) as bar:
            for step, batch in loader.from_step(first, config, device):
                terms = _step(step, batch, config, module, optimiser)
                recent.append(terms)
                run_log(step, terms | {"lr": optimiser.param_groups[0]["lr"]})
                bar.advance(config.batch_size, " ".join(f"{k} {v:.3f}" for k, v in terms.items()))
                if miner is not None:
                    miner.after_step(step, module.network)
                if (step + 1) % config.save_every == 0 and step + 1 < config.steps:
                    resume.save(out, module, optimiser, miner, step + 1, settings)
    finally:
        run_log.close()
        if miner is not None:
            miner.close()
    return recent


def _step(
    step: int, batch: TrainBatch, config: TrainConfig, module: TrainingModule, optimiser: torch.optim.Optimizer
) -> dict[str, float]:
    """One optimiser step. Returns the loss terms."""
    seed = seed_of(Purpose.STEP, config.seed, step)
    torch.manual_seed(seed)  # of dropout and the adapters' noise: a resumed run has the same
    module.train()
    generator = torch.Generator().manual_seed(seed)
    frames, bands = config.mask.frames, config.mask.bands if is_fbank(module.network.input_kind) else 0
    masked = [mask(crop, frames, bands, generator) for crop in batch.crops]
    finetune = None if batch.finetune_batch is None else mask(batch.finetune_batch, frames, bands, generator)
    total, terms = module(masked, replace(batch.inputs, progress=step / config.steps), finetune)
    if not torch.isfinite(total):
        _check_inputs(batch)
        raise SpkdError(f"training diverged at step {step} (the loss is {total.item()}); lower optim.lr")
    optimiser.zero_grad(set_to_none=True)
    total.backward()
    clip_gradients(config.optim, module)
    for group in optimiser.param_groups:
        group["lr"] = learning_rate(config.optim, step, config.steps)
    optimiser.step()
    module.after_step((step + 1) / config.steps)
    return {name: term.item() for name, term in terms.items()}


def _check_inputs(batch: TrainBatch) -> None:
    """Raises SpkdError where a batch holds values that are not finite: then no learning rate would help."""
    named = {"input features": batch.crops[0], **{f"target {n}": v for n, v in batch.inputs.targets.items()}}
    for name, values in named.items():
        if not bool(values.isfinite().all()):
            raise SpkdError(f"the cache holds {name} that are not finite; look for the shard with spkd cache verify")


def _finish(
    out: Path,
    module: TrainingModule,
    speakers: list[str],
    logits: TeacherLogits | None,
    config: TrainConfig,
    settings: dict[str, Any],
    recent: Sequence[dict[str, float]],
) -> Result:
    """Write the student, drop the training state."""
    terms = {name: sum(r[name] for r in recent) / len(recent) for name in recent[0]}
    training = {"settings": settings, "steps": config.steps, "last_terms": terms}
    checkpoint = Checkpoint(module.trained_network(), training=training)
    for name, loss in module.objective.by_name().items():
        if report := loss.report():
            training[name] = report
        classifier = loss.classifier()
        if classifier is not None and checkpoint.head is None:
            checkpoint.head, checkpoint.scale = classifier.weight, classifier.scale
            checkpoint.classes = logits.classes if classifier.over_teacher and logits is not None else speakers
    save_student(out, checkpoint)
    resume.drop(out)
    return Result(out, count_parameters(checkpoint.network), terms)
