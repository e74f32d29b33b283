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
from torch.utils.data import DataLoader

from spkd import device as devices
from spkd import models
from spkd.cache import EMBEDDING, FBANK, LOGITS, Contents, Target
from spkd.cache.several import open_caches
from spkd.cache.tars import Stream
from spkd.config import LossConfig, OptimConfig, TrainConfig
from spkd.errors import SpkdError, UsageError
from spkd.files import read_json, writable_folder, write_bytes, write_json
from spkd.manifest import Manifest
from spkd.models import Checkpoint
from spkd.models.network import parameters
from spkd.progress import say, track
from spkd.train.data import NEGATIVE, Classes, Steps, mask
from spkd.train.losses import AAM, LOSSES, Classifier, Said, Sum, check_names, check_values, of_teachers
from spkd.train.mining import mine
from spkd.train.teacher import TeacherLogits, teacher_logits
from spkd.view import Player

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
    out = writable_folder(config.out)
    settings = _settings(config, losses, cache)
    finished = _check_out(out, settings)
    if finished is not None:
        say(f"{out}: this run is finished already")
        return finished

    torch.manual_seed(config.seed)
    try:
        network = models.build(config.student.name, config.student.channels, config.student.embedding)
    except ValueError as error:
        raise UsageError(str(error)) from error
    targets = {name: cache.target(name) for name in cache.names}
    if logits is not None:
        targets[LOGITS] = Target(LOGITS, len(logits.classes))
    chosen = of_teachers(losses, cache.names)
    objective = Sum(chosen, config.loss, network.levels, targets, len(classes.names))
    trainee = nn.ModuleDict({"network": network, "objective": objective}).to(device)
    optimiser = make_optimiser(config.optim, trainee)
    first = _resume(out, trainee, optimiser) if (out / "state.json").is_file() else 0

    needs = sorted({name + suffix for loss, suffix in chosen.values() for name in needed(loss, config.loss, logits)})
    hard = config.mining.negatives
    negatives = mine(cache, classes, config.mining, config.loss) if hard else None
    order = (config.crop, config.batch_size, config.seed)
    steps = Steps(cache, needs, classes, *order, _player(config, cache), logits, negatives, hard)
    recent: deque[dict[str, float]] = deque(maxlen=max(config.steps // 10, 1))
    log = _Log(out, first)
    try:
        with track("training", config.steps * config.batch_size, "utterances", first * config.batch_size) as bar:
            for step, batch in _batches(steps, first, config, cache):
                batch = {name: values.to(device, non_blocking=True) for name, values in batch.items()}
                said, features = _heard(batch, cache, needs, logits)
                terms = _step(step, features, said, config, trainee, optimiser)
                recent.append(terms)
                log(step, terms | {"lr": optimiser.param_groups[0]["lr"]})
                bar.advance(config.batch_size, " ".join(f"{k} {v:.3f}" for k, v in terms.items()))
                if (step + 1) % config.save_every == 0 and step + 1 < config.steps:
                    _save_state(out, trainee, optimiser, step + 1, settings)
    finally:
        log.close()
    head = _head(objective, classes, logits)
    return _finish(out, network, head, config, settings, recent)


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
            wanted = ",".join([*(t for t in stored if t != FBANK.name), *missing])
            raise SpkdError(
                f"--loss {loss} needs the target {', '.join(missing)}, which {cache.name} lacks; extract it: "
                f"spkd extract teacher={family} teacher.targets=[{wanted}] "
                f"view.plan={card['views']['plan']} cache=NEW_FOLDER"
            )
    if config.mining.negatives < 0 or config.mining.neighbours < 1:
        raise UsageError("mining: negatives must not be negative, and neighbours at least 1")
    if config.mining.negatives and "contrastive" not in losses:
        raise UsageError("mining.negatives: only contrastive takes hard negatives; add --loss contrastive")
    if config.mining.negatives and EMBEDDING not in cache.names:
        raise UsageError("mining.negatives: needs one teacher's embeddings (teachers=concatenate or average)")
    if config.mining.negatives and isinstance(cache, Stream):
        raise UsageError("mining.negatives: a stream cannot be searched; pull or import the cache")
    if len(cache.rows) < 2:
        raise SpkdError(f"{cache.name}: {len(cache.rows)} usable views; training needs at least two")
    if config.batch_size < 2:
        raise UsageError("batch_size: at least 2 (batch-norm and the contrastive losses compare views)")
    if FBANK.name not in cache.names and config.manifest is None:
        raise SpkdError(
            f"{cache.name} holds no fbank, so training needs the audio: give manifest=FILE, or extract with fbank=true"
        )


def _player(config: TrainConfig, cache: Contents) -> Player | None:
    """What plays the views' audio; None where the cache holds fbank."""
    if FBANK.name in cache.names:
        return None
    assert config.manifest is not None
    return cache.player(Manifest.load(config.manifest), config.noise, config.rir)


def _batches(steps: Steps, first: int, config: TrainConfig, cache: Contents) -> Iterator[tuple[int, dict[str, Tensor]]]:
    # A batch of cached features is a memory copy: worker processes would only add to it.
    workers = 0 if FBANK.name in cache.names else config.workers
    loader = DataLoader(
        steps,
        batch_size=None,
        sampler=range(first, config.steps),
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
    )
    yield from enumerate(loader, first)


def _heard(
    batch: dict[str, Tensor], cache: Contents, needs: list[str], logits: TeacherLogits | None
) -> tuple[Said, Tensor]:
    """What is known of a batch that lies on the device, and the student's features (B, T, 80): decoded here, so that
    the loader and the bus carry the codes alone."""
    label, voice, teacher_label = (batch.pop(name) for name in ("label", "voice", "teacher_label"))
    mined = {key.removeprefix(NEGATIVE): batch.pop(key) for key in list(batch) if key.startswith(NEGATIVE)}
    features = None if FBANK.name in cache.names else batch.pop(FBANK.name)
    targets = cache.decode(batch, needs if features is not None else [*needs, FBANK.name])
    features = targets.pop(FBANK.name) if features is None else features
    if logits is not None and logits.prototypes is not None:
        targets[LOGITS] = logits.of(targets[EMBEDDING])
    scale = None if logits is None else logits.scale
    targets = {name: values.float() for name, values in targets.items()}
    said = Said(targets, label, voice, teacher_label, scale)
    if mined:
        hard = cache.decode(mined, [EMBEDDING])[EMBEDDING]
        said = replace(said, negatives=hard.view(len(label), -1, hard.shape[-1]))
    return said, features.float()


def _step(
    step: int,
    features: Tensor,
    said: Said,
    config: TrainConfig,
    trainee: nn.ModuleDict,
    optimiser: torch.optim.Optimizer,
) -> dict[str, float]:
    """One optimiser step. Returns the loss terms."""
    trainee.train()
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    features = mask(features, config.mask.frames, config.mask.bands, generator)
    total, terms = trainee["objective"](trainee["network"](features), replace(said, done=step / config.steps))
    if not torch.isfinite(total):
        raise SpkdError(f"training diverged at step {step} (the loss is {total.item()}); lower optim.lr")
    optimiser.zero_grad(set_to_none=True)
    total.backward()
    if config.optim.clip > 0:
        nn.utils.clip_grad_norm_(trainee.parameters(), config.optim.clip)
    for group in optimiser.param_groups:
        group["lr"] = learning_rate(config.optim, step, config.steps)
    optimiser.step()
    return {name: term.item() for name, term in terms.items()}


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Linear warm-up from zero, then half a cosine from `lr` down to `final_lr` at the last step."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(steps - 1 - config.warmup, 1)
    return config.final_lr + 0.5 * (config.lr - config.final_lr) * (1.0 + math.cos(math.pi * min(done, 1.0)))


def make_optimiser(config: OptimConfig, module: nn.Module) -> torch.optim.Optimizer:
    """AdamW or SGD (Nesterov momentum 0.9); biases and normalisation are not decayed."""
    groups = [
        {"params": [p for p in module.parameters() if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in module.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr=config.lr)


def _settings(config: TrainConfig, losses: Sequence[str], cache: Contents) -> dict[str, Any]:
    """What makes two runs the same: everything but where they run and how often they save."""
    chosen = dataclasses.asdict(config)
    for name in ("cache", "out", "manifest", "noise", "rir", "workers", "device", "save_every"):
        chosen.pop(name)
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
            if theirs != json.loads(json.dumps(settings)):
                what = "an unfinished run" if name == "state.json" else "a student"
                raise SpkdError(f"{out}: holds {what} with other settings; choose another folder with out=FOLDER")
    if not (out / "model.json").is_file():
        return None
    checkpoint = models.load(out)
    return Result(out, parameters(checkpoint.network), checkpoint.training["last_terms"])


def _save_state(out: Path, trainee: nn.Module, optimiser: torch.optim.Optimizer, step: int, settings: dict) -> None:
    """Everything a run continues from. state.json names the tensors' file, so both change together."""
    tensors = {f"model.{k}": v.detach().cpu().contiguous() for k, v in trainee.state_dict().items()}
    for index, values in optimiser.state_dict()["state"].items():
        for name, value in values.items():
            tensors[f"optimiser.{index}.{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
    name = f"state.{step}.safetensors"
    write_bytes(out / name, save_tensors(tensors))
    write_json(out / "state.json", {"step": step, "tensors": name, "settings": settings})
    for old in out.glob("state.*.safetensors"):
        if old.name != name:
            old.unlink()


def _resume(out: Path, trainee: nn.Module, optimiser: torch.optim.Optimizer) -> int:
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
    optimiser.load_state_dict({"state": saved, "param_groups": optimiser.state_dict()["param_groups"]})
    say(f"continuing {out} at step {state['step']}")
    return int(state["step"])


def _finish(
    out: Path,
    network: models.Network,
    head: tuple[Tensor, list[str], float] | None,
    config: TrainConfig,
    settings: dict[str, Any],
    recent: Sequence[dict[str, float]],
) -> Result:
    """Write the student, drop the training state."""
    terms = {name: sum(r[name] for r in recent) / len(recent) for name in recent[0]}
    weight, names, scale = head or (None, [], 1.0)
    done = {"settings": settings, "steps": config.steps, "last_terms": terms}
    checkpoint = Checkpoint(network, weight, names, scale, done)
    models.save(out, checkpoint)
    (out / "state.json").unlink(missing_ok=True)
    for old in out.glob("state.*.safetensors"):
        old.unlink()
    return Result(out, parameters(network), terms)


def _head(objective: Sum, classes: Classes, logits: TeacherLogits | None) -> tuple[Tensor, list[str], float] | None:
    """The student's classifier, where a loss trained one: its matrix, classes and scale."""
    for loss in objective.losses.values():
        if isinstance(loss, Classifier) and logits is not None:
            return loss.weight, logits.classes, loss.scale
        if isinstance(loss, AAM) and loss.subcentres == 1:
            return loss.weight, classes.names, loss.scale
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
