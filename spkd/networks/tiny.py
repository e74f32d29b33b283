"""Student for microcontrollers."""

from __future__ import annotations

from torch import Tensor, nn

from spkd.networks import padding
from spkd.networks.network import ConvBlock, Network, describe, statistics
from spkd.outputs.features import MELS

KERNEL = 5
DILATIONS = (1, 2, 3, 1, 2, 3)


class Separable(nn.Module):
    """Depthwise convolution over time and a dense layer (Howard et al., MobileNets, arXiv 1704.04861), with a shortcut.

    It takes 5 C + C^2 multiplications a frame, where a full convolution takes 5 C^2.
    """

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(
            channels, channels, KERNEL, padding=dilation * (KERNEL - 1) // 2, dilation=dilation, groups=channels
        )
        self.dense = ConvBlock(channels, channels)

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        return x + self.dense(self.depthwise(padding.mask(x, lengths)))


class Tiny(Network):
    """Strided convolution to 50 frames a second, six depthwise-separable blocks, statistics pooling, one linear layer.

    It has only operations that integer runtimes have: convolutions, ReLU, batch-norm and two moments. The architecture
    is this project's; C = 96 has 0.19 M parameters.

    Levels: frames (B, T / 2, 2C), stats (B, 4C), embedding (B, E).
    """

    default_channels = 96
    takes_lengths = True

    def __init__(self, channels: int = default_channels, embedding: int = 192) -> None:
        super().__init__()
        self.settings = {"channels": channels, "embedding": embedding}
        wide = 2 * channels
        self.levels = describe(wide, {"stats": 2 * wide, "embedding": embedding}, stride=2)
        self.stem = ConvBlock(MELS, channels, KERNEL, stride=2)
        self.blocks = nn.ModuleList(Separable(channels, dilation) for dilation in DILATIONS)
        self.widen = ConvBlock(channels, wide)
        self.project = nn.Linear(2 * wide, embedding)

    def run(self, features: Tensor, lengths: Tensor | None = None) -> dict[str, Tensor]:
        frames, lengths = self.stem(features, lengths), padding.strided(lengths, 2)
        for block in self.blocks:
            frames = block(frames, lengths)
        frames = self.widen(frames)
        stats = statistics(frames, lengths)
        return {"frames": frames.transpose(1, 2), "stats": stats, "embedding": self.project(stats)}
