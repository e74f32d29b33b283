"""Losses, by the name `spkd train --loss` takes. Each names the targets it needs; they add up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from spkd.cache import Target
from spkd.config import LossConfig
from spkd.errors import UsageError, did_you_mean
from spkd.train.losses.aam import AAM
from spkd.train.losses.base import Loss, Said
from spkd.train.losses.contrastive import CEILING, Contrastive
from spkd.train.losses.logits import KLD, Classifier, NonTarget
from spkd.train.losses.memo import MeMo
from spkd.train.losses.multilevel import MultiLevel
from spkd.train.losses.ntxent import NTXent
from spkd.train.losses.onestep import OneStep
from spkd.train.losses.regression import MSE, Cosine
from spkd.train.losses.relational import Relational

LOSSES: dict[str, type[Loss]] = {
    "aam": AAM,
    "cosine": Cosine,
    "mse": MSE,
    "contrastive": Contrastive,
    "relational": Relational,
    "ntxent": NTXent,
    "kld": KLD,
    "nontarget": NonTarget,
    "multilevel": MultiLevel,
    "one-step": OneStep,
    "memo": MeMo,
}


def check_names(names: Sequence[str], config: LossConfig) -> None:
    """Raises UsageError for an unknown loss, none at all, one named twice, or a weight of a loss not in use."""
    if not names:
        raise UsageError(f"name at least one loss: --loss {' | '.join(LOSSES)}")
    for name in names:
        if name not in LOSSES:
            raise UsageError(f"--loss {name}{did_you_mean(name, LOSSES)}")
    if len(set(names)) < len(names):
        raise UsageError("--loss: name each loss once; weights are set by loss.weights.NAME")
    for name in config.weights:
        if name not in names:
            raise UsageError(f"loss.weights.{name}: that loss is not in use{did_you_mean(name, names)}")


def check_values(config: LossConfig) -> None:
    """Raises UsageError for settings outside their range."""
    rise = config.margin_rise
    if len(rise) != 2 or not 0 <= rise[0] <= rise[1] <= 1:
        raise UsageError(f"loss.margin_rise={rise}: give two fractions of the run, e.g. [0.13,0.27]")
    if not 0 <= config.kd_rise <= 1:
        raise UsageError(f"loss.kd_rise={config.kd_rise}: a fraction of the run")
    if config.subcentres < 1:
        raise UsageError(f"loss.subcentres={config.subcentres}: at least 1")
    memo = config.memo
    for name in ("teacher_temperature", "momentum"):
        if len(getattr(memo, name)) != 2:
            raise UsageError(f"loss.memo.{name}={getattr(memo, name)}: give the first and the last value")
    for name in ("contrastive", "cross", "teacher", "teacher_rise", "head_frozen"):
        if getattr(memo, name) < 0:
            raise UsageError(f"loss.memo.{name}={getattr(memo, name)}: must not be negative")
    if memo.locals < 0 or min(memo.prototypes, memo.hidden, memo.bottleneck) < 1:
        raise UsageError("loss.memo: locals must not be negative, prototypes, hidden and bottleneck at least 1")
    positive = {name: getattr(config, name) for name in ("temperature", "kd_temperature", "scale")}
    positive |= {f"memo.{name}": getattr(memo, name) for name in ("student_temperature", "local_crop")}
    positive |= {"memo.teacher_temperature": min(memo.teacher_temperature)}
    for name, value in positive.items():
        if value <= 0:
            raise UsageError(f"loss.{name}={value}: must be positive")
    if not all(0 <= value <= 1 for value in (memo.centre, *memo.momentum)):
        raise UsageError("loss.memo: centre and momentum lie between 0 and 1")


def of_teachers(names: Sequence[str], served: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Which losses a run has: name in the log -> (loss, suffix of its targets). Where several teachers speak separately
    (targets `embedding@0`, `embedding@1`, ...), a loss that needs a teacher is there once for each."""
    suffixes = sorted({f"@{name.rsplit('@', 1)[1]}" for name in served if "@" in name})
    of = {name: suffixes if suffixes and LOSSES[name].needs else [""] for name in names}
    return {f"{name}{suffix}": (name, suffix) for name in names for suffix in of[name]}


class Sum(nn.Module):
    """The weighted sum of several losses, and its terms by name.

    Args:
        chosen: see of_teachers. The rest as for Loss.
    """

    def __init__(
        self,
        chosen: dict[str, tuple[str, str]],
        config: LossConfig,
        levels: dict[str, Target],
        targets: dict[str, Target],
        classes: int,
    ) -> None:
        super().__init__()
        self._chosen, self._weights = chosen, config.weights
        self.losses = nn.ModuleDict(
            {key: LOSSES[name](config, levels, _of(targets, suffix), classes) for key, (name, suffix) in chosen.items()}
        )

    def of(self) -> dict[str, Loss]:
        """The losses by their names in the log."""
        return cast(dict[str, Loss], dict(self.losses.items()))

    def forward(self, student: dict[str, Tensor], said: Said) -> tuple[Tensor, dict[str, Tensor]]:
        terms, total = {}, torch.zeros((), device=said.label.device)
        for key, (name, suffix) in self._chosen.items():
            terms[key] = self.losses[key](student, replace(said, targets=_of(said.targets, suffix)))
            total = total + self._weights.get(name, 1.0) * terms[key]
        return total, terms


def _of(targets: dict[str, Any], suffix: str) -> dict[str, Any]:
    """What one teacher says, under its plain names."""
    return {name.removesuffix(suffix): value for name, value in targets.items() if name.endswith(suffix)}


__all__ = [
    "AAM",
    "CEILING",
    "KLD",
    "LOSSES",
    "MSE",
    "Classifier",
    "Contrastive",
    "Cosine",
    "Loss",
    "MeMo",
    "MultiLevel",
    "NTXent",
    "NonTarget",
    "OneStep",
    "Relational",
    "Said",
    "Sum",
    "check_names",
    "check_values",
    "of_teachers",
]
