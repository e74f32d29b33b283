"""Res2Net (Gao et al., IEEE TPAMI 2021, arXiv 1904.01169), ERes2Net (Chen et al., Interspeech 2023, arXiv 2305.12838)
and ERes2NetV2 (Chen et al., Interspeech 2024, arXiv 2406.02167), with the names of 3D-Speaker and WeSpeaker."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.nn.functional import hardtanh

from spkd.networks import padding
from spkd.networks.resnet import Network2d, shortcut
from spkd.networks.toolkits.pooling import make_pooling

DEPTHS = (3, 4, 6, 3)


def clipped(x: Tensor) -> Tensor:
    """ReLU up to 20."""
    return hardtanh(x, 0.0, 20.0)


class Fusion(nn.Module):
    """Attentional feature fusion: x and y are summed with a weight between 0 and 2 for every number of each."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.local_att = nn.Sequential(
            nn.Conv2d(2 * channels, channels // 4, 1),
            nn.BatchNorm2d(channels // 4),
            nn.SiLU(),
            nn.Conv2d(channels // 4, channels, 1),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        weight = self.local_att(torch.cat([x, y], 1)).tanh()
        return x * (1 + weight) + y * (1 - weight)


class Res2Block(nn.Module):
    """1 x 1 convolution, a cascade of 3 x 3 convolutions over groups of channels, 1 x 1 convolution, and a shortcut.

    Args:
        stride: stride over (bands, time).
        base: channels of a group at width 64.
        scale: number of groups.
        expansion: channels of the output over the width.
        fused: whether a group and the previous one are joined by attention; else they are added.
        untouched: number of groups at the end that no convolution takes.
    """

    def __init__(
        self,
        inputs: int,
        width: int,
        stride: tuple[int, int],
        base: int,
        scale: int,
        expansion: int,
        fused: bool = False,
        untouched: int = 0,
    ) -> None:
        super().__init__()
        group, count = int(width * (base / 64.0)), scale - untouched
        self.conv1 = nn.Conv2d(inputs, group * scale, 1, stride, bias=False)
        self.bn1 = nn.BatchNorm2d(group * scale)
        self.convs = nn.ModuleList(nn.Conv2d(group, group, 3, padding=1, bias=False) for _ in range(count))
        self.bns = nn.ModuleList(nn.BatchNorm2d(group) for _ in range(count))
        if fused:
            self.fuse_models = nn.ModuleList(Fusion(group) for _ in range(scale - 1))
        self.conv3 = nn.Conv2d(group * scale, width * expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * expansion)
        self.shortcut = shortcut(inputs, width * expansion, stride)
        self._step, self._fused, self._scale = stride[1], fused, scale

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        after = padding.strided(lengths, self._step)
        groups = clipped(self.bn1(self.conv1(x))).chunk(self._scale, 1)
        outputs: list[Tensor] = []
        for i, (group, conv, norm) in enumerate(zip(groups, self.convs, self.bns, strict=False)):
            if i:
                group = self.fuse_models[i - 1](outputs[-1], group) if self._fused else outputs[-1] + group
            outputs.append(clipped(norm(conv(padding.mask(group, after)))))
        outputs += groups[len(outputs) :]
        return clipped(self.bn3(self.conv3(torch.cat(outputs, 1))) + self.shortcut(x))


class Res2Net(Network2d):
    """Res2 stages without fusion; the last group of every block goes around the convolutions.

    C = 32 is WeSpeaker's base model, C = 64 the large one.

    Args:
        pooling: WeSpeaker's name of the pooling.
        segment: whether the embedding comes from a second linear layer.
    """

    EXPANSION = 2

    def __init__(
        self, channels: int, embedding: int, base: int, scale: int, mels: int, pooling: str, segment: bool
    ) -> None:
        def block(inputs: int, width: int, stride: tuple[int, int]) -> nn.Module:
            return Res2Block(inputs, width, stride, base, scale, self.EXPANSION, untouched=1)

        pool, pooled = make_pooling(pooling, 8 * self.EXPANSION * channels * (mels // 8))
        super().__init__([block] * 4, DEPTHS, channels, embedding, self.EXPANSION, pool, pooled, mels, segment)


class _Res2Network(Network2d):
    """Base class of ERes2Net and ERes2NetV2.

    Args:
        pooling: WeSpeaker's name of the pooling.
        segment: whether the embedding comes from a second linear layer.
        floor: number added to a variance before its root.
    """

    def __init__(
        self,
        channels: int,
        embedding: int,
        base: int,
        scale: int,
        expansion: int,
        mels: int,
        pooling: str,
        segment: bool,
        floor: float,
    ) -> None:
        def plain(inputs: int, width: int, stride: tuple[int, int]) -> nn.Module:
            return Res2Block(inputs, width, stride, base, scale, expansion)

        def fused(inputs: int, width: int, stride: tuple[int, int]) -> nn.Module:
            return Res2Block(inputs, width, stride, base, scale, expansion, True)

        pool, pooled = make_pooling(pooling, 8 * expansion * channels * (mels // 8), floor=floor)
        blocks = [plain, plain, fused, fused]
        super().__init__(blocks, DEPTHS, channels, embedding, expansion, pool, pooled, mels, segment)
        self.add_fusions(channels * expansion)

    @abstractmethod
    def add_fusions(self, wide: int) -> None:
        """Make the layers that join the stages.

        Args:
            wide: channels of the output of the first stage.
        """


def halve(channels: int) -> nn.Conv2d:
    """Convolution that halves bands and steps, and doubles the channels."""
    return nn.Conv2d(channels, 2 * channels, 3, 2, 1, bias=False)


class ERes2Net(_Res2Network):
    """Res2 stages whose outputs are fused from the first to the last.

    C = 32 with groups of 32 is the base model, C = 64 the large one; 3D-Speaker's model of 200 k speakers has C = 64,
    base 24, scale 3, expansion 4.
    """

    def add_fusions(self, wide: int) -> None:
        self.layer1_downsample, self.fuse_mode12 = halve(wide), Fusion(2 * wide)
        self.layer2_downsample, self.fuse_mode123 = halve(2 * wide), Fusion(4 * wide)
        self.layer3_downsample, self.fuse_mode1234 = halve(4 * wide), Fusion(8 * wide)

    def encode(self, x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        x, after = self.stage(1, self.stem(x, lengths), lengths)
        joined = x
        halvings = (self.layer1_downsample, self.layer2_downsample, self.layer3_downsample)
        fusions = (self.fuse_mode12, self.fuse_mode123, self.fuse_mode1234)
        for number, (halving, fusion) in enumerate(zip(halvings, fusions, strict=True), 2):
            below = halving(padding.mask(joined, after))
            x, after = self.stage(number, x, after)
            joined = fusion(x, below)
        return joined, after


class ERes2NetV2(_Res2Network):
    """Res2 stages of which only the last two are fused."""

    def add_fusions(self, wide: int) -> None:
        self.layer3_ds, self.fuse34 = halve(4 * wide), Fusion(8 * wide)

    def encode(self, x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        x = self.stem(x, lengths)
        for number in (1, 2, 3):
            x, lengths = self.stage(number, x, lengths)
        below = self.layer3_ds(padding.mask(x, lengths))
        x, lengths = self.stage(4, x, lengths)
        return self.fuse34(x, below), lengths
