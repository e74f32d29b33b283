"""Losses, by the name `spkd train --loss` takes. Each names the targets it needs; they add up."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from spkd.config import LossConfig
from spkd.errors import UsageError, did_you_mean
from spkd.train.losses.aam import AAM
from spkd.train.losses.base import Loss, Said
from spkd.train.losses.contrastive import Contrastive
from spkd.train.losses.regression import MSE, Cosine

LOSSES: dict[str, type[Loss]] = {"aam": AAM, "cosine": Cosine, "mse": MSE, "contrastive": Contrastive}


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


class Sum(nn.Module):
    """The weighted sum of several losses, and its terms by name."""

    def __init__(self, losses: dict[str, Loss], weights: dict[str, float]) -> None:
        super().__init__()
        self.losses = nn.ModuleDict(losses)
        self._weights = weights

    def forward(self, student: dict[str, Tensor], said: Said) -> tuple[Tensor, dict[str, Tensor]]:
        terms = {name: loss(student, said) for name, loss in self.losses.items()}
        total = sum((self._weights.get(name, 1.0) * term for name, term in terms.items()), start=0.0)
        assert isinstance(total, Tensor)
        return total, terms


__all__ = ["AAM", "LOSSES", "MSE", "Contrastive", "Cosine", "Loss", "Said", "Sum", "check_names"]
