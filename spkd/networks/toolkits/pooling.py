"""Pooling over time of WeSpeaker and 3D-Speaker, with their names of tensors: (B, D, T) -> (B, D) or (B, 2D)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spkd.networks import padding
from spkd.networks.resnet import FLOOR, SampleStatistics

BOTTLENECK = 128


class Mean(nn.Module):
    """Mean over time: (B, D, T) -> (B, D)."""

    def forward(self, frames: Tensor, lengths: Tensor | None) -> Tensor:
        return padding.mean(frames, lengths)[..., 0]


class Deviation(SampleStatistics):
    """Standard deviation of the sample over time: (B, D, T) -> (B, D)."""

    def forward(self, frames: Tensor, lengths: Tensor | None) -> Tensor:
        return super().forward(frames, lengths).chunk(2, 1)[1]


class Attentive(nn.Module):
    """Attentive statistics (Okabe, Koshinaka and Shinoda, Interspeech 2018) with tanh: those of ECAPA-TDNN without
    batch-norm.

    Args:
        width: width D of the frames.
        context: whether the attention also takes mean and deviation of the whole view.
    """

    def __init__(self, width: int, context: bool = False) -> None:
        super().__init__()
        self.linear1 = nn.Conv1d(3 * width if context else width, BOTTLENECK, 1)
        self.linear2 = nn.Conv1d(BOTTLENECK, width, 1)
        self._context = context

    def forward(self, frames: Tensor, lengths: Tensor | None) -> Tensor:
        seen = frames
        if self._context:
            variance, mean = padding.var_mean(frames, lengths, correction=1)
            seen = torch.cat([frames, mean.expand_as(frames), (variance + FLOOR).sqrt().expand_as(frames)], 1)
        weights = padding.softmax(self.linear2(self.linear1(seen).tanh()), lengths)
        return weighted_statistics(frames, weights, FLOOR)


class AttentiveReLU(nn.Module):
    """Attentive statistics with ReLU and batch-norm (WeSpeaker's ASP, SpeechBrain's ResNet)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(
            nn.Conv1d(width, BOTTLENECK, 1), nn.ReLU(), nn.BatchNorm1d(BOTTLENECK), nn.Conv1d(BOTTLENECK, width, 1)
        )

    def forward(self, frames: Tensor, lengths: Tensor | None) -> Tensor:
        return weighted_statistics(frames, padding.softmax(self.attention(frames), lengths), 1e-5)


def weighted_statistics(frames: Tensor, weights: Tensor, floor: float) -> Tensor:
    """Weighted mean and standard deviation over time: (B, D, T) -> (B, 2D).

    Args:
        frames: (B, D, T).
        weights: (B, D, T) or (B, 1, T), summing to 1 over time.
        floor: least variance.
    """
    mean = (weights * frames).sum(-1)
    # Centred before squaring: E[x^2] - E[x]^2 cancels.
    variance = (weights * (frames - mean[..., None]).square()).sum(-1)
    return torch.cat([mean, variance.clamp_min(floor).sqrt()], 1)


def make_pooling(name: str, width: int, context: bool = False, floor: float = FLOOR) -> tuple[nn.Module, int]:
    """Pooling layer by its name in WeSpeaker's settings, and the width of its output over that of its input.

    Args:
        name: TSTP, TAP, TSDP or ASTP.
        context: whether the attention also takes mean and deviation of the whole view.
        floor: number added to a variance before its root.
    Raises:
        ValueError: an unknown name.
    """
    if name == "TAP":
        return Mean(), 1
    if name == "TSDP":
        return Deviation(floor), 1
    if name == "TSTP":
        return SampleStatistics(floor), 2
    if name == "ASTP":
        return Attentive(width, context), 2
    raise ValueError(f"pooling_func {name} (known here: TSTP, TAP, TSDP, ASTP)")
