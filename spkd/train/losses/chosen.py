"""Losses of a run: the chosen losses with their settings, and their weighted sum."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from spkd.errors import UsageError, bracketed, did_you_mean
from spkd.registry import LOSSES
from spkd.train.losses.base import ChosenLoss, Loss, LossContext, LossInputs
from spkd.train.losses.nested import make_loss
from spkd.train.settings import DEFAULT_AAM_WEIGHT, LossConfig


def default_losses(labelled: bool) -> dict[str, Any]:
    """Settings of the losses of a run that names none: contrastive, and aam where there are labels.

    Args:
        labelled: whether any view has a speaker label.
    """
    if not labelled:
        return {"loss.names": ["contrastive"]}
    return {"loss.names": ["contrastive", "aam"], "loss.weights{aam}": DEFAULT_AAM_WEIGHT}


def chosen_losses(config: LossConfig) -> dict[str, ChosenLoss]:
    """Losses of a run by name, with their settings.

    Raises:
        UsageError: an unknown loss, the same loss twice, or invalid settings.
    """
    for name in config.names:
        if name not in LOSSES:
            raise UsageError(f"loss={name}: no such loss{bracketed('loss', name) or did_you_mean(name, LOSSES)}")
    if len(set(config.names)) < len(config.names):
        raise UsageError("loss: name each loss once; weights are set by loss.weights.NAME")
    chosen = {}
    for name in config.names:
        kind, settings = LOSSES[name], config.settings[name]
        settings.check()
        weights = config.weights.get(name, 1.0), config.final_weights.get(name)
        chosen[name] = ChosenLoss(name, kind, settings, *weights)
    return chosen


def for_teachers(losses: dict[str, ChosenLoss], served: list[str]) -> dict[str, tuple[ChosenLoss, str]]:
    """Terms of a run: name in the log -> (loss, suffix of its targets).

    Where several teachers are kept separate (targets `embedding@0`, `embedding@1`, ...), a loss that needs a teacher
    has one term for each.
    """
    suffixes = sorted({f"@{name.rsplit('@', 1)[1]}" for name in served if "@" in name})
    of = {name: suffixes if suffixes and loss.kind.needs else [""] for name, loss in losses.items()}
    return {f"{name}{suffix}": (loss, suffix) for name, loss in losses.items() for suffix in of[name]}


class WeightedSum(nn.Module):
    """Weighted sum of several losses, and its terms by name.

    Args:
        terms: losses by name in the log; see for_teachers.
    """

    def __init__(self, terms: dict[str, tuple[ChosenLoss, str]], context: LossContext) -> None:
        super().__init__()
        self._terms = terms
        self.losses = nn.ModuleDict(
            {
                key: make_loss(loss, replace(context, targets=_of(context.targets, suffix)))
                for key, (loss, suffix) in terms.items()
            }
        )

    def by_name(self) -> dict[str, Loss]:
        """Losses by their names in the log."""
        return cast(dict[str, Loss], dict(self.losses.items()))

    def forward(self, student: dict[str, Tensor], inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        terms, total = {}, torch.zeros((), device=inputs.label.device)
        for key, (loss, suffix) in self._terms.items():
            targets, alignments = (_of(of, suffix) for of in (inputs.targets, inputs.alignments))
            terms[key] = self.losses[key](student, replace(inputs, targets=targets, alignments=alignments))
            total = total + loss.weight_at(inputs.progress) * terms[key]
        return total, terms


def _of(targets: dict[str, Any], suffix: str) -> dict[str, Any]:
    """Targets of one teacher, by their names without the suffix."""
    return {name.removesuffix(suffix): value for name, value in targets.items() if name.endswith(suffix)}
