"""A speaker classifier whose classes are divided over the ranks: each holds some rows of the weight and computes its
columns of the logits, so that no rank needs memory for all speakers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spkd.train.distributed import summed, world

DIVISION = "division"  # attribute of a parameter that is divided


@dataclass(frozen=True)
class Division:
    """How the rows of a parameter are divided over the ranks.

    Attributes:
        rows: on all ranks. group: rows that stay together.
    """

    rows: int
    group: int = 1

    def part(self, number: int) -> slice:
        """The rows of one rank."""
        groups, ranks = self.rows // self.group, world().world
        return slice(groups * number // ranks * self.group, groups * (number + 1) // ranks * self.group)

    @property
    def own(self) -> slice:
        """The rows of this rank."""
        return self.part(world().number)


def divided(weight: Tensor, division: Division) -> nn.Parameter:
    """This rank's rows of a weight (rows, D) that every rank has made alike.

    Every rank computes the loss of the whole batch, so that gradients come `world` times through what they exchange.
    Those of other parameters are averaged over the ranks, these are not, so they are divided here.
    """
    ranks = world().world
    parameter = nn.Parameter(weight[division.own].clone())
    setattr(parameter, DIVISION, division)
    parameter.register_hook(lambda gradient: gradient / ranks)
    return parameter


def division_of(parameter: Tensor) -> Division | None:
    """None where a parameter is whole."""
    return getattr(parameter, DIVISION, None)


def divisions(module: nn.Module) -> dict[str, Division]:
    """The parameters of a module that are divided."""
    found = {name: division_of(parameter) for name, parameter in module.named_parameters()}
    return {name: division for name, division in found.items() if division is not None}


def whole(own: Tensor, division: Division) -> Tensor:
    """All rows of what is divided: (own rows, ...) -> (rows, ...). Every rank calls it."""
    parts = [division.part(number) for number in range(world().world)]
    counts = [part.stop - part.start for part in parts]
    padded = own.new_zeros(max(counts), *own.shape[1:])
    padded[: len(own)] = own.detach()
    gathered = [torch.empty_like(padded) for _ in parts]
    dist.all_gather(gathered, padded)
    return torch.cat([rows[:count] for rows, count in zip(gathered, counts, strict=True)])


def whole_state(state: Mapping[str, Tensor], divided_ones: Mapping[str, Division]) -> dict[str, Tensor]:
    """A state with all rows of what is divided. Every rank calls it."""
    return {name: whole(v, divided_ones[name]) if name in divided_ones else v for name, v in state.items()}


def own_state(state: Mapping[str, Tensor], divided_ones: Mapping[str, Division]) -> dict[str, Tensor]:
    """What this rank holds of a whole state."""
    return {name: v[divided_ones[name].own] if name in divided_ones else v for name, v in state.items()}


def cross_entropy_of_parts(logits: Tensor, label: Tensor, first: int) -> Tensor:
    """Cross-entropy over classes that are divided over the ranks: (), the mean over the labelled views of the batch,
    the same on every rank.

    Args:
        logits: (N, own classes) of the views of all ranks.
        label: (N,) among all classes; -1 where there is none.
        first: the first of this rank's classes.
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
    """Of parameters some of which may be divided: the norm over all ranks."""
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
