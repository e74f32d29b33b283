"""What every student network is."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

FRAME_LEVEL = "frames"


class Network(nn.Module):
    """fbank (B, T, 80) -> levels by name: `frames` (B, T, D), every other level (B, D).

    Attributes:
        levels: width D of every level.
        settings: what `build` needs to make the same network again.
    """

    levels: dict[str, int]
    settings: dict[str, int]

    def forward(self, fbank: Tensor) -> dict[str, Tensor]:
        """Mean-normalise per crop (the field's usual front end), then run the network."""
        return self.run((fbank - fbank.mean(1, keepdim=True)).transpose(1, 2))

    @abstractmethod
    def run(self, features: Tensor) -> dict[str, Tensor]:
        """Levels from mean-normalised features (B, 80, T)."""


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def statistics(frames: Tensor) -> Tensor:
    """Mean and standard deviation over time: (B, D, T) -> (B, 2D)."""
    variance, mean = torch.var_mean(frames, dim=-1, correction=0)
    # The floor keeps the gradient of the root finite where a channel is constant.
    return torch.cat([mean, variance.clamp_min(1e-6).sqrt()], 1)


class ConvBlock(nn.Sequential):
    """1-d convolution (same length), ReLU, batch-norm: the layer of the TDNN family."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, dilation: int = 1) -> None:
        padding = dilation * (kernel - 1) // 2
        super().__init__(
            nn.Conv1d(inputs, outputs, kernel, padding=padding, dilation=dilation),
            nn.ReLU(),
            nn.BatchNorm1d(outputs),
        )
