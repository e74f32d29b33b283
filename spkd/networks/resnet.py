"""ResNets for speakers (He et al., CVPR 2016), with the pooling and widths of WeSpeaker and VoxCeleb's r-vectors.

Tensors are named and shaped as in WeSpeaker, so its state dictionaries can be loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from spkd.networks import padding
from spkd.networks.network import Network, describe
from spkd.outputs.features import MELS

FLOOR = 1e-7  # number added to the variance before its root, as in WeSpeaker
Block = Callable[[int, int, tuple[int, int]], nn.Module]  # (inputs, width, stride over (bands, time)) -> block


def sample_statistics(frames: Tensor, lengths: Tensor | None = None, floor: float = FLOOR) -> Tensor:
    """Mean and standard deviation of the sample over the valid steps, as in WeSpeaker: (B, D, T) -> (B, 2D).

    The variance of a single frame is 0.
    """
    variance, mean = padding.var_mean(frames, lengths, correction=1)
    return torch.cat([mean, (variance + floor).sqrt()], 1)[..., 0]


class SampleStatistics(nn.Module):
    """Layer of `sample_statistics`."""

    def __init__(self, floor: float = FLOOR) -> None:
        super().__init__()
        self._floor = floor

    def forward(self, frames: Tensor, lengths: Tensor | None) -> Tensor:
        return sample_statistics(frames, lengths, self._floor)


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with a shortcut around them.

    Args:
        stride: stride over (bands, time).
    """

    def __init__(self, inputs: int, width: int, stride: tuple[int, int]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = shortcut(inputs, width, stride)
        self._step = stride[1]

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        out = relu(self.bn1(self.conv1(padding.mask(x, lengths))))
        after = padding.strided(lengths, self._step)
        out = self.weighted(self.bn2(self.conv2(padding.mask(out, after))), after)
        return relu(out + self.shortcut(x))

    def weighted(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        """Values to add to the shortcut; subclasses weight them."""
        return x


class PointwiseConv(nn.Conv2d):
    """1 x 1 convolution with `stride` over (bands, time), which selects its inputs before it convolves.

    In channels-last memory, oneDNN writes past the end of its buffer in the weight gradient of a strided 1 x 1
    convolution with fewer than 16 channels (https://github.com/uxlfoundation/oneDNN/issues/6035).
    """

    def __init__(self, inputs: int, outputs: int, stride: tuple[int, int]) -> None:
        super().__init__(inputs, outputs, 1, bias=False)
        self._steps = stride

    def forward(self, x: Tensor) -> Tensor:
        bands, time = self._steps
        return super().forward(x[:, :, ::bands, ::time])


def shortcut(inputs: int, outputs: int, stride: tuple[int, int]) -> nn.Sequential:
    """Shortcut: the identity where input and output have the same shape, else a 1 x 1 convolution with batch-norm."""
    if stride == (1, 1) and inputs == outputs:
        return nn.Sequential()
    return nn.Sequential(PointwiseConv(inputs, outputs, stride), nn.BatchNorm2d(outputs))


class Pooled(Network):
    """Base class of WeSpeaker's networks: pooling of frames over time, and one or two linear layers."""

    def add_pooling(
        self, wide: int, embedding: int, pool: nn.Module | None = None, pooled: int = 2, segment: bool = False
    ) -> dict[str, int]:
        """Make the layers. Returns the widths of the vectors that they give, by name.

        Args:
            wide: width D of the frames.
            pool: pooling layer that takes frames (B, D, T) and their lengths; None: mean and standard deviation.
            pooled: width of its output over D.
            segment: whether the embedding comes from a second linear layer.
        """
        self.pool = SampleStatistics() if pool is None else pool
        self.seg_1 = nn.Linear(pooled * wide, embedding)
        self._segment, vectors = segment, {"stats": pooled * wide, "embedding": embedding}
        if segment:
            self.seg_bn_1, self.seg_2 = nn.BatchNorm1d(embedding, affine=False), nn.Linear(embedding, embedding)
            vectors["segment.a"] = embedding
        return vectors

    def levels_of(self, frames: Tensor, lengths: Tensor | None) -> dict[str, Tensor]:
        """Levels by name, from frames (B, D, T) and the number (B,) of valid ones."""
        stats = self.pool(frames, lengths)
        segment = self.seg_1(stats)
        levels = {"frames": frames.transpose(1, 2), "stats": stats, "embedding": segment}
        if self._segment:
            levels |= {"segment.a": segment, "embedding": self.seg_2(self.seg_bn_1(relu(segment)))}
        return levels


class Network2d(Pooled):
    """Base class of 2-d networks: a 3 x 3 convolution, four stages of blocks, pooling over time, linear.

    The stages have the widths C, 2C, 4C, 8C; all but the first halve bands and time.

    Args:
        blocks: function that makes the blocks, for each stage.
        depths: number of blocks in each stage.
        channels: width C.
        expansion: channels of the output of a block over its width.
        pool: see `Pooled.add_pooling`.
        pooled: see `Pooled.add_pooling`.
        segment: see `Pooled.add_pooling`.

    Levels: frames (B, T / 8, D), stats, segment.a (where there is one), embedding.
    """

    takes_lengths = True

    def __init__(
        self,
        blocks: Sequence[Block],
        depths: Sequence[int],
        channels: int,
        embedding: int,
        expansion: int = 1,
        pool: nn.Module | None = None,
        pooled: int = 2,
        mels: int = MELS,
        segment: bool = False,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        inputs = channels
        for number, (block, depth) in enumerate(zip(blocks, depths, strict=True)):
            width, step = channels * 2**number, min(number, 1) + 1
            first = block(inputs, width, (step, step))
            inputs = expansion * width
            rest = (block(inputs, width, (1, 1)) for _ in range(depth - 1))
            setattr(self, f"layer{number + 1}", nn.ModuleList([first, *rest]))
        wide = inputs * (mels // 8)
        self.levels = describe(wide, self.add_pooling(wide, embedding, pool, pooled, segment), stride=8)
        self.widest = channels * expansion * mels

    def run(self, features: Tensor, lengths: Tensor | None = None) -> dict[str, Tensor]:
        x, lengths = self.encode(features[:, None], lengths)
        return self.levels_of(x.flatten(1, 2), lengths)

    def encode(self, x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Output (B, C, F / 8, T / 8) of the stages for (B, 1, F, T), and the lengths after them."""
        x = self.stem(x, lengths)
        for number in range(1, 5):
            x, lengths = self.stage(number, x, lengths)
        return x, lengths

    def stem(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        return relu(self.bn1(self.conv1(padding.mask(x, lengths))))

    def stage(self, number: int, x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        first, *rest = getattr(self, f"layer{number}")
        x, lengths = first(x, lengths), padding.strided(lengths, 1 if number == 1 else 2)
        for block in rest:
            x = block(x, lengths)
        return x, lengths


class ResNet34(Network2d):
    """ResNet34: 3 x 3 convolution, stages of 3, 4, 6, 3 blocks (widths C, 2C, 4C, 8C, all but the first halving bands
    and time), mean and standard deviation over time, linear.

    C = 32 is WeSpeaker's width (6.6 M parameters at embedding 256), C = 16 MeMo's (2.0 M).

    Levels: frames (B, T / 8, 80C), stats (B, 160C), embedding (B, E).
    """

    default_channels = 32

    def __init__(self, channels: int = default_channels, embedding: int = 192) -> None:
        super().__init__([BasicBlock] * 4, (3, 4, 6, 3), channels, embedding)
        self.settings = {"channels": channels, "embedding": embedding}
