"""`spkd train`: distil a student from a teacher cache."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from spkd.cache import CacheSource
from spkd.cache.combined import open_caches
from spkd.config import TrainConfig
from spkd.device import resolve
from spkd.errors import Interrupted, SpkdError, UsageError
from spkd.files import writable_folder
from spkd.progress import log, track
from spkd.students import Checkpoint, Network, load_student, make_student, save_student
from spkd.students.network import count_macs, count_parameters
from spkd.target import LOGITS, Target
from spkd.train import record, resume
from spkd.train.batches import InputSource, StepBatches
from spkd.train.ceiling import mining_ceiling, with_ceilings
from spkd.train.checks import check_labels, check_settings, check_targets, stored_targets
from spkd.train.labels import Labels
from spkd.train.loading import BatchLoader, TrainBatch, finetune_path, input_source
from spkd.train.log import RunLog
from spkd.train.losses import LossContext, WeightedSum, chosen_losses, for_teachers
from spkd.train.meter import Meter, in_words
from spkd.train.mining import Miner
from spkd.train.mining import check as check_searchable
from spkd.train.module import TrainingModule
from spkd.train.samplers import Order, make_order
from spkd.train.step import Optimisation
from spkd.train.stopping import Progress, StopRequest, stop_request
from spkd.train.teacher_logits import TeacherLogits, teacher_logits

BEST = "best"  # folder, within a run's, of the student with the lowest validation error


class Validate(Protocol):
    """Scores a student: -> EER (%).

    Attributes:
        speakers: of its trials.
    """

    speakers: frozenset[str]

    def __call__(self, network: Network) -> float: ...


@dataclass
class Result:
    """A finished run.

    Attributes:
        out: folder of the student.
        parameters: of the student.
        terms: mean of each loss term over the last tenth.
        best: lowest validation EER (%) and its step, where there was validation.
    """

    out: Path
    parameters: int
    terms: dict[str, float]
    best: tuple[float, int] | None = None

    def to_json(self) -> dict[str, Any]:
        """For sweepers."""
        best = {} if self.best is None else {"valid_eer_percent": self.best[0], "best_step": self.best[1]}
        return {"out": str(self.out), "parameters": self.parameters, "terms": self.terms, **best}


@dataclass
class Run:
    """What the steps of a run share.

    Attributes:
        config: its settings. out: its folder. device: where it runs.
        module: student and losses. optimisation: of them.
        loader: of batches. miner: of hard negatives, if any.
        settings: that make two runs the same.
        validate: scores a student, where the settings ask for it.
        progress: of validation.
        recent: loss terms of the last tenth of the steps, on the device.
    """

    config: TrainConfig
    out: Path
    device: torch.device
    module: TrainingModule
    optimisation: Optimisation
    loader: BatchLoader
    settings: dict[str, Any]
    validate: Validate | None
    progress: Progress = field(default_factory=Progress)
    recent: deque[dict[str, Tensor]] = field(default_factory=deque)

    def save(self, step: int) -> None:
        """Keep everything that the run needs to go on from a step. Raises SpkdError where it has diverged."""
        check_finite(self)
        extra = {f"step.{name}": value for name, value in self.optimisation.state().items()}
        extra |= {f"valid.{name}": value for name, value in self.progress.state().items()}
        resume.save(self.out, self.module, self.optimisation.optimiser, self.loader.miner, step, self.settings, extra)


def train(config: TrainConfig, validate: Validate | None = None) -> Result:
    """Train a student with the sum of the chosen losses; continue where the same command was interrupted.

    Args:
        validate: scores the student every `valid.every` steps.
    Raises:
        UsageError: unknown losses, or settings no student can have.
        SpkdError: a target or labels that the cache lacks (with the command that would extract them), or an `out`
            that holds another run.
        Interrupted: a signal asked for an end; the state was saved.
    """
    losses = chosen_losses(config.loss)
    device = resolve(config.device)
    cache = open_caches(config.cache, config.teachers)
    labels = Labels.of(cache)
    check_labels(cache, losses)
    logits = teacher_logits(cache, labels, losses)
    check_targets(cache, losses, logits)
    check_settings(cache, losses, config)
    _check_validation(config, validate, cache)
    losses = with_ceilings(losses, cache)
    if config.epochs is not None:
        per_epoch = max(len(cache.usable_views) // (config.batch_size * config.accumulate), 1)
        config = replace(config, steps=max(round(config.epochs * per_epoch), 1))
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
    optimisation = Optimisation(config, module, device)

    further = max((loss.further_crops for loss in losses.values()), key=len)
    crops = (config.crop, *(seconds or config.crop for seconds in further))
    source = input_source(config, cache, network.input_kind, crops)
    needs = sorted({name + suffix for loss, suffix in terms.values() for name in stored_targets(loss, logits)})
    order = _order(config, cache, labels, source, mining_ceiling(losses))
    later = (config.steps * config.accumulate, config.large_margin.crop) if config.large_margin.steps else None
    bucketed = config.sampler.name == "lengths"
    batches = StepBatches(
        cache,
        needs,
        labels,
        source,
        config.batch_size,
        config.seed,
        logits,
        later=later,
        order=order,
        bucketed=bucketed,
    )
    with resume.locked(out):
        miner = None
        if config.mining.negatives:
            miner = Miner(cache, labels, source, config.mining, mining_ceiling(losses))
        first, extra = resume.resume(out, module, optimisation.optimiser, miner, config.total_steps)
        optimisation.load_state(_part(extra, "step."))
        record.start(out, config, cache, device)
        loader = BatchLoader(cache, source, batches, needs, logits, miner, finetune)
        run = Run(config, out, device, module, optimisation, loader, settings, validate)
        run.progress = Progress.of_state(_part(extra, "valid."))
        run.recent = deque(maxlen=max(config.total_steps // 10, 1))
        last = _run(run, first)
        return _finish(run, last, speakers, logits, losses)


def _order(
    config: TrainConfig, cache: CacheSource, labels: Labels, source: InputSource, ceiling: float
) -> Order | None:
    """The order of the views, where it is not the cache's own."""
    table = None
    if config.sampler.name == "hard":
        check_searchable(cache)
        table = Miner(cache, labels, source, config.mining, ceiling).table
    return make_order(config.sampler, cache, labels, config.batch_size, config.seed, table)


