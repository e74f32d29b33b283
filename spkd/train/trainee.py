"""What is trained: a student and the losses that teach it."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from spkd.models import Network
from spkd.models.network import each
from spkd.train.losses import Said, Sum


class Trainee(nn.Module):
    """A student network and the sum of its losses.

    average: the last fraction of the run whose weights are averaged into what is kept, as toolkits average their last
    checkpoints; here every step counts.
    """

    def __init__(self, network: Network, objective: Sum, average: float = 0.0) -> None:
        super().__init__()
        self.network, self.objective, self._average = network, objective, average
        self.averaged = AveragedModel(network, use_buffers=True) if average > 0 else None
        for loss in objective.of().values():
            loss.join(network)

    def forward(
        self, crops: list[Tensor], said: Said, tuning: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The total loss and its terms by name.

        Args:
            crops: features (B, T_i, F) of each crop. tuning: (N, T_0, F) of the views that take the path through the
                adapters; they share one batch with the first crops, which then take the path without.
        """
        if tuning is None:
            first, *others = each(self.network, crops)
        else:
            batch = torch.cat([crops[0], tuning])
            split = [len(crops[0]), len(tuning)]
            levels = self.network(batch, torch.arange(len(batch), device=batch.device) >= split[0])
            parts = {name: values.split(split) for name, values in levels.items()}
            first, tuned = ({name: part[i] for name, part in parts.items()} for i in range(2))
            others = each(self.network, crops[1:])
            said = replace(said, tuned=tuned)
        return self.objective(first, replace(said, crops=crops, others=others))

    def after_step(self, done: float) -> None:
        for loss in self.objective.of().values():
            loss.after_step(self.network, done)
        if self.averaged is not None and done > 1.0 - self._average:
            self.averaged.update_parameters(self.network)

    def kept(self) -> Network:
        """The network the run was for."""
        network = self.network if self.averaged is None else cast(Network, self.averaged.module)
        for loss in self.objective.of().values():
            network = loss.kept(network)
        return network

    def clipped_apart(self) -> list[list[nn.Parameter]]:
        """Parameters by network: each network's gradient is clipped by its own norm, as if each had an optimiser."""
        losses = self.objective.of().values()
        partners = [list(loss.partner.parameters()) for loss in losses if loss.partner is not None]
        taken = {id(p) for group in partners for p in group}
        rest = [p for p in self.parameters() if p.requires_grad and id(p) not in taken]
        return [rest, *([p for p in group if p.requires_grad] for group in partners)]
