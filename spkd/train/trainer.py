"""`spkd train`: distil a student from a teacher cache."""

from __future__ import annotations

import json
import math
import shutil
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spkd import device as devices
from spkd import models
from spkd.cache import FBANK, FEATURES, LOGITS, Contents, Target
from spkd.cache.several import open_caches
from spkd.config import LossConfig, OptimConfig, TrainConfig
from spkd.errors import SpkdError, UsageError
from spkd.files import writable_folder
from spkd.models import Checkpoint
from spkd.models.network import macs, parameters
from spkd.progress import say, track
from spkd.train import feed, mining, state
from spkd.train.data import Classes, Steps, mask
from spkd.train.feed import Heard
from spkd.train.losses import AAM, LOSSES, Classifier, OneStep, Sum, check_names, check_values, of_teachers
from spkd.train.mining import Miner
from spkd.train.teacher import TeacherLogits, ceiling, contrasts, teacher_logits
from spkd.train.trainee import Trainee

LOG_EVERY = 20  # steps between lines of log.jsonl


@dataclass
class Result:
    """A finished run: where the student is, its size, and the mean of each loss term over the last tenth."""

    out: Path
    parameters: int
    terms: dict[str, float]


def run(config: TrainConfig, losses: Sequence[str]) -> Result:
    """Train a student with the sum of the named losses; continue where the same command was interrupted.

    Raises:
        UsageError: unknown losses, or settings no student can have.
        SpkdError: a target or labels that the cache lacks (with the command that would extract them), or an `out`
            that holds another run.
    """
    check_names(losses, config.loss)
    check_values(config.loss)
    device = devices.resolve(config.device)
    cache = open_caches(config.cache, config.teachers)
    classes = Classes.of(cache)
    check_labels(cache, losses)
    logits = teacher_logits(cache, classes, config.loss, losses)
    check_needs(cache, losses, config, logits)
    alike = ceiling(cache, losses, config.loss)
    config = replace(config, loss=replace(config.loss, ceiling=alike))
    out = writable_folder(config.out)
    labelled = open_caches(config.labelled) if config.labelled else None
    settings = state.settings(config, losses, cache, labelled)
    if state.finished(out, settings):
        say(f"{out}: this run is finished already")
        checkpoint = models.load(out)
        return Result(out, parameters(checkpoint.network), checkpoint.training["last_terms"])

    torch.manual_seed(config.seed)
    network = models.student(config.student)
    tuning = feed.tuning(config, losses, cache, labelled, network)
    targets = {name: cache.target(name) for name in cache.names}
    if logits is not None:
        targets[LOGITS] = Target(LOGITS, len(logits.classes))
    chosen = of_teachers(losses, cache.names)
    spoken = classes if tuning is None else tuning.classes
    objective = Sum(chosen, config.loss, network.levels, targets, len(spoken.names))
    trainee = Trainee(network, objective, config.optim.average).to(device)
    say(f"{config.student.name}: {parameters(network):,} parameters, {macs(network) / 1e6:,.0f} M MACs a second")
    optimiser = make_optimiser(config.optim, trainee)

    further = max((LOSSES[name].crops(config.loss) for name in losses), key=len)
    listening = feed.listening(
        config, cache, network.hears, (config.crop, *(seconds or config.crop for seconds in further))
    )
    needs = sorted({name + suffix for loss, suffix in chosen.values() for name in needed(loss, config.loss, logits)})
    miner = Miner(cache, classes, listening, config.mining, alike) if config.mining.negatives else None
    first = state.resume(out, trainee, optimiser, miner) if (out / "state.json").is_file() else 0
    steps = Steps(cache, needs, classes, listening, config.batch_size, config.seed, logits)
    fed = feed.Feed(cache, listening, steps, needs, logits, miner, tuning)
    recent: deque[dict[str, float]] = deque(maxlen=max(config.steps // 10, 1))
    log = _Log(out, first)
    try:
        with track("training", config.steps * config.batch_size, "utterances", first * config.batch_size) as bar:
            for step, heard in fed.batches(first, config, device):
                terms = _step(step, heard, config, trainee, optimiser)
                recent.append(terms)
                log(step, terms | {"lr": optimiser.param_groups[0]["lr"]})
                bar.advance(config.batch_size, " ".join(f"{k} {v:.3f}" for k, v in terms.items()))
                if miner is not None:
                    miner.after(step, network)
                if (step + 1) % config.save_every == 0 and step + 1 < config.steps:
                    state.save(out, trainee, optimiser, miner, step + 1, settings)
    finally:
        log.close()
        if miner is not None:
            miner.close()
    head = _head(objective, spoken, logits)
    return _finish(out, trainee, head, config, settings, recent)


def needed(loss: str, config: LossConfig, logits: TeacherLogits | None) -> list[str]:
    """The targets that a loss has to be given from the cache."""
    names = LOSSES[loss].needed(config)
    return [logits.source if name == LOGITS and logits is not None else name for name in names]


def check_labels(cache: Contents, losses: Sequence[str]) -> None:
    """Raises SpkdError where a loss needs a speaker of every view and the cache does not know them all."""
    for loss in losses:
        if LOSSES[loss].needs_labels and not cache.labelled:
            raise SpkdError(
                f"--loss {loss} needs speaker labels, and the manifest behind {cache.name} has utterances without; "
                f"choose a loss without labels ({', '.join(n for n in LOSSES if not LOSSES[n].needs_labels)})"
            )


def check_needs(cache: Contents, losses: Sequence[str], config: TrainConfig, logits: TeacherLogits | None) -> None:
    """Refuse before the first batch what the cache cannot feed.

    Raises:
        SpkdError: with the `spkd extract` command that would make what is missing.
    """
    card = cache.members[0].card
    stored = list(cache.names)
    for loss, suffix in of_teachers(losses, stored).values():
        missing = [name for name in needed(loss, config.loss, logits) if name + suffix not in stored]
        if missing and not suffix and any("@" in name for name in stored):
            raise UsageError(f"--loss {loss} needs one teacher; concatenate or average them (teachers=...)")
        if missing:
            family = "NAME" if card["teacher"]["family"] == "none" else card["teacher"]["family"]
            wanted = ",".join([*(t for t in stored if t not in FEATURES), *missing])
            raise SpkdError(
                f"--loss {loss} needs the target {', '.join(missing)}, which {cache.name} lacks; extract it: "
                f"spkd extract teacher={family} teacher.targets=[{wanted}] "
                f"view.plan={card['views']['plan']} cache=NEW_FOLDER (what it can say: spkd extract teacher={family} "
                "--targets)"
            )
    if config.mining.negatives:
        if not contrasts(losses, config.loss):
            raise UsageError("mining.negatives: only contrastive takes hard negatives; add --loss contrastive")
        mining.check(cache, config.mining)
    if not 0 <= config.optim.average <= 1:
        raise UsageError(f"optim.average={config.optim.average}: a fraction of the run")
    if config.optim.average and "memo" in losses:
        raise UsageError("optim.average: memo keeps a moving average of its own")
    if len(cache.rows) < 2:
        raise SpkdError(f"{cache.name}: {len(cache.rows)} usable views; training needs at least two")
    if config.batch_size < 2:
        raise UsageError("batch_size: at least 2 (batch-norm and the contrastive losses compare views)")


def _step(
    step: int, heard: Heard, config: TrainConfig, trainee: Trainee, optimiser: torch.optim.Optimizer
) -> dict[str, float]:
    """One optimiser step. Returns the loss terms."""
    torch.manual_seed(config.seed * 1_000_003 + step)  # of dropout and the adapters' noise: a resumed run has the same
    trainee.train()
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    frames, bands = config.mask.frames, config.mask.bands if trainee.network.hears == FBANK else 0
    hidden = [mask(crop, frames, bands, generator) for crop in heard.crops]
    tuning = None if heard.tuning is None else mask(heard.tuning, frames, bands, generator)
    total, terms = trainee(hidden, replace(heard.said, done=step / config.steps), tuning)
    if not torch.isfinite(total):
        raise SpkdError(f"training diverged at step {step} (the loss is {total.item()}); lower optim.lr")
    optimiser.zero_grad(set_to_none=True)
    total.backward()
    if config.optim.clip > 0:
        for weights in trainee.clipped_apart():
            nn.utils.clip_grad_norm_(weights, config.optim.clip)
    for group in optimiser.param_groups:
        group["lr"] = learning_rate(config.optim, step, config.steps)
    optimiser.step()
    trainee.after_step((step + 1) / config.steps)
    return {name: term.item() for name, term in terms.items()}


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Linear warm-up from zero; then half a cosine from `lr` down to `final_lr` at the last step, or an exponential
    that begins with the run (WeSpeaker's) and is multiplied by the warm-up."""
    warm = min((step + 1) / config.warmup, 1.0) if config.warmup else 1.0
    if config.schedule == "exponential":
        return warm * config.lr * (config.final_lr / config.lr) ** (step / max(steps - 1, 1))
    if step < config.warmup:
        return config.lr * warm
    done = (step - config.warmup) / max(steps - 1 - config.warmup, 1)
    return config.final_lr + 0.5 * (config.lr - config.final_lr) * (1.0 + math.cos(math.pi * min(done, 1.0)))


def make_optimiser(config: OptimConfig, module: nn.Module) -> torch.optim.Optimizer:
    """AdamW or SGD (Nesterov momentum 0.9); biases and normalisation are not decayed."""
    trained = [p for name, p in module.named_parameters() if p.requires_grad and not name.startswith("averaged.")]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr=config.lr)


def _finish(
    out: Path,
    trainee: Trainee,
    head: tuple[Tensor, list[str], float] | None,
    config: TrainConfig,
    settings: dict[str, Any],
    recent: Sequence[dict[str, float]],
) -> Result:
    """Write the student, drop the training state."""
    terms = {name: sum(r[name] for r in recent) / len(recent) for name in recent[0]}
    weight, names, scale = head or (None, [], 1.0)
    network = trainee.kept()
    done = {"settings": settings, "steps": config.steps, "last_terms": terms}
    for name, loss in trainee.objective.of().items():
        if report := loss.report():
            done[name] = report
    checkpoint = Checkpoint(network, weight, names, scale, done)
    models.save(out, checkpoint)
    state.drop(out)
    return Result(out, parameters(network), terms)


def _head(objective: Sum, classes: Classes, logits: TeacherLogits | None) -> tuple[Tensor, list[str], float] | None:
    """The student's classifier, where a loss trained one: its matrix, classes and scale."""
    for loss in objective.of().values():
        if isinstance(loss, Classifier) and logits is not None:
            return loss.weight, logits.classes, loss.scale
        classifier = loss.classify if isinstance(loss, OneStep) else loss
        if isinstance(classifier, AAM) and classifier.subcentres == 1:
            return classifier.weight, classes.names, classifier.scale
    return None


class _Log:
    """log.jsonl, and TensorBoard events where it is installed."""

    def __init__(self, out: Path, first: int) -> None:
        path = out / "log.jsonl"
        kept = path.read_text().splitlines() if first and path.is_file() else []
        self._file = open(path, "w")
        # A killed run may have logged steps that are done again now.
        self._file.writelines(f"{line}\n" for line in kept if json.loads(line)["step"] < first)
        try:
            from torch.utils.tensorboard import SummaryWriter

            if not first:
                shutil.rmtree(out / "tensorboard", ignore_errors=True)
            self._board: Any = SummaryWriter(str(out / "tensorboard"), purge_step=first or None)
        except ImportError:
            self._board = None

    def __call__(self, step: int, values: dict[str, float]) -> None:
        if step % LOG_EVERY:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()
