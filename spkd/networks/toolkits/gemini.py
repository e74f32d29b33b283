"""Gemini DF-ResNet of WeSpeaker: DF-ResNet (Liu et al., Interspeech 2022) with the strides of Golden Gemini (Liu et
al., IEEE/ACM TASLP 2024, arXiv 2312.03620), which keep more steps than bands. Tensors are named as in WeSpeaker."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import Tensor, nn
from torch.nn.functional import relu

from spkd.networks import padding
from spkd.networks.network import describe
from spkd.networks.resnet import Pooled
from spkd.networks.toolkits.pooling import make_pooling
from spkd.outputs.features import MELS

STRIDES = ((2, 1), (2, 2), (2, 1), (2, 1))  # over (bands, time), before each stage
EXPANSION = 4  # width of the depthwise convolution over that of the block


class InvertedBottleneck(nn.Module):
    """1 x 1 convolution to the fourfold width, depthwise 3 x 3 convolution, 1 x 1 convolution back, and a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        wide = EXPANSION * width
        self.conv1, self.bn1 = nn.Conv2d(width, wide, 1, bias=False), nn.BatchNorm2d(wide)
        self.conv2 = nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False)
        self.bn2 = nn.BatchNorm2d(wide)
        self.conv3, self.bn3 = nn.Conv2d(wide, width, 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        out = padding.mask(relu(self.bn1(self.conv1(x))), lengths)
        out = relu(self.bn2(self.conv2(out)))
        return relu(self.bn3(self.conv3(out)) + x)


class GeminiDFResNet(Pooled):
    """Gemini DF-ResNet: 3 x 3 convolution, and four stages of inverted bottlenecks, each after a convolution that
    halves the bands; the second one also halves time.

    Args:
        widths: width of the first convolution and of each stage.
        depths: number of blocks in each stage.
        pooling: WeSpeaker's name of the pooling.
        segment: whether the embedding comes from a second linear layer.

    Levels: frames (B, T / 2, D), stats, segment.a (where there is one), embedding.
    """

    takes_lengths = True

    def __init__(
        self,
        widths: Sequence[int],
        depths: Sequence[int],
        embedding: int,
        mels: int = MELS,
        pooling: str = "TSTP",
        segment: bool = False,
    ) -> None:
        super().__init__()
        first, *rest = widths
        stem = nn.Sequential(nn.Conv2d(1, first, 3, padding=1, bias=False), nn.BatchNorm2d(first), nn.ReLU())
        self.downsample_layers = nn.ModuleList([stem])
        stages: list[nn.ModuleList] = []
        for inputs, width, depth, stride in zip(widths, rest, depths, STRIDES, strict=False):
            conv = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
            self.downsample_layers.append(nn.Sequential(conv, nn.BatchNorm2d(width)))
            stages.append(nn.ModuleList(InvertedBottleneck(width) for _ in range(depth)))
        self.stages = nn.ModuleList(stages)
        wide = widths[-1] * (mels // prod(bands for bands, _ in STRIDES))
        pool, pooled = make_pooling(pooling, wide)
        steps = prod(time for _, time in STRIDES)
        self.levels = describe(wide, self.add_pooling(wide, embedding, pool, pooled, segment), stride=steps)
        self.widest = EXPANSION * rest[0] * mels // STRIDES[0][0]

    def run(self, features: Tensor, lengths: Tensor | None = None) -> dict[str, Tensor]:
        stem, *halvings = self.downsample_layers
        x = stem(padding.mask(features[:, None], lengths))
        for halving, stage, (_, time) in zip(halvings, self.stages, STRIDES, strict=True):
            x, lengths = halving(padding.mask(x, lengths)), padding.strided(lengths, time)
            for block in stage.children():
                x = block(x, lengths)
        return self.levels_of(x.flatten(1, 2), lengths)
