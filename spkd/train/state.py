"""A run on disk: what makes two runs the same, and what an interrupted one continues from."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from spkd.cache import Contents
from spkd.config import TrainConfig
from spkd.errors import SpkdError
from spkd.files import read_json, write_bytes, write_json
from spkd.progress import say
from spkd.train.mining import Miner
from spkd.train.trainee import Trainee

# Where a run happens and how often it saves; all other settings say which run it is.
PLACES = ("cache", "labelled", "out", "manifest", "noise", "rir", "workers", "device", "save_every")


def settings(config: TrainConfig, losses: Sequence[str], cache: Contents, labelled: Contents | None) -> dict[str, Any]:
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


def finished(out: Path, settings: dict[str, Any]) -> bool:
    """Whether `out` holds this very run, finished.

    Raises:
        SpkdError: it holds another one.
    """
    for name in ("state.json", "model.json"):
        if (out / name).is_file():
            found = read_json(out / name)
            theirs = found.get("settings") if name == "state.json" else found.get("training", {}).get("settings")
            # A setting that spkd did not know yet had the effect of today's default.
            if _filled(theirs or {}, TrainConfig()) != json.loads(json.dumps(settings)):
                what = "an unfinished run" if name == "state.json" else "a student"
                raise SpkdError(f"{out}: holds {what} with other settings; choose another folder with out=FOLDER")
    return (out / "model.json").is_file()


def save(
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


def resume(out: Path, trainee: Trainee, optimiser: torch.optim.Optimizer, miner: Miner | None) -> int:
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


def drop(out: Path) -> None:
    """Remove the state of a run that is finished."""
    (out / "state.json").unlink(missing_ok=True)
    for old in out.glob("state.*.safetensors"):
        old.unlink()


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
