"""Sharding of a speaker classifier: its classes are divided over the ranks.

Each rank holds some rows of the weight and computes the logits of these classes, so that no rank needs memory for all
speakers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spkd.train.distributed import summed, world

DIVISION = "division"  # attribute of a parameter whose rows are divided


@dataclass(frozen=True)
class Division:
    """Division of the rows of a parameter over the ranks.

    Attributes:
        rows: number of rows on all ranks.
        group: number of neighbouring rows that stay on one rank.
    """

    rows: int
    group: int = 1

    def part(self, number: int) -> slice:
        """Rows of one rank."""
        groups, ranks = self.rows // self.group, world().world
        return slice(groups * number // ranks * self.group, groups * (number + 1) // ranks * self.group)

    @property
    def own(self) -> slice:
        """Rows of this rank."""
        return self.part(world().number)


def divided(weight: Tensor, division: Division) -> nn.Parameter:
    """This rank's rows of a weight (rows, D) that every rank initialised equally.

    Every rank computes the loss of the whole batch, so the exchange between the ranks sums the gradient `world` times.
    Gradients of other parameters are averaged over the ranks; these are not, so they are divided here.
    """
    ranks = world().world
    parameter = nn.Parameter(weight[division.own].clone())
    setattr(parameter, DIVISION, division)
    parameter.register_hook(lambda gradient: gradient / ranks)
    return parameter


def division_of(parameter: Tensor) -> Division | None:
    """Division of a parameter; None where it is not divided."""
    return getattr(parameter, DIVISION, None)


def divisions(module: nn.Module) -> dict[str, Division]:
    """Divisions of the divided parameters of a module, by name."""
    by_name = {name: division_of(parameter) for name, parameter in module.named_parameters()}
    return {name: division for name, division in by_name.items() if division is not None}


def whole(local: Tensor, division: Division) -> Tensor:
    """Rows of all ranks from those of this rank: (rows of this rank, ...) -> (rows, ...). Every rank calls this."""
    parts = [division.part(number) for number in range(world().world)]
    counts = [part.stop - part.start for part in parts]
    padded = local.new_zeros(max(counts), *local.shape[1:])
    padded[: len(local)] = local.detach()
    gathered = [torch.empty_like(padded) for _ in parts]
    dist.all_gather(gathered, padded)
    return torch.cat([rows[:count] for rows, count in zip(gathered, counts, strict=True)])


def whole_state(state: Mapping[str, Tensor], divided_ones: Mapping[str, Division]) -> dict[str, Tensor]:
    """State with the rows of all ranks. Every rank calls this."""
    return {name: whole(v, divided_ones[name]) if name in divided_ones else v for name, v in state.items()}


def own_state(state: Mapping[str, Tensor], divided_ones: Mapping[str, Division]) -> dict[str, Tensor]:
    """State with the rows of this rank alone, from a whole state."""
    return {name: v[divided_ones[name].own] if name in divided_ones else v for name, v in state.items()}


def cross_entropy_of_parts(logits: Tensor, label: Tensor, first: int) -> Tensor:
    """Cross-entropy () over classes that are divided over the ranks.

    It is the mean over the labelled views of the whole batch, equal on every rank.

    Args:
        logits: (N, classes of this rank) of the views of all ranks.
        label: (N,) class of each view among all classes, -1 where it has none.
        first: number of this rank's first class.
    """
    highest = logits.detach().amax(1)
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    is_own = (label >= first) & (label < first + logits.shape[1])
    target = logits.gather(1, torch.where(is_own, label - first, 0)[:, None])[:, 0]
    mass = (logits - highest[:, None]).exp().sum(1)
    mass, target = summed(torch.stack([mass, torch.where(is_own, target - highest, 0.0)]))
    labelled = label >= 0
    return torch.where(labelled, mass.log() - target, 0.0).sum() / labelled.sum().clamp_min(1)


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Norm () of the gradients of parameters, over all ranks where they are divided."""
    gradients: dict[bool, list[Tensor]] = {False: [], True: []}
    for parameter in parameters:
        if parameter.grad is not None:
            gradients[division_of(parameter) is not None].append(parameter.grad)
    norm = nn.utils.get_total_norm(gradients[False])
    if not gradients[True]:
        return norm
    squares = nn.utils.get_total_norm(gradients[True]).square()
    dist.all_reduce(squares)
    return (norm.to(squares.device).square() + squares).sqrt()
