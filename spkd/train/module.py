"""Trained module: a student and its losses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor, nn

from spkd.device import compiled
from spkd.networks.network import forward_crops
from spkd.students import Network
from spkd.train.losses.base import LossInputs
from spkd.train.losses.chosen import WeightedSum
from spkd.train.settings import GRAPHS


class TrainingModule(nn.Module):
    """Student network and the sum of its losses.

    Args:
        swa_fraction: last fraction of the last phase whose weights are averaged (stochastic weight averaging). Toolkits
            average their last checkpoints; here every step counts.
    """

    def __init__(self, network: Network, objective: WeightedSum, swa_fraction: float = 0.0) -> None:
        super().__init__()
        self.network, self.objective, self._swa_fraction = network, objective, swa_fraction
        self._run: Callable[..., dict[str, Tensor]] = network.__call__
        self.averaged = _RunningMean(network) if swa_fraction > 0 else None
        for loss in objective.by_name().values():
            loss.join(network)

    def compile_student(self, setting: str) -> None:
        """Compile the student's steps of training.

        Validation and mining, with views of any length, run the network as it is.

        Args:
            setting: value of `compile`, other than false.
        """
        # Graphs have fixed shapes: one for each length of crops, of which there are few.
        options = {"mode": GRAPHS, "dynamic": False} if setting == GRAPHS else {}
        self._run = compiled(self.network.forward, f"compile={setting}", **options)

    def forward(
        self, crops: list[Tensor], inputs: LossInputs, finetune_batch: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Total loss () and its terms by name.

        Args:
            crops: input features (B, T_i, F) of each crop.
            finetune_batch: (N, T_0, F) input features of the views that take the path through the adapters; they share
                a batch with the first crops, which then take the path without adapters.
        """
        if finetune_batch is None:
            first, *others = forward_crops(self._run, crops)
        else:
            batch = torch.cat([crops[0], finetune_batch])
            split = [len(crops[0]), len(finetune_batch)]
            levels = self._run(batch, split[0])
            parts = {name: values.split(split) for name, values in levels.items()}
            first, finetuned = ({name: part[i] for name, part in parts.items()} for i in range(2))
            others = forward_crops(self._run, crops[1:])
            inputs = replace(inputs, finetune_levels=finetuned)
        # Losses are in fp32: bf16 has cosines to 1/256 only, which scales of 32 and temperatures of 0.05 enlarge.
        device = crops[0].device.type
        precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        with torch.autocast(device, enabled=False):
            return self.objective(first, replace(inputs, crops=crops, other_levels=others, precision=precision))

    def after_step(self, progress: float, last_phase: float) -> None:
        """Called after every step of the optimiser.

        Args:
            progress: fraction of the steps before large-margin fine-tuning that is over.
            last_phase: fraction of the last phase that is over: of the fine-tuning, or of the run where there is none;
                at most 0 before that phase.
        """
        for loss in self.objective.by_name().values():
            loss.after_step(self.network, progress)
        if self.averaged is not None and last_phase > 1.0 - self._swa_fraction:
            self.averaged.add(self.network)

    def trained_network(self) -> Network:
        """Network to keep, averaged over the steps so far of the last fraction, or as the losses give it."""
        network = self.network
        if self.averaged is not None and self.averaged.count:  # before, it has its initial weights
            network = self.averaged.network
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


class _RunningMean(nn.Module):
    """Running mean of a network: of its weights and statistics; integers, such as counts of batches, are the latest.

    The number of networks in the mean is kept on the host: on the device, every step would wait for it.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network, self.count = copy.deepcopy(network).requires_grad_(False), 0

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.count)

    def set_extra_state(self, state: Tensor) -> None:
        self.count = int(state)

    @torch.no_grad()
    def add(self, network: Network) -> None:
        self.count += 1
        means, values = (list(chain(n.parameters(), n.buffers())) for n in (self.network, network))
        pairs = list(zip(means, values, strict=True))
        floats = [(mean, value) for mean, value in pairs if mean.is_floating_point()]
        torch._foreach_lerp_([mean for mean, _ in floats], [value for _, value in floats], 1 / self.count)
        for mean, value in pairs:
            if not mean.is_floating_point():
                mean.copy_(value)
