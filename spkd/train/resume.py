"""A run on disk: the settings that identify it, and the state from which an interrupted run is continued."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from spkd.cache import CacheSource
from spkd.errors import SpkdError, first_line
from spkd.files.atomic import PART, read_bytes, read_json, write_bytes, write_json
from spkd.files.schema import record
from spkd.progress import log
from spkd.registry import section_of
from spkd.students.description import DESCRIPTION, Description
from spkd.train.distributed import world
from spkd.train.losses.base import ChosenLoss
from spkd.train.mining import Miner
from spkd.train.module import TrainingModule
from spkd.train.settings import TrainConfig
from spkd.train.sharding import Division, division_of, divisions, own_state, whole_state

# Settings of the place of a run and of its saving; all others identify the run.
PLACES = (
    *("cache", "finetune_cache", "out", "manifest", "noise", "rir", "workers", "device", "save_every"),
    *("valid", "loggers"),
)
STATE, LOCK = "state.json", "run.lock"
MOST_NAMED = 5  # settings that differ
LONGEST_VALUE = 60  # characters


def run_settings(
    config: TrainConfig, losses: dict[str, ChosenLoss], cache: CacheSource, finetune_cache: CacheSource | None
) -> dict[str, Any]:
    """Settings that identify a run: all but those of its place (device, workers, ...) and of its saving."""
    chosen = {
        name: value for name, value in dataclasses.asdict(config).items() if name not in (*PLACES, "loss", "given")
    }
    if finetune_cache is not None:
        chosen["finetune_caches"] = [member.fingerprint for member in finetune_cache.members]
    return {
        "losses": {
            name: {"weight": loss.weight, "final_weight": loss.final_weight, **_without_places(loss.settings)}
            for name, loss in losses.items()
        },
        "caches": [member.fingerprint for member in cache.members],
        "teacher_families": list(dict.fromkeys(member.card.teacher.family for member in cache.members)),
        **chosen,
    }


def _without_places(settings: Any) -> dict[str, Any]:
    """Settings of a loss, without whether its classes are divided over ranks: a run may continue on others."""
    tree = dataclasses.asdict(settings)
    for part in (tree, *(value for value in tree.values() if isinstance(value, dict))):
        part.pop("sharded", None)
    return tree


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Lock a folder against other training runs while the block runs.

    Raises:
        SpkdError: another training run uses the folder.
    """
    with open(out / LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SpkdError(f"{out}: another training is at work there; wait for it, or choose out=FOLDER") from error
        except OSError:  # a file system without locks
            pass
        try:
            yield
        finally:
            (out / LOCK).unlink(missing_ok=True)


def can_be_extended(config: TrainConfig, losses: Mapping[str, ChosenLoss]) -> bool:
    """Whether a finished run is the beginning of a run with more steps: nothing in it depends on their number."""
    optim = config.optim
    fixed = optim.schedule == "constant" and not optim.swa_fraction and not config.large_margin.steps
    return fixed and not any(loss.depends_on_progress for loss in losses.values())


def is_finished(out: Path, settings: dict[str, Any]) -> bool:
    """Whether `out` holds this run, finished.

    Raises:
        SpkdError: it holds another run.
    """
    ours, finished = json.loads(json.dumps(settings)), False
    for name in (STATE, DESCRIPTION):
        if not (out / name).is_file():
            continue
        if name == STATE:
            state = read_json(out / STATE)
            stored = state.get("settings") if isinstance(state, dict) else None
            stored = stored if isinstance(stored, dict) else {}
        else:
            stored = Description.read(out / name).training.settings
        if stored == ours:
            finished = finished or name == DESCRIPTION
        elif not _is_beginning(stored, ours):
            what = "an unfinished run" if name == STATE else "a student"
            raise SpkdError(
                f"{out}: holds {what} with other settings{_differences(stored, ours)}; choose another folder with "
                "out=FOLDER"
            )
        elif not (out / STATE).is_file():
            raise SpkdError(
                f"{out}: finished with steps={stored['steps']}, and its learning rate, weights or margins depend on "
                "that number; only runs with optim.schedule=constant, and without such settings, can be continued"
            )
    return finished


def _differences(stored: dict[str, Any], ours: dict[str, Any]) -> str:
    """Settings that differ, in brackets, with the values of the run in the folder and of this run.

    It is "" where the settings of the run in the folder are not known.
    """
    if not stored:
        return ""
    both = stored.get("losses", {}).keys() & ours["losses"].keys()
    old, new = _flat(stored, both), _flat(ours, both)
    names = [name for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name)]
    shown = [f"{name}: {_shown(old.get(name))} there, {_shown(new.get(name))} now" for name in names[:MOST_NAMED]]
    more = f"; and {len(names) - MOST_NAMED} others" if len(names) > MOST_NAMED else ""
    return f" ({'; '.join(shown)}{more})"


