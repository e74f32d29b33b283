"""Settings of the runs of one command: a single run, or a sweep with one run for every combination of values."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from spkd.config import Given, ambient, load
from spkd.errors import UsageError, listed
from spkd.progress import log
from spkd.train.settings import TrainConfig

MOST = 10_000  # runs
LONGEST = 255  # bytes in the name of a folder


def load_runs(
    overrides: Sequence[str], file: Path | None, recipe: str | None, from_run: Path | None, is_sweep: bool
) -> list[TrainConfig]:
    """Settings of each run of a command.

    Args:
        overrides: settings as `key=value`.
        from_run: folder of a run that is repeated, if any; only `overrides` change its settings.
        is_sweep: whether values with commas make several runs.
    Raises:
        UsageError: as `runs_of` and spkd.config.load, a recipe or a file beside a run to repeat, or no run there.
        SpkdError: the settings of the run were changed.
    """
    environ: Mapping[str, str] = os.environ
    if from_run is not None:
        for option, value in (("--recipe", recipe), ("--config", file)):
            if value is not None:
                raise UsageError(f"{option} and --from: choose one")
        from spkd.train.record import note_growth, settings_of

        # A file or variable would replace values of the run that are defaults, which run.yaml does not list.
        file, environ = settings_of(from_run), {}
        if others := ambient(TrainConfig):
            log(f"note: left out {listed(others)}: --from repeats the run with its own settings")

    def read(keys: Sequence[str], left_out: dict[str, str] | None = None) -> TrainConfig:
        return load(TrainConfig, keys, file, environ, recipe, left_out)

    try:
        runs = runs_of(overrides, read) if is_sweep else [read(overrides)]
    except UsageError as error:
        several = any("," in item and str(error).startswith(f"{item}: ") for item in overrides)
        if is_sweep or not several:
            raise
        raise UsageError(f"{error}; a run for each of several values: spkd train -m") from error
    if from_run is not None:
        from spkd.train.resume import note_contents

        note_growth(from_run, {cache for run in runs for cache in run.cache})
        note_contents(from_run, runs)
    return runs


def runs_of(overrides: Sequence[str], load: Callable[[list[str], dict[str, str]], TrainConfig]) -> list[TrainConfig]:
    """Settings of the runs of a sweep; the folder of each lies within `out` (default: sweep).

    Args:
        overrides: settings as `key=value`.
        load: makes settings of such a list, and puts those without effect into the dict, with the reasons.
    Raises:
        UsageError: as combinations and load, a setting that acts in no run, or two runs with the same settings.
    """
    runs, typed, left_out = [], [], []
    for keys, name in combinations(overrides):
        unused: dict[str, str] = {}
        run = load(keys, unused)
        out = f"{run.out if 'out' in run.given else 'sweep'}/{name}"
        runs.append(replace(run, out=out, given=run.given | {"out": Given(f"out={out}", out, True)}))
        typed.append(keys)
        left_out.append(unused)
    check_runs(runs, typed, left_out)
    return runs


def check_runs(
    runs: Sequence[TrainConfig], typed: Sequence[Collection[str]], left_out: Sequence[Mapping[str, str]]
) -> None:
    """Check that every setting of a sweep acts in a run, and that the runs differ. A note names what acts in some.

    Args:
        runs: settings of the runs, without those that have no effect.
        typed: settings of each run as they were typed.
        left_out: those of each run that have no effect -> the reason.
    Raises:
        UsageError: a setting that acts in no run, or two runs with the same settings.
    """
    for item, reason in {item: reason for unused in left_out for item, reason in unused.items()}.items():
        having = [unused for items, unused in zip(typed, left_out, strict=True) if item in items]
        if not (acting := sum(item not in unused for unused in having)):
            raise UsageError(f"{item} has no effect: {reason}")
        log(f"note: {item} acts in {acting} of {len(having)} runs; in the others {reason}")
    seen: dict[str, str] = {}
    for run in runs:
        if (other := seen.setdefault(repr(replace(run, out="")), run.out)) != run.out:
            raise UsageError(f"-m: {other} and {run.out} are the same run")


def combinations(overrides: Sequence[str]) -> Iterator[tuple[list[str], str]]:
    """Settings of each run of a sweep, and the name of its folder, after the settings that vary.

    `key=a,b` stands for a run with `key=a` and one with `key=b`. A list or mapping ([a,b], {a: b}) is a single value.

    Raises:
        UsageError: no setting varies, there are too many runs, or the name of a folder is too long or twice there.
    """
    choices = [_values(item) for item in overrides]
    varied = [index for index, values in enumerate(choices) if len(values) > 1]
    if not varied:
        raise UsageError("-m: no setting has several values, such as optim.lr=0.001,0.002")
    count = 1
    for values in choices:
        count *= len(values)
    if count > MOST:
        raise UsageError(f"-m: {count:,} runs; at most {MOST:,}")
    names = set[str]()
    for chosen in itertools.product(*choices):
        name = ",".join(chosen[index].replace("/", "_") for index in varied)
        if name in names or len(name.encode(errors="surrogateescape")) > LONGEST:
            reason = "two runs would have that folder" if name in names else f"a name of over {LONGEST} bytes"
            raise UsageError(f"-m: {name}: {reason}")
        names.add(name)
        yield list(chosen), name


def _values(item: str) -> list[str]:
    """The item with each of its values, which commas outside of brackets separate.

    Raises:
        UsageError: one of several values is empty.
    """
    key, equals, text = item.partition("=")
    if not equals or key == "out":
        return [item]
    values, depth = [""], 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == "," and not depth:
            values.append("")
        else:
            values[-1] += character
    if len(values) > 1 and "" in values:
        raise UsageError(f"-m: {item}: an empty value between commas")
    return [f"{key}={value}" for value in values]
