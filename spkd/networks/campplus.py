"""CAM++ (Wang et al., "CAM++: a fast and efficient network for speaker verification using context-aware masking",
Interspeech 2023, arXiv 2303.00332)."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from spkd.networks import padding
from spkd.networks.network import Network, describe
from spkd.networks.resnet import BasicBlock, SampleStatistics
from spkd.outputs.features import MELS

DENSE = ((12, 1), (24, 2), (16, 2))  # layers and dilation of each dense block
SEGMENT = 100  # frames over which the context is averaged, in addition to the mean over the whole view


def normalised(channels: int, active: bool = True, affine: bool = True) -> nn.Sequential:
    """Batch-norm, followed by ReLU where `active`."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(batchnorm=nn.BatchNorm1d(channels, affine=affine))
    if active:
        layers["relu"] = nn.ReLU()
    return nn.Sequential(layers)


class FrontEnd(nn.Module):
    """Residual 2-d convolutions that reduce the bands to an eighth and keep time: (B, 80, T) -> (B, 10C, T)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.layer1, self.layer2 = (
            nn.ModuleList([BasicBlock(channels, channels, (2, 1)), BasicBlock(channels, channels, (1, 1))])
            for _ in range(2)
        )
        self.conv2 = nn.Conv2d(channels, channels, 3, (2, 1), 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, features: Tensor, lengths: Tensor | None) -> Tensor:
        x = relu(self.bn1(self.conv1(padding.mask(features[:, None], lengths))))
        for block in (*self.layer1, *self.layer2):
            x = block(x, lengths)
        return relu(self.bn2(self.conv2(padding.mask(x, lengths)))).flatten(1, 2)


class Dense(nn.Module):
    """Convolution with its non-linearity after it (first and last layers) or before it (between blocks)."""

    def __init__(self, linear: nn.Conv1d, nonlinear: nn.Sequential, before: bool = False) -> None:
        super().__init__()
        self.linear, self.nonlinear, self._before = linear, nonlinear, before
        self._wide = linear.kernel_size[0] > 1

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        x = padding.mask(x, lengths) if self._wide else x
        return self.linear(self.nonlinear(x)) if self._before else self.nonlinear(self.linear(x))


class Segments(NamedTuple):
    """Segments of views of T steps, as matrices. They work for lengths that are unknown when a graph is exported.

    Attributes:
        averaging: (T, segments), or (B, T, segments) with lengths: a product with it is the sum of the mean over the
            view and the mean over each segment.
        spreading: (segments, T): a product with it gives each step the value of its segment.
        lengths: (B,) number of valid steps of each view; None: all are valid.
    """

    averaging: Tensor
    spreading: Tensor
    lengths: Tensor | None

    @classmethod
    def of(cls, x: Tensor, lengths: Tensor | None) -> Segments:
        """Segments of the steps of x (B, C, T)."""
        number = torch.arange(x.shape[-1], device=x.device) // SEGMENT
        segment = torch.arange((x.shape[-1] + SEGMENT - 1) // SEGMENT, device=x.device)
        member = (number[:, None] == segment).to(torch.promote_types(x.dtype, torch.float32))
        if lengths is None:
            averaging = member / member.sum(0) + 1 / member.sum()
        else:  # the last segment of a view may be partly padding
            counts = (padding.valid(x, lengths).to(member.dtype) @ member).clamp_min(1)
            averaging = member / counts + 1 / lengths.view(-1, 1, 1).to(member.dtype)
        return cls(averaging.to(x.dtype), member.mT.to(x.dtype), lengths)


class Masked(nn.Module):
    """Context-aware masking: a convolution whose channels are gated by means of the whole view and of each segment."""

    def __init__(self, inputs: int, outputs: int, dilation: int) -> None:
        super().__init__()
        self.linear_local = nn.Conv1d(inputs, outputs, 3, padding=dilation, dilation=dilation, bias=False)
        self.linear1 = nn.Conv1d(inputs, inputs // 2, 1)
        self.linear2 = nn.Conv1d(inputs // 2, outputs, 1)

    def forward(self, x: Tensor, segments: Segments) -> Tensor:
        x = padding.mask(x, segments.lengths)
        gates = self.linear2(relu(self.linear1(x @ segments.averaging))).sigmoid()  # one for each segment
        return self.linear_local(x) * (gates @ segments.spreading)


class DenseLayer(nn.Module):
    """Layer of a densely connected block: its outputs are concatenated to its inputs."""

    def __init__(self, inputs: int, bottleneck: int, growth: int, dilation: int) -> None:
        super().__init__()
        self.nonlinear1 = normalised(inputs)
        self.linear1 = nn.Conv1d(inputs, bottleneck, 1, bias=False)
        self.nonlinear2 = normalised(bottleneck)
        self.cam_layer = Masked(bottleneck, growth, dilation)

    def forward(self, x: Tensor, segments: Segments) -> Tensor:
        return torch.cat([x, self.cam_layer(self.nonlinear2(self.linear1(self.nonlinear1(x))), segments)], 1)


class DenseBlock(nn.ModuleDict):
    """Densely connected layers, one after the other."""

    def forward(self, x: Tensor, segments: Segments) -> Tensor:
        for layer in self.values():
            x = layer(x, segments)
        return x


class CAMPPlus(Network):
    """CAM++: 2-d front end, convolution to 50 frames a second, three densely connected blocks of 12, 24 and 16 masked
    layers, statistics pooling, linear with batch-norm.

    Tensors are named and shaped as in 3D-Speaker and WeSpeaker, so their state dictionaries can be loaded. C = 128 is
    the paper's width (7.2 M parameters at embedding 512). The front end has C / 4 channels; every dense layer adds
    C / 4.

    Args:
        channels: width C.
        embedding: width E of the embedding.
        pool: pooling layer that takes frames (B, D, T) and their lengths; None: mean and standard deviation.
        pooled: width of its output over D.

    Levels: frames (B, T / 2, 4C), stats (B, 8C), embedding (B, E).
    """

    default_channels = 128
    takes_lengths = True

    def __init__(
        self,
        channels: int = default_channels,
        embedding: int = 192,
        mels: int = MELS,
        pool: nn.Module | None = None,
        pooled: int = 2,
    ) -> None:
        if channels % 8:
            raise ValueError(f"student.channels={channels}: campplus needs a multiple of 8")
        super().__init__()
        self.settings = {"channels": channels, "embedding": embedding}
        growth, width = channels // 4, channels
        self.head = FrontEnd(growth)
        stem = nn.Conv1d(growth * (mels // 8), width, 5, stride=2, padding=2, bias=False)
        # Dense blocks: every layer widens its input by `growth`, and a transition halves the width after the block.
        layers: OrderedDict[str, nn.Module] = OrderedDict(tdnn=Dense(stem, normalised(width)))
        for i, (depth, dilation) in enumerate(DENSE, 1):
            block: OrderedDict[str, nn.Module] = OrderedDict()
            for j in range(depth):
                block[f"tdnnd{j + 1}"] = DenseLayer(width, channels, growth, dilation)
                width += growth
            layers[f"block{i}"] = DenseBlock(block)
            narrow = nn.Conv1d(width, width // 2, 1, bias=False)
            layers[f"transit{i}"] = Dense(narrow, normalised(width), before=True)
            width //= 2
        layers["out_nonlinear"] = normalised(width)
        layers["dense"] = Dense(
            nn.Conv1d(pooled * width, embedding, 1, bias=False), normalised(embedding, active=False, affine=False)
        )
        self.xvector, self.pool = nn.Sequential(layers), SampleStatistics() if pool is None else pool
        self.levels = describe(width, {"stats": pooled * width, "embedding": embedding}, stride=2)
        self.widest = growth * mels

    def run(self, features: Tensor, lengths: Tensor | None = None) -> dict[str, Tensor]:
        tdnn, *middle, last, dense = self.xvector
        frames, lengths = tdnn(self.head(features, lengths), lengths), padding.strided(lengths, 2)
        segments = Segments.of(frames, lengths)
        for layer in middle:  # dense blocks, and the transitions between them
            frames = layer(frames, segments) if isinstance(layer, DenseBlock) else layer(frames, lengths)
        frames = last(frames)
        stats = self.pool(frames, lengths)
        return {"frames": frames.transpose(1, 2), "stats": stats, "embedding": dense(stats[..., None])[..., 0]}
