"""ReDimNet (Yakovlev et al., Interspeech 2024, arXiv 2407.18223) as in WeSpeaker.

2-d blocks over bands and time alternate with 1-d blocks over time; the input of each stage is a learnt mean of the
outputs of all earlier stages.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, relu

from spkd.networks import padding
from spkd.networks.encoder import Attention, FeedForward, Layer
from spkd.networks.network import describe
from spkd.networks.resnet import Pooled
from spkd.networks.toolkits.pooling import make_pooling

EPSILON = 1e-6
KERNELS = (7, 19, 31, 59)  # kernels of the 1-d convolutions
HEADS = 4

# Channels, kind of the 2-d blocks, group divisor; of each stage: stride, blocks, expansion, reduction of its 1-d block.
SHAPES: dict[str, tuple[int, str, int, Sequence[tuple[int, int, int, int | None]]]] = {
    "ReDimNetB0": (10, "residual", 1, [(1, 2, 1, 30), (2, 3, 2, 30), (1, 3, 3, 30), (2, 4, 2, 10), (1, 3, 1, 10)]),
    "ReDimNetB1": (12, "convnext", 8, [(1, 2, 1, None), (2, 3, 1, None), (3, 4, 1, 12), (2, 5, 1, 12), (2, 3, 1, 8)]),
    "ReDimNetB2": (
        *(16, "convnext", 4),
        [(1, 2, 1, 12), (2, 2, 1, 12), (1, 3, 1, 12), (2, 4, 1, 8), (1, 4, 1, 8), (2, 4, 1, 4)],
    ),
    "ReDimNetB3": (
        *(16, "gated", 1),
        [(1, 6, 4, 32), (2, 6, 2, 32), (1, 8, 2, 32), (2, 10, 2, 16), (1, 10, 1, 16), (2, 8, 1, 16)],
    ),
    "ReDimNetB4": (
        *(32, "gated", 1),
        [(1, 4, 2, 48), (2, 4, 2, 48), (1, 6, 2, 48), (2, 6, 1, 32), (1, 8, 1, 24), (2, 4, 1, 16)],
    ),
    "ReDimNetB5": (
        *(32, "gated", 16),
        [(1, 4, 2, 48), (2, 4, 2, 48), (1, 6, 2, 48), (2, 6, 1, 32), (1, 8, 1, 24), (2, 4, 1, 16)],
    ),
    "ReDimNetB6": (
        *(32, "residual", 32),
        [(1, 4, 4, 32), (2, 6, 2, 32), (1, 6, 2, 24), (3, 8, 1, 24), (1, 8, 1, 16), (2, 8, 1, 16)],
    ),
}


class ChannelNorm(nn.Module):
    """Layer-norm over the channels of (B, C, ...)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x.transpose(1, -1), self.weight.shape, self.weight, self.bias, EPSILON).transpose(1, -1)


class ConvNeXt(nn.Module):
    """Grouped convolution, batch-norm, GELU and a dense layer with a shortcut, over one or two dimensions."""

    def __init__(self, channels: int, kernel: int, divisor: int, flat: bool) -> None:
        super().__init__()
        conv: type[nn.Conv1d] | type[nn.Conv2d] = nn.Conv1d if flat else nn.Conv2d
        self.dwconvs = nn.ModuleList([conv(channels, channels, kernel, padding="same", groups=channels // divisor)])
        self.norm = nn.BatchNorm1d(channels) if flat else nn.BatchNorm2d(channels)
        self.pwconv1 = conv(channels, channels, 1)

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        (conv,) = self.dwconvs
        return x + self.pwconv1(gelu(self.norm(conv(padding.mask(x, lengths)))))


class BandGate(nn.Module):
    """Squeeze-excitation over the bands."""

    def __init__(self, bands: int, inner: int) -> None:
        super().__init__()
        self.squeeze, self.exitation = nn.Linear(bands, inner), nn.Linear(inner, bands)

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        means = padding.mean(x, lengths)[..., 0].mean(1)
        return x * self.exitation(relu(self.squeeze(means))).sigmoid()[:, None, :, None]


class Residual(nn.Module):
    """Two grouped 3 x 3 convolutions, each followed by a dense one, with a shortcut; optionally a gate over bands."""

    def __init__(self, channels: int, bands: int, divisor: int, gated: bool) -> None:
        super().__init__()
        groups = channels // divisor
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False, groups=groups)
        self.conv1pw, self.bn1 = nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False, groups=groups)
        self.conv2pw, self.bn2 = nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels)
        self.se = BandGate(bands, min(64, max(channels, 32))) if gated else None

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        out = self.bn1(relu(self.conv1pw(self.conv1(padding.mask(x, lengths)))))
        out = self.bn2(self.conv2pw(self.conv2(padding.mask(out, lengths))))
        return relu((out if self.se is None else self.se(out, lengths)) + x)


