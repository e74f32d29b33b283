"""Sweeps: one run for every combination of values."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from spkd.errors import UsageError

MOST = 10_000  # runs


def combinations(overrides: Sequence[str]) -> Iterator[list[str]]:
    """Settings of each run of a sweep.

    `key=a,b` stands for a run with `key=a` and one with `key=b`. Each run has its own folder within `out`, named after
    the settings that vary. Lists and mappings ([a,b], {a: b}) are single values.

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
    out = next((item.removeprefix("out=") for item in reversed(overrides) if item.startswith("out=")), "sweep")
    for chosen in itertools.product(*choices):
        name = ",".join(chosen[index].replace("/", "_") for index in varied)
        yield [*(item for item in chosen if not item.startswith("out=")), f"out={out}/{name}"]


def _values(item: str) -> list[str]:
    key, equals, text = item.partition("=")
    if not equals or key in ("out", "loss", "cache") or text[:1] in "[{" or "," not in text:
        return [item]
    return [f"{key}={value}" for value in text.split(",")]
