"""ResNet34 for speakers (He et al., CVPR 2016, with the pooling and widths of WeSpeaker and VoxCeleb's r-vectors)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from spkd.features import MELS
from spkd.students.network import Network, describe

DEPTHS = (3, 4, 6, 3)
FLOOR = 1e-7  # added to the variance before its root, as in WeSpeaker


def sample_statistics(frames: Tensor) -> Tensor:
    """Mean and deviation of the sample over time, as WeSpeaker pools: (B, D, T) -> (B, 2D). A single frame has none."""
    variance, mean = torch.var_mean(frames, dim=-1, correction=min(frames.shape[-1] - 1, 1))
    return torch.cat([mean, (variance + FLOOR).sqrt()], 1)


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut; `stride` over (bands, time)."""

    def __init__(self, inputs: int, outputs: int, stride: tuple[int, int]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != (1, 1) or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
        return relu(out + self.shortcut(x))


class ResNet34(Network):
    """3 x 3 convolution, stages of 3, 4, 6, 3 blocks (widths C, 2C, 4C, 8C, all but the first halving bands and time),
    mean and standard deviation over time, linear.

    Tensors are named and shaped as in WeSpeaker's ResNet34 (one embedding layer), so its state dictionaries load. C =
    32 is its width (6.6 M parameters at embedding 256), MeMo's is 16 (2.0 M).

    Levels: frames (B, T / 8, 80C), stats (B, 160C), embedding (B, E).
    """

    default_channels = 32

    def __init__(self, channels: int = default_channels, embedding: int = 192) -> None:
        super().__init__()
        self.settings = {"channels": channels, "embedding": embedding}
        wide = 8 * channels * (MELS // 8)
        self.levels = describe(wide, {"stats": 2 * wide, "embedding": embedding}, stride=8)
        self.conv1 = nn.Conv2d(1, channels, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        inputs = channels
        for stage, depth in enumerate(DEPTHS):
            outputs, step = channels * 2**stage, 1 if stage == 0 else 2
            rest = (BasicBlock(outputs, outputs, (1, 1)) for _ in range(depth - 1))
            setattr(self, f"layer{stage + 1}", nn.Sequential(BasicBlock(inputs, outputs, (step, step)), *rest))
            inputs = outputs
        self.seg_1 = nn.Linear(2 * wide, embedding)

    def run(self, features: Tensor) -> dict[str, Tensor]:
        x = relu(self.bn1(self.conv1(features[:, None])))
        for stage in range(len(DEPTHS)):
            x = getattr(self, f"layer{stage + 1}")(x)
        frames = x.flatten(1, 2)
        stats = sample_statistics(frames)
        return {"frames": frames.transpose(1, 2), "stats": stats, "embedding": self.seg_1(stats)}