def _flat(settings: Mapping[str, Any], losses: Iterable[str]) -> dict[str, Any]:
    """Settings by the names that a user writes, with those of the given losses alone."""
    flat: dict[str, Any] = {"loss": list(settings.get("losses", {}))}
    for loss in losses:
        of_loss = dict(settings["losses"][loss])
        for weight in ("weight", "final_weight"):
            flat[f"loss.{weight}s.{loss}"] = of_loss.pop(weight, None)
        flat |= _dotted(of_loss, f"loss.{section_of(loss)}.")
    rest = {name: value for name, value in settings.items() if name not in ("losses", "teacher_families")}
    renamed = {"caches": "fingerprints of cache", "finetune_caches": "fingerprints of finetune_cache"}
    return flat | _dotted({renamed.get(name, name): value for name, value in rest.items()})


def _dotted(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        # The settings of a component are a section of its name.
        name = section_of(str(tree["name"])) if name == "settings" and "name" in tree else name
        flat |= _dotted(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _shown(value: Any) -> str:
    """A value as a user writes it, shortened where it is long, such as a list of fingerprints."""
    text = "none" if value is None else value if isinstance(value, str) else json.dumps(value).replace('"', "")
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


def _is_beginning(stored: dict[str, Any], ours: dict[str, Any]) -> bool:
    """Whether two runs differ only in that ours has more steps."""
    but_steps = [
        {name: value for name, value in tree.items() if name not in ("steps", "epochs")} for tree in (stored, ours)
    ]
    return but_steps[0] == but_steps[1] and isinstance(stored.get("steps"), int) and stored["steps"] < ours["steps"]


@dataclass(frozen=True)
class _State:
    """Content of state.json."""

    step: int = field(metadata={"low": 1})
    tensors: str
    settings: dict[str, Any]


def save(
    out: Path,
    module: TrainingModule,
    optimiser: torch.optim.Optimizer,
    miner: Miner | None,
    step: int,
    settings: dict[str, Any],
    extra: Mapping[str, Tensor] | None = None,
) -> None:
    """Save the state from which a run is continued.

    The first rank writes it; all ranks call this, since each holds some rows of parameters that are divided. state.json
    names the file of the tensors, so that both change together.

    Args:
        out: folder of the run.
        module: student and losses.
        optimiser: the optimiser.
        miner: miner of negatives and positives, if any.
        step: number of steps done.
        settings: settings that identify the run.
        extra: further tensors by name.
    """
    model = whole_state(module.state_dict(), divisions(module))
    parameters, values_of = _parameters(optimiser), optimiser.state_dict()["state"]
    moments = {i: whole_state(values, _divided_values(parameters[i], values)) for i, values in values_of.items()}
    if not world().is_first:
        return
    tensors = {f"model.{k}": v.detach().cpu().contiguous().clone() for k, v in model.items()}
    if miner is not None:
        tensors |= {f"mining.{k}": v for k, v in miner.state().items()}
    for index, values in moments.items():
        for name, value in values.items():
            tensors[f"optimiser.{index}.{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
    tensors |= {f"extra.{name}": value for name, value in (extra or {}).items()}
    name = f"state.{step}.safetensors"
    write_bytes(out / name, save_tensors(tensors))
    write_json(out / STATE, {"step": step, "tensors": name, "settings": settings})
    _remove_states(out, name)


def resume(
    out: Path, module: TrainingModule, optimiser: torch.optim.Optimizer, miner: Miner | None, steps: int
) -> tuple[int, dict[str, Tensor]]:
    """Load a saved state.

    Args:
        out: folder of the run.
        module: student and losses.
        optimiser: the optimiser.
        miner: miner of negatives and positives, if any.
        steps: number of steps of the whole run.
    Returns:
        The step to continue from, 0 where nothing was saved; and the further tensors that were saved.
    Raises:
        SpkdError: the state is damaged.
    """
    if not (out / STATE).is_file():
        return 0, {}
    try:
        state = record(_State, read_json(out / STATE), STATE)
        if state.step >= steps or not re.fullmatch(r"state\.\d+\.safetensors", state.tensors):
            raise ValueError(f"step {state.step} of {steps}, tensors in {state.tensors[:40]}")
        tensors = load_tensors(read_bytes(out / state.tensors))
        # Infinite values are valid: the lowest loss so far is initially infinite.
        odd = [name for name, value in tensors.items() if value.is_floating_point() and value.isnan().any()]
        if odd:
            raise ValueError(f"values of {odd[0]} are NaN")
        held = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
        module.load_state_dict(own_state(held, divisions(module)))
        if miner is not None:
            miner.load_state({k.removeprefix("mining."): v for k, v in tensors.items() if k.startswith("mining.")})
        _load_optimiser(optimiser, tensors)
    except Exception as error:  # safetensors and torch raise many kinds for a damaged file
        raise SpkdError(f"{out}: damaged training state ({first_line(error)}); remove the folder") from error
    log(f"continuing {out} at step {state.step}")
    return state.step, {k.removeprefix("extra."): v for k, v in tensors.items() if k.startswith("extra.")}


def _parameters(optimiser: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimiser.param_groups for p in group["params"]]


def _divided_values(parameter: nn.Parameter, values: Mapping[str, Tensor]) -> dict[str, Division]:
    """Division of those of the optimiser's values of a parameter that are divided over the ranks as it is."""
    division = division_of(parameter)
    return {name: division for name, value in values.items() if division is not None and value.ndim > 1}


def _load_optimiser(optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Load the optimiser's state. Raises ValueError where that of a parameter is missing or has another shape."""
    saved: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimiser."):
            _, number, name = key.split(".", 2)
            saved.setdefault(int(number), {})[name] = value
    parameters = _parameters(optimiser)
    if not saved or not set(saved) <= set(range(len(parameters))):
        raise ValueError("the optimiser's state is missing, or of another student")
    saved = {i: own_state(values, _divided_values(parameters[i], values)) for i, values in saved.items()}
    for index, values in saved.items():
        for name, value in values.items():
            if value.ndim and value.shape != parameters[index].shape:
                raise ValueError(f"the optimiser's {name} of parameter {index} has the shape {tuple(value.shape)}")
    optimiser.load_state_dict({"state": saved, "param_groups": optimiser.state_dict()["param_groups"]})


def drop(out: Path) -> None:
    """Remove the state of a finished run, and files that a kill left incomplete."""
    (out / STATE).unlink(missing_ok=True)
    _remove_states(out)
    for left in out.glob(f"*{PART}"):
        left.unlink(missing_ok=True)


def _remove_states(out: Path, but: str = "") -> None:
    for old in out.glob("state.*.safetensors*"):
        if old.name != but:
            old.unlink(missing_ok=True)
