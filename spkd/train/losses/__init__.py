"""Losses: what `spkd train --loss` takes. Each names the targets it needs and declares its settings; they add up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from spkd.config import DEFAULT_AAM_WEIGHT, LossConfig, fill
from spkd.errors import UsageError, did_you_mean
from spkd.outputs.target import Target
from spkd.registry import LOSSES
from spkd.train.losses.base import ChosenLoss, Loss, LossContext, LossInputs, NoSettings, TrainedClassifier


def with_default_losses(config: LossConfig, labelled: bool) -> LossConfig:
    """The losses of a run for which none is named: contrastive, and aam where there are labels.

    Args:
        labelled: whether any view has a speaker label.
    """
    if not labelled:
        return replace(config, names=["contrastive"])
    return replace(config, names=["contrastive", "aam"], weights={"aam": DEFAULT_AAM_WEIGHT} | config.weights)


def chosen_losses(config: LossConfig) -> dict[str, ChosenLoss]:
    """The losses of a run by name, with their settings, checked.

    Raises:
        UsageError: an unknown loss, one named twice, a weight or a setting of a loss that is not in use,
            or settings that it cannot have.
    """
    names = config.names
    for name in names:
        if name not in LOSSES:
            raise UsageError(f"--loss {name}{did_you_mean(name, LOSSES)}")
    if len(set(names)) < len(names):
        raise UsageError("--loss: name each loss once; weights are set by loss.weights.NAME")
    for key, given in (("weights", config.weights), ("final_weights", config.final_weights)):
        for name in given:
            if name not in names:
                raise UsageError(f"loss.{key}.{name}: that loss is not in use{did_you_mean(name, names)}")
    chosen = {}
    for name in dict.fromkeys([*names, *config.sections]):
        kind: type[Loss] = LOSSES[name]
        section = config.sections.get(name, {})
        settings: Any = fill(kind.Settings, f"loss.{name.replace('-', '_')}", section)
        if name in names:
            kind.check(settings)
            weights = config.weights.get(name, 1.0), config.final_weights.get(name)
            chosen[name] = ChosenLoss(name, kind, settings, *weights)
        elif typed := next((value.where for value in section.values() if value.command_line), None):
            raise UsageError(f"{typed}: --loss {name} is not in use{did_you_mean(name, names)}")
    return {name: chosen[name] for name in names}


def for_teachers(losses: dict[str, ChosenLoss], served: list[str]) -> dict[str, tuple[ChosenLoss, str]]:
    """Which terms a run has: name in the log -> (loss, suffix of its targets). Where several teachers are kept separate
    (targets `embedding@0`, `embedding@1`, ...), a loss that needs a teacher is there once for each."""
    suffixes = sorted({f"@{name.rsplit('@', 1)[1]}" for name in served if "@" in name})
    of = {name: suffixes if suffixes and loss.kind.needs else [""] for name, loss in losses.items()}
    return {f"{name}{suffix}": (loss, suffix) for name, loss in losses.items() for suffix in of[name]}


class WeightedSum(nn.Module):
    """The weighted sum of several losses, and its terms by name.

    Args:
        terms: see for_teachers.
        context: as for each loss.
    """

    def __init__(self, terms: dict[str, tuple[ChosenLoss, str]], context: LossContext) -> None:
        super().__init__()
        self._terms = terms
        self.losses = nn.ModuleDict(
            {
                key: loss.kind(loss.settings, replace(context, targets=_of(context.targets, suffix)))
                for key, (loss, suffix) in terms.items()
            }
        )

    def by_name(self) -> dict[str, Loss]:
        """The losses by their names in the log."""
        return cast(dict[str, Loss], dict(self.losses.items()))

    def forward(self, student: dict[str, Tensor], inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        terms, total = {}, torch.zeros((), device=inputs.label.device)
        for key, (loss, suffix) in self._terms.items():
            terms[key] = self.losses[key](student, replace(inputs, targets=_of(inputs.targets, suffix)))
            total = total + loss.weight_at(inputs.progress) * terms[key]
        return total, terms


def _of(targets: dict[str, Any], suffix: str) -> dict[str, Any]:
    """The targets of one teacher, under their plain names."""
    return {name.removesuffix(suffix): value for name, value in targets.items() if name.endswith(suffix)}


__all__ = [
    "ChosenLoss",
    "Loss",
    "LossContext",
    "LossInputs",
    "NoSettings",
    "Target",
    "TrainedClassifier",
    "WeightedSum",
    "chosen_losses",
    "for_teachers",
    "with_default_losses",
]
