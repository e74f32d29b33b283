"""Trained module: a student and its losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_swa_avg_fn, get_swa_multi_avg_fn

from spkd.networks.network import forward_crops
from spkd.students import Network
from spkd.train.losses.base import LossInputs
from spkd.train.losses.chosen import WeightedSum


class TrainingModule(nn.Module):
    """Student network and the sum of its losses.

    Args:
        network: the student.
        objective: the sum of the losses.
        swa_fraction: last fraction of the run whose weights are averaged (stochastic weight averaging). Toolkits
            average their last checkpoints; here every step counts.
    """

    def __init__(self, network: Network, objective: WeightedSum, swa_fraction: float = 0.0) -> None:
        super().__init__()
        self.network, self.objective, self._swa_fraction = network, objective, swa_fraction
        self.averaged = AveragedModel(network, multi_avg_fn=_average, use_buffers=True) if swa_fraction > 0 else None
        for loss in objective.by_name().values():
            loss.join(network)

    def forward(
        self, crops: list[Tensor], inputs: LossInputs, finetune_batch: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Total loss () and its terms by name.

        Args:
            crops: input features (B, T_i, F) of each crop.
            inputs: further inputs of the losses.
            finetune_batch: (N, T_0, F) input features of the views that take the path through the adapters; they share
                a batch with the first crops, which then take the path without adapters.
        """
        if finetune_batch is None:
            first, *others = forward_crops(self.network, crops)
        else:
            batch = torch.cat([crops[0], finetune_batch])
            split = [len(crops[0]), len(finetune_batch)]
            levels = self.network(batch, torch.arange(len(batch), device=batch.device) >= split[0])
            parts = {name: values.split(split) for name, values in levels.items()}
            first, finetuned = ({name: part[i] for name, part in parts.items()} for i in range(2))
            others = forward_crops(self.network, crops[1:])
            inputs = replace(inputs, finetune_levels=finetuned)
        # Losses are in fp32: bf16 has cosines to 1/256 only, which scales of 32 and temperatures of 0.05 enlarge.
        device = crops[0].device.type
        precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        with torch.autocast(device, enabled=False):
            return self.objective(first, replace(inputs, crops=crops, other_levels=others, precision=precision))

    def after_step(self, progress: float) -> None:
        """Called after every step of the optimiser, when a fraction `progress` of the run is over."""
        for loss in self.objective.by_name().values():
            loss.after_step(self.network, progress)
        if self.averaged is not None and progress > 1.0 - self._swa_fraction:
            self.averaged.update_parameters(self.network)

    def trained_network(self) -> Network:
        """Network to keep at the end of the run: averaged over its last fraction, or as the losses give it."""
        network = self.network if self.averaged is None else cast(Network, self.averaged.module)
        for loss in self.objective.by_name().values():
            network = loss.trained_network(network)
        return network

    def by_network(self) -> list[list[nn.Parameter]]:
        """Trained parameters of each network: their gradients are clipped separately, as if each had an optimiser."""
        losses = self.objective.by_name().values()
        partners = [list(loss.partner.parameters()) for loss in losses if loss.partner is not None]
        taken = {id(p) for group in partners for p in group}
        rest = [p for p in self.parameters() if p.requires_grad and id(p) not in taken]
        return [rest, *([p for p in group if p.requires_grad] for group in partners)]


def _average(averaged: Sequence[Tensor], current: Sequence[Tensor], count: Tensor | int) -> None:
    """Add values to running means of `count` earlier values, all of one type, in place.

    torch's function for GPUs fails at integers, such as the number of batches that batch-norm counts.
    """
    if averaged[0].is_floating_point():
        get_swa_multi_avg_fn()(averaged, current, count)
        return
    for mean, value in zip(averaged, current, strict=True):
        mean.copy_(get_swa_avg_fn()(mean, value, count))