def _check_validation(config: TrainConfig, validate: Validate | None, cache: CacheSource) -> None:
    """Raises UsageError where nothing can validate, or would on speakers that are trained on."""
    if config.valid.trials is not None and validate is None:
        raise UsageError("valid.trials: give train() something that scores a student")
    if validate is not None and (shared := sorted(validate.speakers & set(cache.plan.speakers))):
        raise UsageError(
            f"valid.trials: {len(shared)} of its speakers are trained on ({', '.join(shared[:3])}); validate on others"
        )


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _run(run: Run, first: int) -> int:
    """Every step from `first` on. Returns how many were done in all: fewer where validation ended the run."""
    config, meter, done = run.config, Meter(), run.config.total_steps
    run_log, miner = RunLog(run.out, first, config.loggers), run.loader.miner
    per_step = config.batch_size * config.accumulate
    try:
        with (
            stop_request() as stop,
            track("training", config.total_steps * per_step, "utterances", first * per_step) as bar,
        ):
            for step, batches in _steps(run, first, meter):
                terms = run.optimisation.step(step, batches)
                run.recent.append(terms)
                meter.count(per_step)
                note = None
                if run_log.is_due(step):  # the only steps that wait for the device
                    check_finite(run)
                    values = {name: term.item() for name, term in terms.items()}
                    run_log.add(step, values | {"lr": run.optimisation.optimiser.param_groups[0]["lr"]})
                    note = " ".join(f"{name} {value:.3f}" for name, value in values.items())
                bar.advance(per_step, note)
                if miner is not None:
                    miner.after_step(step, run.module.network)
                if _after_step(run, step + 1, run_log, stop):
                    done = step + 1
                    break
    finally:
        run_log.close()
        if miner is not None:
            miner.close()
    check_finite(run)
    summary = meter.summary(run.device)
    record.finish(run.out, summary)
    for line in in_words(summary, run.loader.source.loader is not None, config.workers):
        log(line)
    return done


