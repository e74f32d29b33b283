"""Sweeps: one run for every combination of values."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from spkd.errors import UsageError
from spkd.train.settings import TrainConfig

MOST = 10_000  # runs


def runs_of(overrides: Sequence[str], load: Callable[[list[str]], TrainConfig]) -> list[TrainConfig]:
    """Settings of the runs of a sweep; the folder of each lies within `out` (default: sweep).

    Args:
        overrides: settings as `key=value`.
        load: makes settings of such a list.
    Raises:
        UsageError: as combinations and load.
    """
    runs = [(load(keys), name) for keys, name in combinations(overrides)]
    return [replace(run, out=f"{run.out if 'out' in run.given else 'sweep'}/{name}") for run, name in runs]


def combinations(overrides: Sequence[str]) -> Iterator[tuple[list[str], str]]:
    """Settings of each run of a sweep, and the name of its folder, after the settings that vary.

    `key=a,b` stands for a run with `key=a` and one with `key=b`. Lists and mappings ([a,b], {a: b}) are single values.

    Args:
        overrides: settings as `key=value`.
    Raises:
        UsageError: no setting varies, or there are too many runs.
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
    for chosen in itertools.product(*choices):
        yield list(chosen), ",".join(chosen[index].replace("/", "_") for index in varied)


def _values(item: str) -> list[str]:
    key, equals, text = item.partition("=")
    if not equals or key in ("out", "loss", "cache") or text[:1] in "[{" or "," not in text:
        return [item]
    return [f"{key}={value}" for value in text.split(",")]
