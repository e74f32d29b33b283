"""ECAPA-TDNN (Desplanques, Thienpondt and Demuynck, Interspeech 2020, arXiv 2005.07143)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spkd.networks import padding
from spkd.networks.network import ConvBlock, Network, describe
from spkd.outputs.features import MELS

SCALE = 8  # number of Res2 groups (the paper's)
FLOOR = 1e-6  # least variance: keeps the gradient of the root finite where a channel is constant
BOTTLENECK = 128  # width of the bottleneck of squeeze-excitation and of the attention (the paper's)


class Res2(nn.Module):
    """Res2 convolution: groups of channels in a cascade; each convolves its input plus the previous group's output."""

    def __init__(
        self, channels: int, dilation: int, reflect: bool = False, scale: int = SCALE, kernel: int = 3
    ) -> None:
        super().__init__()
        width = channels // scale
        self.blocks = nn.ModuleList(
            ConvBlock(width, width, kernel, dilation, reflect=reflect) for _ in range(scale - 1)
        )

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        first, *groups = x.chunk(len(self.blocks) + 1, 1)
        outputs = [first]
        for i, (block, group) in enumerate(zip(self.blocks, groups, strict=True)):
            outputs.append(block(group if i == 0 else group + outputs[-1], lengths))
        return torch.cat(outputs, 1)


class SqueezeExcitation(nn.Module):
    """Squeeze-excitation: scales the channels of (B, C, T) by a function of their means over time."""

    def __init__(self, channels: int, bottleneck: int = BOTTLENECK) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.Conv1d(channels, bottleneck, 1), nn.ReLU(), nn.Conv1d(bottleneck, channels, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        return x * self.gate(padding.mean(x, lengths))


class SERes2Block(nn.Module):
    """SE-Res2 block: convolution, Res2 convolution, convolution and squeeze-excitation, with a shortcut."""

    def __init__(self, channels: int, dilation: int, kind: type[Res2] = Res2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [
                ConvBlock(channels, channels),
                kind(channels, dilation),
                ConvBlock(channels, channels),
                SqueezeExcitation(channels),
            ]
        )

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        out = x
        for layer in self.layers:
            out = layer(out, lengths)
        return x + out


class AttentiveStatistics(nn.Module):
    """Mean and standard deviation with channel-dependent attention: (B, D, T) -> (B, 2D).

    Args:
        channels: width D of the frames.
        floor: least variance.
        bottleneck: width of the bottleneck of the attention.
        context: whether the attention takes mean and deviation of the whole view in addition to the frames.
    """

    def __init__(self, channels: int, floor: float = FLOOR, bottleneck: int = BOTTLENECK, context: bool = True) -> None:
        super().__init__()
        self._floor, self._context = floor, context
        inputs = 3 * channels if context else channels
        self.attention = nn.Sequential(ConvBlock(inputs, bottleneck), nn.Tanh(), nn.Conv1d(bottleneck, channels, 1))

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        seen = x
        if self._context:
            variance, mean = padding.var_mean(x, lengths)
            seen = torch.cat([x, mean.expand_as(x), variance.clamp_min(self._floor).sqrt().expand_as(x)], 1)
        weights = padding.softmax(self.attention(seen), lengths)
        mean = (weights * x).sum(-1)
        # Centred before squaring: E[x^2] - E[x]^2 cancels in half precision.
        variance = (weights * (x - mean[..., None]).square()).sum(-1)
        return torch.cat([mean, variance.clamp_min(self._floor).sqrt()], 1)


class ECAPA(Network):
    """ECAPA-TDNN: convolution, three SE-Res2 blocks (dilations 2, 3, 4), joined into frames of width 3C, attentive
    pooling.

    The paper's widths are C = 512 (with embedding 192: 6.2 M parameters) and 1024; C = 128 has 0.8 M.

    Args:
        channels: width C.
        embedding: width E of the embedding.

    Levels: frames (B, T, 3C), stats (B, 6C), embedding (B, E).
    """

    default_channels = 512
    takes_lengths = True

    def __init__(self, channels: int = default_channels, embedding: int = 192, mels: int = MELS) -> None:
        if channels % SCALE:
            raise ValueError(f"student.channels={channels}: ecapa needs a multiple of {SCALE}")
        super().__init__()
        self.settings = {"channels": channels, "embedding": embedding}
        wide = 3 * channels
        self.levels = describe(wide, {"stats": 2 * wide, "embedding": embedding})
        self.stem = ConvBlock(mels, channels, 5)
        self.blocks = nn.ModuleList(SERes2Block(channels, dilation) for dilation in (2, 3, 4))
        self.join: nn.Module = ConvBlock(wide, wide)
        self.pool = nn.ModuleList([AttentiveStatistics(wide), nn.BatchNorm1d(2 * wide)])
        self.project: nn.Module = nn.Linear(2 * wide, embedding)

    def run(self, features: Tensor, lengths: Tensor | None = None) -> dict[str, Tensor]:
        x = self.stem(features, lengths)
        outputs = []
        for block in self.blocks:
            x = block(x, lengths)
            outputs.append(x)
        frames = self.join(torch.cat(outputs, 1))
        attention, norm = self.pool
        stats = norm(attention(frames, lengths))
        return {"frames": frames.transpose(1, 2), "stats": stats, "embedding": self.project(stats)}
