"""ResNets of teachers: those of WeSpeaker and 3D-Speaker by depth, SimAM-ResNets, and that of SpeechBrain.

Tensors are named as in WeSpeaker, unless a class says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from spkd.networks import padding
from spkd.networks.network import Network, describe
from spkd.networks.resnet import FLOOR, BasicBlock, Network2d, shortcut
from spkd.networks.toolkits.pooling import AttentiveReLU, make_pooling
from spkd.outputs.features import MELS

# Number of blocks of each stage; from 50 layers on, blocks are bottlenecks.
DEPTHS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    221: (6, 16, 48, 3),
    293: (10, 20, 64, 3),
}


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions with a shortcut; the output has four times the width."""

    def __init__(self, inputs: int, width: int, stride: tuple[int, int]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.shortcut = shortcut(inputs, 4 * width, stride)

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        out = padding.mask(relu(self.bn1(self.conv1(x))), lengths)
        out = relu(self.bn2(self.conv2(out)))
        return relu(self.bn3(self.conv3(out)) + self.shortcut(x))


class SimAMBlock(BasicBlock):
    """Basic block whose output is weighted by SimAM (Yang et al., ICML 2021).

    Every number is weighted by its distance from the mean of its channel.
    """

    def weighted(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        mean = padding.mean(x, lengths).mean(2, keepdim=True)
        distance = (x - mean).square()
        total = padding.mask(distance, lengths).sum((2, 3), keepdim=True)
        steps = torch.full((len(x),), x.shape[-1], device=x.device) if lengths is None else lengths
        variance = total / (steps * x.shape[2] - 1)[:, None, None, None]
        return x * torch.sigmoid(distance / (4 * (variance + 1e-4)) + 0.5)


class ResNet(Network2d):
    """ResNet of 18 to 293 layers.

    Args:
        layers: a key of DEPTHS.
        pooling: WeSpeaker's name of the pooling.
        segment: whether the embedding comes from a second linear layer.
        floor: number added to the variance before its root.
    """

    def __init__(
        self,
        layers: int,
        channels: int = 32,
        embedding: int = 256,
        mels: int = MELS,
        pooling: str = "TSTP",
        segment: bool = False,
        floor: float = FLOOR,
    ) -> None:
        block, expansion = (Bottleneck, 4) if layers >= 50 else (BasicBlock, 1)
        pool, pooled = make_pooling(pooling, 8 * expansion * channels * (mels // 8), floor=floor)
        super().__init__([block] * 4, DEPTHS[layers], channels, embedding, expansion, pool, pooled, mels, segment)


class SimAMResNet(Network2d):
    """ResNet of 34 or 100 layers with SimAM blocks and attentive pooling."""

    depths = {34: (3, 4, 6, 3), 100: (6, 16, 24, 3)}

    def __init__(self, layers: int, channels: int = 64, embedding: int = 256, mels: int = MELS) -> None:
        pool = AttentiveReLU(8 * channels * (mels // 8))
        super().__init__([SimAMBlock] * 4, self.depths[layers], channels, embedding, pool=pool, mels=mels)


class PreActivated(nn.Module):
    """SpeechBrain's block: batch-norm and ReLU before each of three convolutions, then squeeze-excitation.

    Args:
        stride: stride over bands and time.
        gated: whether the block has squeeze-excitation.
    """

    def __init__(self, inputs: int, width: int, stride: int, gated: bool) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width, 1, bias=False)
        self.downsample = shortcut(inputs, width, (stride, stride))
        self.stride = stride
        if gated:
            self.se = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.Sigmoid())
        self._gated = gated

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        after = padding.strided(lengths, self.stride)
        out = self.conv1(padding.mask(relu(self.bn1(x)), lengths))
        out = self.conv2(padding.mask(relu(self.bn2(out)), after))
        out = self.conv3(relu(self.bn3(out)))
        if self._gated:
            out = out * self.se(padding.mean(out, after).mean((2, 3)))[..., None, None]
        return out + self.downsample(x)


class SpeechBrainResNet(Network):
    """SpeechBrain's pre-activated ResNet: four stages, squeeze-excitation in the first two, attentive pooling, linear
    between batch-norms.

    Its convolutions run over (time, bands); here they run over (bands, time).

    Args:
        channels: width of each stage.
        depths: number of blocks in each stage.
        strides: stride of each stage, over bands and time.
        activation: non-linearity after the first convolution.
    """

    takes_lengths = True

    def __init__(
        self,
        channels: Sequence[int],
        depths: Sequence[int],
        embedding: int,
        mels: int = MELS,
        strides: Sequence[int] = (1, 2, 2, 2),
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        self.activation1 = activation()
        inputs = channels[0]
        for i, (width, depth, stride) in enumerate(zip(channels, depths, strides, strict=True)):
            first = PreActivated(inputs, width, stride, gated=i < 2)
            rest = (PreActivated(width, width, 1, gated=i < 2) for _ in range(depth - 1))
            setattr(self, f"layer{i + 1}", nn.ModuleList([first, *rest]))
            inputs = width
        step = prod(strides)
        wide = inputs * -(-mels // step)
        self.pool = AttentiveReLU(wide)
        self.norm_stats = nn.BatchNorm1d(2 * wide)
        self.fc_embed, self.norm_embed = nn.Linear(2 * wide, embedding), nn.BatchNorm1d(embedding)
        self.levels = describe(wide, {"stats": 2 * wide, "embedding": embedding}, stride=step)
        self.widest = channels[0] * mels

    def run(self, features: Tensor, lengths: Tensor | None = None) -> dict[str, Tensor]:
        x = self.activation1(self.bn1(self.conv1(padding.mask(features[:, None], lengths))))
        for i in range(4):
            for block in getattr(self, f"layer{i + 1}"):
                x, lengths = block(x, lengths), padding.strided(lengths, block.stride)
        frames = x.flatten(1, 2)
        stats = self.norm_stats(self.pool(frames, lengths))
        return {
            "frames": frames.transpose(1, 2),
            "stats": stats,
            "embedding": self.norm_embed(self.fc_embed(stats)),
        }
