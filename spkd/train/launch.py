"""Training runs of one command: a single run, or those of a sweep."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence

import torch

from spkd import config as settings
from spkd.corpus.settings import ViewConfig
from spkd.device import resolve
from spkd.errors import SpkdError, UsageError
from spkd.registry import COMMANDS
from spkd.train.distributed import launched
from spkd.train.settings import TrainConfig
from spkd.train.sweep import check_runs
from spkd.train.trainer import Result, Validate, opened, train

# Trials, manifest, name of the student and device -> a function that scores a student; None without trials.
MakeValidation = Callable[[str | None, str | None, str, str, torch.device], Validate | None]


def train_each(
    runs: Sequence[TrainConfig], make_validation: MakeValidation, is_sweep: bool, recipe: str | None = None
) -> Iterator[tuple[TrainConfig, Result | SpkdError]]:
    """Train every run of a sweep, or a single one. Of several ranks, the first reports for all.

    Args:
        make_validation: function that makes the validation of a run.
        is_sweep: whether the next run starts where one fails.
        recipe: name of the recipe of the settings, if any; it says which views the cache should have.
    Yields:
        The settings of a run, and its result or error.
    Raises:
        UsageError: a sweep on several ranks, or as check_runs.
        SpkdError: a single run failed.
    """
    if is_sweep and launched():
        raise UsageError("-m: runs of a sweep cannot share ranks; start torchrun once for each")
    if launched() and os.environ.get("RANK", "0") != "0":
        sys.stdout = open(os.devnull, "w")
    views = None if recipe is None else _views_of(recipe)
    for config in _in_effect(runs) if is_sweep else runs:
        try:
            valid = config.valid
            scorer = make_validation(valid.trials, valid.manifest, valid.vad, config.out, resolve(config.device))
            yield config, train(config, scorer, views)
        except SpkdError as error:
            if not is_sweep:
                raise
            yield config, error


def _views_of(recipe: str) -> ViewConfig:
    """The views that a recipe extracts; its notes belong to `spkd extract`."""
    with _silence():
        view: ViewConfig = settings.load(COMMANDS["extract"], file=settings.recipe(recipe), environ={}).view
    return view


def _in_effect(runs: Sequence[TrainConfig]) -> list[TrainConfig]:
    """Settings of each run of a sweep without those that have no effect with its caches and losses."""
    found, typed, left_out = [], [], []
    for run in runs:
        unused: dict[str, str] = {}
        typed.append({given.where for given in run.given.values() if given.typed})
        try:
            with _silence():
                used = opened(run, unused).config
        except SpkdError:  # reported when this run is started
            used, unused = run, {}
        found.append(used if unused else run)
        left_out.append(unused)
    check_runs(found, typed, left_out)
    return found


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Print nothing within the block: its notes belong elsewhere."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
