"""A run on disk: the settings that identify it, and the state from which an interrupted run is continued."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from spkd.cache import CacheSource
from spkd.cache.describe import growth
from spkd.cache.lock import made_exclusive
from spkd.config import read_tree
from spkd.corpus.augment import SYNTHETIC, bank
from spkd.corpus.vad.base import NONE
from spkd.errors import SpkdError, UsageError, first_line
from spkd.files import digest
from spkd.files.atomic import remove, remove_abandoned, write_bytes, write_json
from spkd.files.reading import MOST_OF_WEIGHTS, read_bytes, read_json
from spkd.files.schema import record
from spkd.files.sealed import Format
from spkd.files.text import differences, dotted
from spkd.progress import log
from spkd.registry import section_of
from spkd.students.curves import LOG
from spkd.students.description import DESCRIPTION, Description, RunFacts
from spkd.train.distributed import ProcessGroup, world
from spkd.train.losses.base import ChosenLoss
from spkd.train.mining import Miner
from spkd.train.module import TrainingModule
from spkd.train.record import RUN, RunRecord, settings_of
from spkd.train.settings import TrainConfig
from spkd.train.sharding import Division, division_of, divisions, own_state, whole_state
from spkd.version import __version__

# Settings of the place of a run and of its saving; all others identify the run.
PLACES = (
    *("cache", "finetune_cache", "out", "manifest", "noise", "rir", "fetch", "workers", "device", "save_every"),
    *("valid", "loggers"),
)
STATE, LOCK = "state.json", "run.lock"
OF_MODELS = (".json", ".safetensors", ".bin", ".pt")  # suffixes of the files that make up a model of another library
STATES = "state.*.safetensors*"  # pattern of the names of the files of tensors
FORMAT = Format("spkd_state", 1, "a training state", "remove it to train from the beginning")


def run_settings(
    config: TrainConfig, losses: dict[str, ChosenLoss], cache: CacheSource, finetune_cache: CacheSource | None
) -> dict[str, Any]:
    """Settings that identify a run: all but those of its place (device, workers, ...) and of its saving."""
    chosen = {name: value for name, value in asdict(config).items() if name not in (*PLACES, "loss", "given")}
    if finetune_cache is not None:
        chosen["finetune_caches"] = [member.fingerprint for member in finetune_cache.members]
    members = [*cache.members, *(finetune_cache.members if finetune_cache is not None else ())]
    if (vad := sorted({str(member.card.views.vad or NONE) for member in members})) != [NONE]:
        chosen["vad"] = vad
    return {
        "losses": {
            name: {"weight": loss.weight, "final_weight": loss.final_weight, **_without_places(loss.settings)}
            for name, loss in losses.items()
        },
        "caches": [member.fingerprint for member in cache.members],
        "teacher_families": list(dict.fromkeys(member.card.teacher.family for member in cache.members)),
        **chosen,
        **({"contents": contents} if (contents := contents_of(config)) else {}),
    }


def contents_of(config: TrainConfig) -> dict[str, str]:
    """Digests of what a run reads beside its caches, by setting: the setting itself is a path alone.

    A model on a hub has none, since its name stands for it.

    Raises:
        SpkdError: a file cannot be read, or a folder holds no audio.
    """
    contents = {
        name: bank(folder).digest
        for name, folder in (("augment.noise", config.augment.noise), ("augment.rir", config.augment.rir))
        if folder is not None and folder != SYNTHETIC
    }
    if config.labels is not None:
        contents["labels"] = _digest("labels", Path(config.labels))
    init = None if config.student.init is None else Path(config.student.init)
    if init is None or not init.exists():
        return contents
    if (init / DESCRIPTION).is_file():
        return contents | {"student.init": Description.read(init / DESCRIPTION).weights_sha256}
    files = [init] if init.is_file() else sorted(path for path in init.iterdir() if path.suffix in OF_MODELS)
    lines = [f"{path.relative_to(init)} {_digest('student.init', path)}\n" for path in files]
    return contents | {"student.init": digest.of_bytes("".join(lines).encode())}


def _digest(setting: str, path: Path) -> str:
    try:
        return digest.of_file(path)
    except OSError as error:
        raise SpkdError(f"{setting}={path}: {error.strerror}") from error


def note_contents(run: Path, configs: Iterable[TrainConfig]) -> None:
    """Print a note of what a repetition reads under the names of a run, and that has changed since.

    Args:
        run: folder of the run.
        configs: settings of its repetitions.
    """
    before = RunRecord.read(run / RUN).contents
    there = dotted(read_tree(settings_of(run)).get(TrainConfig.COMMAND) or {})
    changed = {
        f"{name}={value}"
        for config in configs
        for name, content in contents_of(config).items()
        if str(value := dotted(asdict(config)).get(name)) == there.get(name) and before.get(name, content) != content
    }
    for setting in sorted(changed):
        log(f"note: {setting} has another content than for the run in {run}")


def check_same_run(
    settings: Mapping[str, Any], losses: Mapping[str, ChosenLoss], config: TrainConfig, ranks: ProcessGroup
) -> None:
    """Check that all ranks do the same run: others would take their rows of other batches, or save at other steps.

    Args:
        settings: settings that identify the run of this rank.
    Raises:
        UsageError: settings or caches of a rank are not those of the first.
    """
    of_losses = {name: settings["losses"][name] | asdict(loss.settings) for name, loss in losses.items()}
    of_saving = {"save_every": config.save_every, "valid": asdict(config.valid)}
    ours = {**settings, "losses": of_losses, **of_saving, "spkd": __version__}
    first, *others = [json.loads(text) for text in ranks.exchanged(json.dumps(ours))]
    for number, other in enumerate(others, 1):
        if other != first:
            raise UsageError(
                f"rank {number} has other settings or caches than the first{_differences(first, other, ())}; start all "
                "ranks with the same command, settings file, environment and caches"
            )


def _without_places(settings: Any) -> dict[str, Any]:
    """Settings of a loss, without whether its classes are divided over ranks: a run may continue on others."""
    tree = asdict(settings)
    for part in (tree, *(value for value in tree.values() if isinstance(value, dict))):
        part.pop("sharded", None)
    return tree


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Lock a folder against other training runs while the block runs.

    Raises:
        SpkdError: another training run uses the folder, or the file of the lock is a symbolic link.
    """

    def refuse(owner: str) -> None:
        raise SpkdError(f"{out}: another training is at work there, {owner}; wait for it, or choose out=FOLDER")

    with made_exclusive(out / LOCK, on_wait=refuse):
        try:
            yield
        finally:
            (out / LOCK).unlink(missing_ok=True)


