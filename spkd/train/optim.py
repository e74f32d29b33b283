"""Optimiser, learning-rate schedule and clipping of gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from spkd.registry import OPTIMISERS, NoSettings
from spkd.train.module import TrainingModule
from spkd.train.settings import LargeMarginConfig, OptimConfig, SGDSettings
from spkd.train.sharding import division_of, gradient_norm

Groups = list[dict[str, Any]]  # groups of parameters, with their weight decay


def learning_rate(config: OptimConfig, step: int, steps: int, large_margin: LargeMarginConfig | None = None) -> float:
    """Learning rate of a step.

    After a linear warm-up from zero, it is half a cosine from `lr` down to `final_lr` at the last step, or `lr`
    throughout. The exponential schedule (WeSpeaker's) begins with the run and is multiplied by the warm-up. Steps after
    `steps` are those of large-margin fine-tuning, which has its own exponential schedule.

    Args:
        step: number of the step, from 0.
        steps: number of steps before large-margin fine-tuning.
        large_margin: settings of large-margin fine-tuning; None without it.
    """
    if step >= steps and large_margin is not None:
        done = (step - steps) / max(large_margin.steps - 1, 1)
        return large_margin.lr * (large_margin.final_lr / large_margin.lr) ** done
    warm = min((step + 1) / config.warmup, 1.0) if config.warmup else 1.0
    if config.schedule == "constant":
        return config.lr * warm
    if config.schedule == "exponential":
        return float(warm * config.lr * (config.final_lr / config.lr) ** (step / max(steps - 1, 1)))
    if step < config.warmup:
        return config.lr * warm
    done = (step - config.warmup) / max(steps - 1 - config.warmup, 1)
    return config.final_lr + 0.5 * (config.lr - config.final_lr) * (1.0 + math.cos(math.pi * min(done, 1.0)))


def make_optimiser(config: OptimConfig, module: nn.Module) -> torch.optim.Optimizer:
    """Chosen optimiser. Biases and parameters of normalisation layers have no weight decay.

    All parameters are updated in one pass, where torch has such an optimiser for the device.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    fused = all(p.device.type in ("cpu", "cuda") for p in trained)
    optimiser: torch.optim.Optimizer = OPTIMISERS[config.name](groups, config.lr, fused, config.settings)
    return optimiser


def make_adamw(groups: Groups, lr: float, fused: bool, settings: NoSettings) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, ICLR 2019)."""
    return torch.optim.AdamW(groups, lr=lr, fused=fused)


def make_sgd(groups: Groups, lr: float, fused: bool, settings: SGDSettings) -> torch.optim.Optimizer:
    """Stochastic gradient descent with momentum 0.9."""
    sgd = torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=settings.nesterov, fused=fused)
    # torch's fused SGD fails where the first gradient of a parameter comes after those of others (the prototypes of
    # MeMo are trained from a later step on). A momentum of zero has the same first step as none.
    for group in groups:
        for parameter in group["params"]:
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


def clip_gradients(config: OptimConfig, module: TrainingModule) -> None:
    """Scale down gradients whose norm exceeds `optim.clip`, separately for each network or for each tensor."""
    if config.clip <= 0:
        return
    for network in module.by_network():
        parameters = [p for p in network if p.grad is not None]
        if config.clip_by == "network":
            groups = [parameters]
        else:
            _clip_each(config.clip, [p for p in parameters if division_of(p) is None])
            groups = [[p] for p in parameters if division_of(p) is not None]
        for group in filter(None, groups):
            nn.utils.clip_grads_with_norm_(group, config.clip, gradient_norm(group))


def _clip_each(largest: float, parameters: list[nn.Parameter]) -> None:
    """Scale down each gradient whose norm exceeds `largest`, as torch's function does, in a few operations for all."""
    if not parameters:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    scales = (largest / (torch.stack(torch._foreach_norm(gradients)) + 1e-6)).clamp_max(1.0)
    torch._foreach_mul_(gradients, scales.unbind())
