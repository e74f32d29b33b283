"""Trainings of one command: one run, or those of a sweep."""

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

# Trials, manifest, name of the student and device -> what scores a student; None where no trials are named.
MakeValidation = Callable[[str | None, str | None, str, torch.device], Validate | None]


def train_each(
    runs: Sequence[TrainConfig], make_validation: MakeValidation, is_sweep: bool, views: ViewConfig | None = None
) -> Iterator[tuple[TrainConfig, Result | SpkdError]]:
    """Train every run of a sweep, or the only one. The first of several ranks reports for all.

    Args:
        runs: their settings.
        make_validation: makes what scores a student.
        is_sweep: whether a run that fails leaves the others alone.
        views: those that the recipe of the settings extracts, if there is one.
    Yields:
        The settings of a run, and what came of it.
    Raises:
        UsageError: a sweep on several ranks.
        SpkdError: a run that is alone failed.
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
