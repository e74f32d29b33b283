"""Training runs of one command: a single run, or those of a sweep."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence

import torch

from spkd.corpus.settings import ViewConfig
from spkd.device import resolve
from spkd.errors import Interrupted, SpkdError, UsageError
from spkd.train.distributed import launched
from spkd.train.settings import TrainConfig
from spkd.train.trainer import Result, Validate, train

# Trials, manifest, name of the student and device -> a function that scores a student; None without trials.
MakeValidation = Callable[[str | None, str | None, str, torch.device], Validate | None]


def train_each(
    runs: Sequence[TrainConfig], make_validation: MakeValidation, is_sweep: bool, views: ViewConfig | None = None
) -> Iterator[tuple[TrainConfig, Result | SpkdError]]:
    """Train every run of a sweep, or a single one. Of several ranks, the first reports for all.

    Args:
        runs: settings of each run.
        make_validation: function that makes the validation of a run.
        is_sweep: whether the next run starts where one fails.
        views: views that the recipe of the settings extracts, if there is a recipe.
    Yields:
        The settings of a run, and its result or error.
    Raises:
        UsageError: a sweep on several ranks.
        SpkdError: a single run failed.
    """
    if is_sweep and launched():
        raise UsageError("-m: runs of a sweep cannot share ranks; start torchrun once for each")
    if launched() and os.environ.get("RANK", "0") != "0":
        sys.stdout = open(os.devnull, "w")
    for config in runs:
        try:
            valid = config.valid
            scorer = make_validation(valid.trials, valid.manifest, config.out, resolve(config.device))
            yield config, train(config, scorer, views)
        except Interrupted:
            raise
        except SpkdError as error:
            if not is_sweep:
                raise
            yield config, error