def can_be_extended(config: TrainConfig, losses: Mapping[str, ChosenLoss]) -> bool:
    """Whether a finished run is the beginning of a run with more steps: nothing in it depends on their number."""
    optim = config.optim
    fixed = optim.schedule == "constant" and not optim.swa_fraction and not config.large_margin.steps
    return fixed and not any(loss.depends_on_progress for loss in losses.values())


def is_finished(out: Path, settings: dict[str, Any], saved: int, caches: Sequence[str] = ()) -> bool:
    """Whether `out` holds this run, finished.

    Args:
        saved: steps that its state must have, if there is one, for the run to be finished.
        caches: folders of the run's caches, of which an error says whether they have grown.
    Raises:
        SpkdError: it holds another run, or its state is damaged.
    """
    ours, finished = json.loads(json.dumps(settings)), False
    for name in (STATE, DESCRIPTION):
        if not (out / name).is_file():
            continue
        stored = _State.read(out).settings if name == STATE else Description.read(out / name).training.settings
        if stored == ours:
            finished = finished or name == DESCRIPTION
        elif not _is_beginning(stored, ours):
            what = "a student" if _student_of(out) == stored else "an unfinished run"
            raise UsageError(
                f"{out}: holds {what} with other settings{_differences(stored, ours, caches)}; choose another folder "
                "with out=FOLDER"
            )
        elif not (out / STATE).is_file():
            raise UsageError(
                f"{out}: finished with steps={stored['steps']}, and its learning rate, weights or margins depend on "
                "that number; only runs with optim.schedule=constant, and without such settings, can be continued; "
                "choose another folder with out=FOLDER"
            )
    return finished and not ((out / STATE).is_file() and _State.read(out).step < saved)


def _student_of(out: Path) -> dict[str, Any] | None:
    """Settings of the student in a folder, which is written at the end of a run; None where there is none."""
    return Description.read(out / DESCRIPTION).training.settings if (out / DESCRIPTION).is_file() else None


def _differences(stored: dict[str, Any], ours: dict[str, Any], caches: Sequence[str]) -> str:
    """Settings that differ, in brackets, with the values of the run in the folder and of this run.

    The growth of a cache is named instead of its fingerprints. It is "" where the settings of the run in the
    folder are not known.
    """
    if not stored:
        return ""
    both = stored.get("losses", {}).keys() & ours["losses"].keys()
    old, new = _flat(stored, both), _flat(ours, both)
    pairs = [(Path(cache), before) for cache in caches for before in stored.get("caches", [])]
    if grown := [phrase for cache, before in pairs if (phrase := growth(cache, before))]:
        for tree in (old, new):
            tree.pop("fingerprints of cache", None)
    return f" ({'; '.join([*grown, *filter(None, [differences(old, new)])])})"