class TimeContext(nn.Module):
    """Convolutions over time and one transformer layer, at a lower width, with a shortcut."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.red_dim_conv = nn.Sequential(nn.Conv1d(channels, width, 1), ChannelNorm(width))
        attention = Layer(Attention(width, HEADS), width, width, first=False)
        attention.feed_forward = FeedForward(width, width, "tanh")
        attention.layer_norm.eps = attention.final_layer_norm.eps = EPSILON
        self.tcm = nn.ModuleList([*(ConvNeXt(width, kernel, 1, flat=True) for kernel in KERNELS), attention])
        self.exp_dim_conv = nn.Conv1d(width, channels, 1)

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        *convolutions, attention = self.tcm
        out = self.red_dim_conv(x)
        for block in convolutions:
            out = block(out, lengths)
        mask = None if lengths is None else padding.valid(out, lengths)[:, None]
        out, _ = attention(out.transpose(1, 2), mask, None)
        return x + self.exp_dim_conv(out.transpose(1, 2))


class Stage(nn.ModuleList):
    """Stage: a reduction of bands for channels, 2-d blocks, and optionally a 1-d block; (B, C F, T) -> (B, C F, T)."""

    def __init__(
        self, channels: int, bands: int, kind: str, divisor: int, shape: tuple[int, int, int, int | None]
    ) -> None:
        stride, depth, expansion, reduction = shape
        self.channels, self.bands = channels, bands
        wide, after = stride * channels * expansion, bands // stride
        layers: list[nn.Module] = [nn.Conv2d(channels, wide, (stride, 1), (stride, 1))]
        for _ in range(depth):
            if kind == "convnext":
                layers.append(ConvNeXt(wide, 3, divisor, flat=False))
            else:
                layers.append(Residual(wide, after, divisor, gated=kind == "gated"))
        if expansion != 1:
            narrow = stride * channels
            conv = nn.Conv2d(wide, narrow, 3, padding="same", groups=narrow // divisor)
            norm = nn.BatchNorm2d(narrow, eps=EPSILON)
            layers.append(nn.Sequential(conv, norm, nn.GELU(), nn.Conv2d(narrow, narrow, 1)))
        layers.append(nn.Identity())  # keeps the numbers of the following layers
        if reduction is not None:
            layers.append(TimeContext(channels * bands, channels * bands // reduction))
        super().__init__(layers)

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        x = x.unflatten(1, (self.bands, self.channels)).transpose(1, 2)
        for layer in self:
            if isinstance(layer, nn.Identity):
                x = x.transpose(1, 2).flatten(1, 2)
            elif isinstance(layer, nn.Sequential):
                x = layer(padding.mask(x, lengths))
            else:
                x = layer(x) if isinstance(layer, nn.Conv2d) else layer(x, lengths)
        return x


class Backbone(nn.Module):
    """All stages: (B, F, T) -> (B, C F, T)."""

    def __init__(
        self, mels: int, channels: int, kind: str, divisor: int, stages: Sequence[tuple[int, int, int, int | None]]
    ) -> None:
        super().__init__()
        wide = channels * mels
        weights = [torch.ones(1, 1, 1, 1), *(torch.zeros(1, n + 1, wide, 1) for n in range(1, len(stages) + 1))]
        self.inputs_weights = nn.ParameterList(weights)
        self.stem = nn.Sequential(nn.Conv2d(1, channels, 3, padding="same"), ChannelNorm(channels))
        self._count = len(stages)
        for i, shape in enumerate(stages):
            setattr(self, f"stage{i}", Stage(channels, mels, kind, divisor, shape))
            channels, mels = channels * shape[0], mels // shape[0]

    def forward(self, features: Tensor, lengths: Tensor | None) -> Tensor:
        outputs = [self.stem(padding.mask(features[:, None], lengths)).transpose(1, 2).flatten(1, 2)]
        for i in range(self._count):
            outputs.append(getattr(self, f"stage{i}")(self._mean(outputs, i), lengths))
        return self._mean(outputs, self._count)

    def _mean(self, outputs: list[Tensor], number: int) -> Tensor:
        return (self.inputs_weights[number].softmax(1) * torch.stack(outputs, 1)).sum(1)


class ReDimNet(Pooled):
    """ReDimNet B0 to B6.

    Args:
        name: a key of SHAPES.
        embedding: width E of the embedding.
        mels: bands F of the input.
        pooling: WeSpeaker's name of the pooling.
        segment: whether the embedding comes from a second linear layer.

    Levels: frames (B, T, C F), stats (B, 2 C F), segment.a where there are two embedding layers, embedding (B, E).
    """

    takes_lengths = True

    def __init__(self, name: str, embedding: int, mels: int, pooling: str = "ASTP", segment: bool = False) -> None:
        super().__init__()
        channels, kind, divisor, stages = SHAPES[name]
        wide = channels * mels
        self.backbone = Backbone(mels, channels, kind, divisor, stages)
        pool, pooled = make_pooling(pooling, wide, context=True)
        self.levels = describe(wide, self.add_pooling(wide, embedding, pool, pooled, segment))
        self.widest = wide * max(expansion for _, _, expansion, _ in stages)

    def run(self, features: Tensor, lengths: Tensor | None = None) -> dict[str, Tensor]:
        return self.levels_of(self.backbone(features, lengths), lengths)