def _steps(run: Run, first: int, meter: Meter) -> Iterator[tuple[int, list[TrainBatch]]]:
    """The batches of each step, `accumulate` of them."""
    count = run.config.accumulate
    loaded = meter.loading(
        run.loader.batches_from(first * count, run.config.total_steps * count, run.config, run.device)
    )
    for step in range(first, run.config.total_steps):
        yield step, list(islice(loaded, count))


def _after_step(run: Run, done: int, run_log: RunLog, stop: StopRequest) -> bool:
    """Validate and save where that is due. Returns whether the run is over.

    Raises:
        Interrupted: an end was asked for; the state is saved.
    """
    config = run.config
    is_last = done >= config.total_steps
    if run.validate is not None and (done % config.valid.every == 0 or is_last):
        network = run.module.trained_network()
        rate = run.validate(network)
        run_log.add(done - 1, {"valid_eer_percent": rate})
        log(f"validation after {done} steps: EER {rate:.3f} %")
        if run.progress.add(done, rate):
            training = {"settings": run.settings, "steps": done, "valid_eer_percent": rate}
            save_student(run.out / BEST, Checkpoint(network, training=training))
        if run.progress.is_over(config.valid):
            log(f"no lower EER in {config.valid.patience} validations: training ends after {done} steps")
            return True
    if is_last:
        return False
    if stop.asked or done % config.save_every == 0:
        run.save(done)
        record.write_page(run.out)
    if stop.asked:
        raise Interrupted(f"interrupted; {run.out} was saved after step {done}, and the same command continues")
    return False


def check_finite(run: Run) -> None:
    """Raises SpkdError where the loss of a step was not finite: because of the data, or because training diverged."""
    step = int(run.optimisation.first_bad)
    if step < 0:
        return
    count = run.config.accumulate
    for batch in run.loader.batches_from(step * count, (step + 1) * count, run.config, run.device):
        _check_inputs(batch)
    raise SpkdError(f"training diverged at step {step} (the loss is not finite); lower optim.lr")


def _check_inputs(batch: TrainBatch) -> None:
    """Raises SpkdError where a batch holds values that are not finite: then no learning rate would help."""
    named = {"input features": batch.crops[0], **{f"target {n}": v for n, v in batch.inputs.targets.items()}}
    for name, values in named.items():
        if not bool(values.isfinite().all()):
            raise SpkdError(f"the cache holds {name} that are not finite; look for the shard with spkd cache verify")


def _finish(run: Run, steps: int, speakers: list[str], logits: TeacherLogits | None, losses: dict[str, Any]) -> Result:
    """Write the student; drop the training state, unless more steps may follow."""
    terms = _means(run.recent)
    training = {"settings": run.settings, "steps": steps, "last_terms": terms}
    if run.progress.step >= 0:
        training["best"] = {"valid_eer_percent": run.progress.best, "step": run.progress.step}
    checkpoint = Checkpoint(run.module.trained_network(), training=training)
    for name, loss in run.module.objective.by_name().items():
        if report := loss.report():
            training[name] = report
        classifier = loss.classifier()
        if classifier is not None and checkpoint.head is None:
            checkpoint.head, checkpoint.scale = classifier.weight, classifier.scale
            checkpoint.classes = logits.classes if classifier.over_teacher and logits is not None else speakers
    if resume.can_be_extended(run.config, losses) and steps == run.config.total_steps:
        run.save(steps)
    else:
        resume.drop(run.out)
    save_student(run.out, checkpoint)
    best = (run.progress.best, run.progress.step) if run.progress.step >= 0 else None
    return Result(run.out, count_parameters(checkpoint.network), terms, best)


def _means(recent: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """Mean of each term; {} where nothing was done (a run that continued after its last step)."""
    found = {name: [terms[name] for terms in recent] for name in (recent[0] if recent else {})}
    means = {name: math.fsum(torch.stack(values).tolist()) / len(values) for name, values in found.items()}
    return means