def _flat(settings: Mapping[str, Any], losses: Iterable[str]) -> dict[str, Any]:
    """Settings by the names that a user writes, with those of the given losses alone."""
    flat: dict[str, Any] = {"loss": list(settings.get("losses", {}))}
    for loss in losses:
        of_loss = dict(settings["losses"][loss])
        for weight in ("weight", "final_weight"):
            flat[f"loss.{weight}s.{loss}"] = of_loss.pop(weight, None)
        flat |= dotted(of_loss, f"loss.{section_of(loss)}.")
    flat |= {f"content of {name}": value for name, value in settings.get("contents", {}).items()}
    rest = {name: value for name, value in settings.items() if name not in ("losses", "teacher_families", "contents")}
    renamed = {"caches": "fingerprints of cache", "finetune_caches": "fingerprints of finetune_cache"}
    return flat | dotted({renamed.get(name, name): _of_component(value) for name, value in rest.items()})


def _of_component(value: Any) -> Any:
    """A section whose component has its settings under its own name, as a user writes them."""
    if not isinstance(value, dict) or "name" not in value:
        return value
    return {section_of(str(value["name"])) if key == "settings" else key: inner for key, inner in value.items()}


def _is_beginning(stored: dict[str, Any], ours: dict[str, Any]) -> bool:
    """Whether two runs differ only in that ours has more steps."""
    but_steps = [
        {name: value for name, value in tree.items() if name not in ("steps", "epochs")} for tree in (stored, ours)
    ]
    return but_steps[0] == but_steps[1] and isinstance(stored.get("steps"), int) and stored["steps"] < ours["steps"]


@dataclass(frozen=True)
class _State:
    """Content of state.json.

    Attributes:
        logged: bytes of the log of these steps.
    """

    step: int = field(metadata={"low": 1})
    tensors: str
    sha256: str
    logged: int = field(metadata={"low": 0})
    settings: dict[str, Any]

    @classmethod
    def read(cls, out: Path) -> _State:
        """Read state.json of a run. Raises SpkdError where it is damaged."""
        try:
            state = FORMAT.open(read_json(out / STATE), STATE, lambda content, where: record(cls, content, where))
            _ = RunFacts.of(state.settings)
            return state
        except SpkdError as error:
            raise _damaged(out, error) from error


def _damaged(out: Path, reason: Exception) -> SpkdError:
    return SpkdError(f"{out}: damaged training state ({first_line(reason)}); remove the folder")


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
    name, data = f"state.{step}.safetensors", save_tensors(tensors)
    write_bytes(out / name, data)
    logged = (out / LOG).stat().st_size if (out / LOG).is_file() else 0
    write_json(out / STATE, FORMAT.seal(asdict(_State(step, name, digest.of_bytes(data), logged, settings))))
    _remove_states(out, name)


def resume(
    out: Path, module: TrainingModule, optimiser: torch.optim.Optimizer, miner: Miner | None, steps: int
) -> tuple[int, dict[str, Tensor]]:
    """Load a saved state.

    Returns:
        The step to continue from, 0 where nothing was saved; and the further tensors that were saved.
    Raises:
        SpkdError: the state is damaged.
    """
    if not (out / STATE).is_file():
        return 0, {}
    state = _State.read(out)
    try:
        if state.step >= steps or not re.fullmatch(r"state\.\d+\.safetensors", state.tensors):
            raise ValueError(f"step {state.step} of {steps}, tensors in {state.tensors[:40]}")
        data = read_bytes(out / state.tensors, MOST_OF_WEIGHTS)
        if digest.of_bytes(data) != state.sha256:
            raise ValueError(f"{state.tensors} is not the file that {STATE} describes")
        tensors = load_tensors(data)
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
        raise _damaged(out, error) from error
    log(f"continuing {out} at step {state.step}")
    return state.step, {k.removeprefix("extra."): v for k, v in tensors.items() if k.startswith("extra.")}


def logged(out: Path) -> int:
    """Bytes of the log of the steps that were saved."""
    return _State.read(out).logged if (out / STATE).is_file() else 0


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
    remove(out / STATE)
    _remove_states(out)
    remove_abandoned(out)


def drop_earlier(out: Path) -> None:
    """Remove the states before that of a finished run, and files that a kill left incomplete."""
    _remove_states(out, _State.read(out).tensors if (out / STATE).is_file() else "")
    remove_abandoned(out)


def _remove_states(out: Path, but: str = "") -> None:
    for old in out.glob(STATES):
        if old.name != but:
            remove(old)
