"""`spkd train`: distil a student from a teacher cache."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from spkd import device as devices
from spkd import models
from spkd.cache import EMBEDDING, FBANK, FEATURES, LOGITS, Contents, Target
from spkd.cache.several import open_caches
from spkd.cache.tars import Stream
from spkd.config import LossConfig, OptimConfig, TrainConfig
from spkd.errors import SpkdError, UsageError
from spkd.files import read_json, writable_folder, write_bytes, write_json
from spkd.manifest import Manifest
from spkd.models import Checkpoint
from spkd.models.network import macs, parameters
from spkd.progress import say, track
from spkd.train import mining
from spkd.train.data import CROP, Classes, Listening, Steps, decode, mask
from spkd.train.losses import AAM, LOSSES, Classifier, OneStep, Said, Sum, check_names, check_values, of_teachers
from spkd.train.mining import Miner
from spkd.train.teacher import TeacherLogits, teacher_logits
from spkd.train.trainee import Trainee

LOG_EVERY = 20  # steps between lines of log.jsonl
PLACES = ("cache", "labelled", "out", "manifest", "noise", "rir", "workers", "device", "save_every")  # no part of what


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
    out = writable_folder(config.out)
    labelled = open_caches(config.labelled) if config.labelled else None
    settings = _settings(config, losses, cache, labelled)
    finished = _check_out(out, settings)
    if finished is not None:
        say(f"{out}: this run is finished already")
        return finished

    torch.manual_seed(config.seed)
    network = models.student(config.student)
    tuning = _tuning(config, losses, cache, labelled, network)
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
    crops = (config.crop, *(seconds or config.crop for seconds in further))
    listening = _listening(config, cache, network.hears, crops)
    needs = sorted({name + suffix for loss, suffix in chosen.values() for name in needed(loss, config.loss, logits)})
    miner = Miner(cache, classes, listening, config.mining, config.loss) if config.mining.negatives else None
    first = _resume(out, trainee, optimiser, miner) if (out / "state.json").is_file() else 0
    steps = Steps(cache, needs, classes, listening, config.batch_size, config.seed, logits)
    recent: deque[dict[str, float]] = deque(maxlen=max(config.steps // 10, 1))
    log = _Log(out, first)
    try:
        with track("training", config.steps * config.batch_size, "utterances", first * config.batch_size) as bar:
            for step, (batch, tuned) in _batches(steps, tuning, first, config, listening):
                if miner is not None:
                    miner.before(step, network)
                heard = _heard(batch, cache, listening, needs, logits, miner, config.seed + step, device)
                heard = heard if tuning is None else tuning.add(heard, tuned, device)
                terms = _step(step, heard, config, trainee, optimiser)
                recent.append(terms)
                log(step, terms | {"lr": optimiser.param_groups[0]["lr"]})
                bar.advance(config.batch_size, " ".join(f"{k} {v:.3f}" for k, v in terms.items()))
                if (step + 1) % config.save_every == 0 and step + 1 < config.steps:
                    _save_state(out, trainee, optimiser, miner, step + 1, settings)
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
        if missing:
            family = "NAME" if card["teacher"]["family"] == "none" else card["teacher"]["family"]
            wanted = ",".join([*(t for t in stored if t not in FEATURES), *missing])
            raise SpkdError(
                f"--loss {loss} needs the target {', '.join(missing)}, which {cache.name} lacks; extract it: "
                f"spkd extract teacher={family} teacher.targets=[{wanted}] "
                f"view.plan={card['views']['plan']} cache=NEW_FOLDER"
            )
    if config.mining.negatives:
        mined = "contrastive" in losses or ("memo" in losses and config.loss.memo.teacher > 0)
        if not mined:
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


def _listening(config: TrainConfig, cache: Contents, hears: Target, crops: tuple[float, ...]) -> Listening:
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
        features, _ = decode(self.cache, self.listening, _features_of(batch, self.cache, device))
        return replace(heard, tuning=features, said=replace(heard.said, tuned_label=label))


def _tuning(
    config: TrainConfig, losses: Sequence[str], cache: Contents, labelled: Contents | None, network: models.Network
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
    listening = _listening(config, theirs, network.hears, (config.crop,))
    # Another order than that of the other path, where both hear the same cache.
    steps = Steps(theirs, [], classes, listening, config.batch_size, config.seed + 1, labelled=True)
    return Tuning(theirs, classes, listening, steps)


@dataclass(frozen=True)
class Heard:
    """A batch on the device: the features (B, T_i, F) of every crop, what is known of the views, and the features of
    those that tune."""

    crops: list[Tensor]
    said: Said
    tuning: Tensor | None = None


class _Both(Dataset):
    """Two batches of each step, so that one loader prepares both."""

    def __init__(self, steps: Steps, tuning: Steps | None) -> None:
        self._steps, self._tuning = steps, tuning

    def __getitem__(self, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return self._steps[step], {} if self._tuning is None else self._tuning[step]


def _batches(
    steps: Steps, tuning: Tuning | None, first: int, config: TrainConfig, listening: Listening
) -> Iterator[tuple[int, tuple[dict[str, Tensor], dict[str, Tensor]]]]:
    # A batch of cached features is a memory copy: worker processes would only add to it.
    players = (listening.player, None if tuning is None else tuning.listening.player)
    loader = DataLoader(
        _Both(steps, None if tuning is None else tuning.steps),
        batch_size=None,
        sampler=range(first, config.steps),
        num_workers=0 if players == (None, None) else config.workers,
        pin_memory=torch.cuda.is_available(),
    )
    yield from enumerate(loader, first)


def _features_of(batch: dict[str, Tensor], cache: Contents, device: torch.device) -> dict[str, Tensor]:
    """What is stored of the views, without what is known of them, on the device."""
    known = ("rows", "label", "voice", "teacher_label")
    return {key: values.to(device, non_blocking=True) for key, values in batch.items() if key not in known}


def _heard(
    batch: dict[str, Tensor],
    cache: Contents,
    listening: Listening,
    needs: list[str],
    logits: TeacherLogits | None,
    miner: Miner | None,
    seed: int,
    device: torch.device,
) -> Heard:
    """What is known of a batch: decoded on the device, so that the loader and the bus carry the codes alone."""
    label, voice, teacher_label = (batch[name].to(device) for name in ("label", "voice", "teacher_label"))
    stored = _features_of(batch, cache, device)
    crops = []
    for which in range(1, len(listening.crops)):
        prefix = f"{CROP}{which}:"
        more = {key.removeprefix(prefix): stored.pop(key) for key in list(stored) if key.startswith(prefix)}
        crops.append(decode(cache, listening, more)[0])
    first, targets = decode(cache, listening, stored, needs)
    if logits is not None and logits.prototypes is not None:
        targets[LOGITS] = logits.of(targets[EMBEDDING])
    said = Said(targets, label, voice, teacher_label, None if logits is None else logits.scale)
    if miner is not None:
        drawn = miner.draw(batch["rows"].numpy(), seed)
        mined = {k: v.to(device) for k, v in cache.stored(drawn.ravel(), [EMBEDDING]).items()}
        said = replace(said, negatives=cache.decode(mined, [EMBEDDING])[EMBEDDING].float().unflatten(0, drawn.shape))
    return Heard([first, *crops], said)


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


def _settings(config: TrainConfig, losses: Sequence[str], cache: Contents, labelled: Contents | None) -> dict[str, Any]:
    """What makes two runs the same: everything but where they run and how often they save."""
    chosen = dataclasses.asdict(config)
    for name in PLACES:
        chosen.pop(name)
    if labelled is not None:
        chosen["labelled"] = [member.fingerprint for member in labelled.members]
    return {
        "losses": list(losses),
        "caches": [member.fingerprint for member in cache.members],
        "teachers_heard": list(dict.fromkeys(member.card["teacher"]["family"] for member in cache.members)),
        **chosen,
    }


def _check_out(out: Path, settings: dict[str, Any]) -> Result | None:
    """The result of this very run where it is finished; an error where `out` holds another one."""
    for name in ("state.json", "model.json"):
        if (out / name).is_file():
            found = read_json(out / name)
            theirs = found.get("settings") if name == "state.json" else found.get("training", {}).get("settings")
            # A setting that spkd did not know yet had the effect of today's default.
            if _filled(theirs or {}, TrainConfig()) != json.loads(json.dumps(settings)):
                what = "an unfinished run" if name == "state.json" else "a student"
                raise SpkdError(f"{out}: holds {what} with other settings; choose another folder with out=FOLDER")
    if not (out / "model.json").is_file():
        return None
    checkpoint = models.load(out)
    return Result(out, parameters(checkpoint.network), checkpoint.training["last_terms"])


def _filled(settings: dict[str, Any], defaults: Any) -> dict[str, Any]:
    """`settings` and, where they lack a key that is no matter of place, its default."""
    filled = dict(settings)
    for field in dataclasses.fields(defaults):
        default = getattr(defaults, field.name)
        if dataclasses.is_dataclass(default):
            filled[field.name] = _filled(settings.get(field.name, {}), default)
        elif field.name not in PLACES:
            filled.setdefault(field.name, default)
    return filled


def _save_state(
    out: Path,
    trainee: Trainee,
    optimiser: torch.optim.Optimizer,
    miner: Miner | None,
    step: int,
    settings: dict[str, Any],
) -> None:
    """Everything a run continues from. state.json names the tensors' file, so both change together."""
    tensors = {f"model.{k}": v.detach().cpu().contiguous().clone() for k, v in trainee.state_dict().items()}
    if miner is not None:
        tensors |= {f"mining.{k}": v for k, v in miner.state().items()}
    for index, values in optimiser.state_dict()["state"].items():
        for name, value in values.items():
            tensors[f"optimiser.{index}.{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
    name = f"state.{step}.safetensors"
    write_bytes(out / name, save_tensors(tensors))
    write_json(out / "state.json", {"step": step, "tensors": name, "settings": settings})
    for old in out.glob("state.*.safetensors"):
        if old.name != name:
            old.unlink()


def _resume(out: Path, trainee: Trainee, optimiser: torch.optim.Optimizer, miner: Miner | None) -> int:
    """Load a saved state. Returns the step to go on from."""
    state = read_json(out / "state.json")
    try:
        tensors = load_tensors((out / state["tensors"]).read_bytes())
        trainee.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    except Exception as error:  # safetensors and torch raise many kinds for a damaged file
        raise SpkdError(f"{out}: damaged training state ({str(error).splitlines()[0]}); remove the folder") from error
    saved: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimiser."):
            _, index, name = key.split(".", 2)
            saved.setdefault(int(index), {})[name] = value
    if miner is not None:
        miner.load_state({k.removeprefix("mining."): v for k, v in tensors.items() if k.startswith("mining.")})
    optimiser.load_state_dict({"state": saved, "param_groups": optimiser.state_dict()["param_groups"]})
    say(f"continuing {out} at step {state['step']}")
    return int(state["step"])


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
    (out / "state.json").unlink(missing_ok=True)
    for old in out.glob("state.*.safetensors"):
        old.unlink()
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
