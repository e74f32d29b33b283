"""ReDimNet (Yakovlev et al., Interspeech 2024, arXiv 2407.18223) and ReDimNet2 (2026, arXiv 2603.11841).

2-d blocks over bands and time alternate with 1-d blocks over time; the input of each stage is a learnt mean of the
outputs of all earlier stages. All outputs have the same number of values for a frame, C F, and ReDimNet2 repeats the
frames of stages at a lower rate. Both have the form of their authors' code, and ReDimNet also that of WeSpeaker.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, group_norm, layer_norm, relu

from spkd.networks import padding
from spkd.networks.encoder import Attention, FeedForward, Layer
from spkd.networks.network import FRAME_LEVEL, Network, describe
from spkd.networks.resnet import Pooled
from spkd.networks.toolkits.pooling import make_pooling
from spkd.outputs.features import HOP, WINDOW
from spkd.outputs.target import Target

EPSILON = 1e-6
GROUP_EPSILON = 1e-5
KERNELS = (7, 19, 31, 59)  # kernels of the 1-d convolutions
JOINT_KERNELS = (7, 15, 31)  # kernels of the parallel 1-d convolutions, in blocks without attention
POSITIONS = 59  # kernel of the convolution before the attention, in blocks without others
HEADS = 4
MAPS = ("convnext_like", "convnext_like_relu", "basic_resnet", "basic_resnet_fwse")  # kinds of 2-d blocks
CONTEXTS = ("fc", "conv", "att", "conv+att")  # kinds of 1-d blocks
Names = list[tuple[str, str]]


@dataclass(frozen=True)
class StageShape:
    """Shape of a stage.

    Attributes:
        bands: stride over the bands, of which the channels become so many times as many.
        time: factor by which its frame rate is lower than that of the stage before.
        blocks: number of 2-d blocks.
        expansion: channels within the 2-d blocks over those of the output.
        reduction: values of a frame over the width of the 1-d block; None: no 1-d block.
        kernels: kernels of the convolutions of a ConvNeXt block, side by side.
    """

    bands: int
    time: int
    blocks: int
    expansion: float
    reduction: int | None
    kernels: tuple[tuple[int, int], ...] = ((3, 3),)


@dataclass(frozen=True)
class Shape:
    """Shape of a ReDimNet.

    Attributes:
        bands: bands of the input.
        channels: channels C of the first stage.
        block: kind of the 2-d blocks, of MAPS.
        context: kind of the 1-d blocks, of CONTEXTS.
        divisor: channels in each group of the 2-d convolutions; None: convolutions over all channels.
        second: whether it is a ReDimNet2.
        outputs: width of the frames after a last linear layer; None: no such layer.
        flat: whether this layer takes all values of a frame, and not the channels of each band.
        compressed: whether the strided convolutions are grouped.
        dual: whether stages with a 1-d block give its input as well.
        normalised: whether outputs of stages are normalised by groups of F values.
        stem: strides of the first convolution over bands and time, after which there are F bands.
    """

    bands: int
    channels: int
    stages: tuple[StageShape, ...]
    block: str = "convnext_like"
    context: str = "conv+att"
    divisor: int | None = 1
    second: bool = False
    outputs: int | None = None
    flat: bool = True
    compressed: bool = False
    dual: bool = False
    normalised: bool = False
    stem: tuple[int, int] = (1, 1)

    @property
    def rows(self) -> int:
        """Number F of bands after the first convolution."""
        return self.bands // self.stem[0]

    @property
    def wide(self) -> int:
        """Number of values in a frame."""
        return self.rows * self.channels

    @property
    def pooled(self) -> int:
        """Width of the frames that are pooled."""
        if self.outputs is None:
            return self.wide
        return self.outputs if self.flat else self.outputs * (self.rows // math.prod(s.bands for s in self.stages))

    @property
    def repeated(self) -> int:
        """Number of frames after the first convolution in a frame of the slowest stage."""
        return math.prod(stage.time for stage in self.stages)

    @property
    def step(self) -> int:
        """Number of input frames in a frame of the slowest stage."""
        return self.stem[1] * self.repeated


def _first(channels: int, block: str, divisor: int, stages: Iterable[tuple[int, int, int, int | None]]) -> Shape:
    """Shape of a ReDimNet from strides over the bands, blocks, expansions and reductions of its stages."""
    shapes = tuple(StageShape(stride, 1, blocks, wide, reduction) for stride, blocks, wide, reduction in stages)
    return Shape(72, channels, shapes, block, "conv+att", divisor)


# WeSpeaker's ReDimNets; the number of bands is a setting of theirs.
SHAPES: dict[str, Shape] = {
    "ReDimNetB0": _first(
        10, "basic_resnet", 1, [(1, 2, 1, 30), (2, 3, 2, 30), (1, 3, 3, 30), (2, 4, 2, 10), (1, 3, 1, 10)]
    ),
    "ReDimNetB1": _first(
        12, "convnext_like", 8, [(1, 2, 1, None), (2, 3, 1, None), (3, 4, 1, 12), (2, 5, 1, 12), (2, 3, 1, 8)]
    ),
    "ReDimNetB2": _first(
        *(16, "convnext_like", 4),
        [(1, 2, 1, 12), (2, 2, 1, 12), (1, 3, 1, 12), (2, 4, 1, 8), (1, 4, 1, 8), (2, 4, 1, 4)],
    ),
    "ReDimNetB3": _first(
        *(16, "basic_resnet_fwse", 1),
        [(1, 6, 4, 32), (2, 6, 2, 32), (1, 8, 2, 32), (2, 10, 2, 16), (1, 10, 1, 16), (2, 8, 1, 16)],
    ),
    "ReDimNetB4": _first(
        *(32, "basic_resnet_fwse", 1),
        [(1, 4, 2, 48), (2, 4, 2, 48), (1, 6, 2, 48), (2, 6, 1, 32), (1, 8, 1, 24), (2, 4, 1, 16)],
    ),
    "ReDimNetB5": _first(
        *(32, "basic_resnet_fwse", 16),
        [(1, 4, 2, 48), (2, 4, 2, 48), (1, 6, 2, 48), (2, 6, 1, 32), (1, 8, 1, 24), (2, 4, 1, 16)],
    ),
    "ReDimNetB6": _first(
        *(32, "basic_resnet", 32),
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


class GroupNorm(nn.Module):
    """Group-norm over the values of a group and the valid steps: (B, D, T) -> (B, D, T)."""

    def __init__(self, groups: int, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self._groups = groups

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        if lengths is None:
            return group_norm(x, self._groups, self.weight, self.bias, GROUP_EPSILON)
        grouped = x.unflatten(1, (self._groups, -1))
        centred = grouped - padding.mean(grouped, lengths).mean(2, keepdim=True)
        variance = padding.mean(centred.square(), lengths).mean(2, keepdim=True)
        normal = (centred / (variance + GROUP_EPSILON).sqrt()).flatten(1, 2)
        return normal * self.weight[:, None] + self.bias[:, None]


class ConvNeXt(nn.Module):
    """Grouped convolutions side by side, batch-norm, activation and a dense layer with a shortcut, in 1-d or 2-d."""

    def __init__(
        self,
        channels: int,
        kernels: Sequence[int] | Sequence[tuple[int, int]],
        divisor: int | None,
        flat: bool,
        activation: Callable[[Tensor], Tensor] = gelu,
    ) -> None:
        super().__init__()
        conv: type[nn.Conv1d] | type[nn.Conv2d] = nn.Conv1d if flat else nn.Conv2d
        groups, wide = _groups(channels, divisor), channels * len(kernels)
        # A number where kernels are odd: LiteRT's converter takes no word for the padding of a 1-d convolution.
        self.dwconvs = nn.ModuleList(
            conv(channels, channels, kernel, padding=kernel // 2 if flat else "same", groups=groups)  # type: ignore
            for kernel in kernels
        )
        self.norm = nn.BatchNorm1d(wide) if flat else nn.BatchNorm2d(wide)
        self.pwconv1 = conv(wide, channels, 1)
        self._activation = activation

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        given = padding.mask(x, lengths)
        out = [conv(given) for conv in self.dwconvs]
        return x + self.pwconv1(self._activation(self.norm(out[0] if len(out) == 1 else torch.cat(out, 1))))


class BandGate(nn.Module):
    """Squeeze-excitation over the bands."""

    def __init__(self, bands: int, inner: int) -> None:
        super().__init__()
        self.squeeze, self.exitation = nn.Linear(bands, inner), nn.Linear(inner, bands)

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        means = padding.mean(x, lengths)[..., 0].mean(1)
        return x * self.exitation(relu(self.squeeze(means))).sigmoid()[:, None, :, None]


class Residual(nn.Module):
    """Two 3 x 3 convolutions, each followed by a dense one where they are grouped, with a shortcut; optionally a gate
    over bands."""

    def __init__(self, channels: int, bands: int, divisor: int | None, gated: bool) -> None:
        super().__init__()
        groups = _groups(channels, divisor)

        def dense() -> nn.Module:
            return nn.Identity() if divisor is None else nn.Conv2d(channels, channels, 1)

        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False, groups=groups)
        self.conv1pw, self.bn1 = dense(), nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False, groups=groups)
        self.conv2pw, self.bn2 = dense(), nn.BatchNorm2d(channels)
        self.se = BandGate(bands, min(64, max(channels, 32))) if gated else None

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        out = self.bn1(relu(self.conv1pw(self.conv1(padding.mask(x, lengths)))))
        out = self.bn2(self.conv2pw(self.conv2(padding.mask(out, lengths))))
        return relu((out if self.se is None else self.se(out, lengths)) + x)


class Positions(nn.Module):
    """Depthwise convolution and layer-norm with a shortcut, which tell attention the order of the frames."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, POSITIONS, padding=POSITIONS // 2, groups=width)
        self.norm = ChannelNorm(width)

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        return x + self.norm(self.conv(padding.mask(x, lengths)))


class TimeAttention(Layer):
    """Transformer layer over time: (B, D, T) -> (B, D, T)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__(Attention(width, HEADS), width, inner, first=False)
        self.feed_forward = FeedForward(width, inner, "tanh")
        self.layer_norm.eps = self.final_layer_norm.eps = EPSILON

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:  # type: ignore[override]
        mask = None if lengths is None else padding.valid(x, lengths)[:, None]
        return super().forward(x.transpose(1, 2), mask, None)[0].transpose(1, 2)


_OVER_TIME = (ConvNeXt, Positions, TimeAttention)  # layers that take the lengths


class TimeContext(nn.Module):
    """Layers over time at a lower width, with a shortcut."""

    def __init__(self, channels: int, width: int, kind: str) -> None:
        super().__init__()
        self.red_dim_conv = nn.Sequential(nn.Conv1d(channels, width, 1), ChannelNorm(width))
        layers: dict[str, Callable[[], list[nn.Module]]] = {
            "fc": lambda: [
                nn.Conv1d(width, 2 * width, 1), ChannelNorm(2 * width), nn.GELU(), nn.Conv1d(2 * width, width, 1)
            ],
            "conv": lambda: [ConvNeXt(width, JOINT_KERNELS, 1, flat=True) for _ in range(4)],
            "att": lambda: [Positions(width), TimeAttention(width, 2 * width)],
            "conv+att": lambda: [
                *(ConvNeXt(width, (kernel,), 1, flat=True) for kernel in KERNELS), TimeAttention(width, width)
            ],
        }  # fmt: skip
        self.tcm = nn.ModuleList(layers[kind]())
        self.exp_dim_conv = nn.Conv1d(width, channels, 1)

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        out = self.red_dim_conv(x)
        for layer in self.tcm:
            out = layer(out, lengths) if isinstance(layer, _OVER_TIME) else layer(out)
        return x + self.exp_dim_conv(out)


class Stage(nn.Module):
    """Stage: a strided convolution, 2-d blocks, and optionally a 1-d block.

    Args:
        shape: shape of the network.
        number: number of the stage in it.
    """

    def __init__(self, shape: Shape, number: int) -> None:
        super().__init__()
        own, before = shape.stages[number], shape.stages[:number]
        factor = math.prod(stage.bands for stage in before)
        self._channels, self._bands = factor * shape.channels, shape.rows // factor
        self._time = math.prod(stage.time for stage in shape.stages[: number + 1])
        if self._bands % own.bands:
            raise ValueError(f"{self._bands} bands cannot be divided by {own.bands}")
        narrow = own.bands * self._channels
        wide, bands = int(narrow * own.expansion), self._bands // own.bands
        stride = (own.bands, self._time)
        groups = math.gcd(self._channels, wide) if shape.compressed else 1
        self.reduce = nn.Conv2d(self._channels, wide, stride, stride, groups=groups)
        self.blocks = nn.ModuleList(_map_block(shape, own, wide, bands) for _ in range(own.blocks))
        self.squeeze = None if own.expansion == 1 else _squeeze(shape, wide, narrow)
        width = 0 if own.reduction is None else shape.wide // own.reduction
        if own.reduction is not None and (width < HEADS or ("att" in shape.context and width % HEADS)):
            raise ValueError(f"{shape.wide} / {own.reduction} = {width} is no multiple of {HEADS} heads")
        self.context = TimeContext(shape.wide, width, shape.context) if width else None
        self._dual = shape.dual and self.context is not None
        norms = (2 if self._dual else 1) if shape.normalised else 0
        self.norms = nn.ModuleList(GroupNorm(shape.channels, shape.wide) for _ in range(norms))

    def forward(self, x: Tensor, lengths: Tensor | None) -> list[Tensor]:
        """Outputs (B, C F, T) from (B, C F, T): one, or two where the input of the 1-d block is one too."""
        after = None if lengths is None else lengths // self._time
        x = self.reduce(x.unflatten(1, (self._bands, self._channels)).transpose(1, 2))
        for block in self.blocks:
            x = block(x, after)
        if self.squeeze is not None:
            x = self.squeeze(padding.mask(x, after))
        x = x.transpose(1, 2).flatten(1, 2)
        outputs = [x] if self.context is None else [self.context(x, after)]
        if self._dual:
            outputs.insert(0, x)
        if self._time > 1:
            outputs = [out[..., None].expand(*out.shape, self._time).flatten(-2) for out in outputs]
        if self.norms:
            outputs = [norm(out, lengths) for norm, out in zip(self.norms, outputs, strict=True)]
        return outputs


def _groups(channels: int, divisor: int | None) -> int:
    """Number of groups of a convolution."""
    groups = 1 if divisor is None else channels // divisor
    if not groups or channels % groups:
        raise ValueError(f"{channels} channels cannot be divided into groups of {divisor}")
    return groups


def _map_block(shape: Shape, own: StageShape, channels: int, bands: int) -> nn.Module:
    if shape.block.startswith("convnext"):
        activation = relu if shape.block.endswith("relu") else gelu
        return ConvNeXt(channels, own.kernels, shape.divisor, False, activation)
    return Residual(channels, bands, shape.divisor, gated=shape.block == "basic_resnet_fwse")


def _squeeze(shape: Shape, wide: int, narrow: int) -> nn.Sequential:
    """Layers that lead from the channels of the 2-d blocks to those of the output."""
    norm = nn.BatchNorm2d(narrow, eps=EPSILON)
    if shape.second:
        return nn.Sequential(nn.Conv2d(wide, narrow, 1), norm)
    conv = nn.Conv2d(wide, narrow, 3, padding="same", groups=_groups(narrow, shape.divisor))
    return nn.Sequential(conv, norm, nn.GELU(), nn.Conv2d(narrow, narrow, 1))


class Backbone(nn.Module):
    """All stages: (B, F, T) -> (B, D, T), where T is a multiple of `shape.step`."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        bands, time = shape.stem
        # A stride over the bands takes each of them once; an odd kernel over time takes every frame.
        kernel = (3 if bands == 1 else bands, max(3, time // 2 * 2 + 1))
        conv = nn.Conv2d(1, shape.channels, kernel, shape.stem, (int(bands == 1), kernel[1] // 2))
        self.stem = nn.Sequential(conv, ChannelNorm(shape.channels))
        self.norm = GroupNorm(shape.channels, shape.wide) if shape.normalised else None
        self.stages = nn.ModuleList(Stage(shape, number) for number in range(len(shape.stages)))
        counts = [1]
        for stage in shape.stages:
            counts.append(counts[-1] + (2 if shape.dual and stage.reduction is not None else 1))
        # The first stage has one input, which needs no mean.
        self.means = nn.ParameterList(torch.zeros(1, count, shape.wide, 1) for count in counts[1:])
        self.last: nn.Module = nn.Identity()
        if shape.outputs is not None and shape.flat:
            self.last = nn.Conv1d(shape.wide, shape.outputs, 1)
            if not shape.second:
                self.last = nn.Sequential(self.last, nn.BatchNorm1d(shape.outputs))
        elif shape.outputs is not None:
            bands = math.prod(stage.bands for stage in shape.stages)
            self.last = nn.Conv2d(shape.channels * bands, shape.outputs, 1)
        self._bands = 0 if shape.outputs is None or shape.flat else shape.pooled // shape.outputs
        self._stride = shape.stem[1]

    def forward(self, features: Tensor, lengths: Tensor | None) -> Tensor:
        first = self.stem(padding.mask(features[:, None], lengths)).transpose(1, 2).flatten(1, 2)
        lengths = None if lengths is None else lengths // self._stride
        outputs = [first if self.norm is None else self.norm(first, lengths)]
        x = outputs[0]
        for stage, weights in zip(self.stages, self.means, strict=True):
            outputs += stage(x, lengths)
            x = weighted_mean(outputs, weights)
        if not self._bands:
            return self.last(x)
        return self.last(x.unflatten(1, (self._bands, -1)).transpose(1, 2)).flatten(1, 2)


def weighted_mean(outputs: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Mean of N outputs (B, D, T) with weights (1, N, D, 1), of which the softmax is taken."""
    total, *rest = (output * weight for output, weight in zip(outputs, weights.softmax(1).unbind(1), strict=True))
    for term in rest:
        total = total + term
    return total


class ReDimNet(Pooled):
    """ReDimNet B0 to B6 as in WeSpeaker.

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
        self.shape = replace(SHAPES[name], bands=mels)
        self.backbone = Backbone(self.shape)
        wide = self.shape.wide
        pool, pooled = make_pooling(pooling, wide, context=True)
        self.levels = describe(wide, self.add_pooling(wide, embedding, pool, pooled, segment))
        self.widest = _widest(self.shape)

    def run(self, features: Tensor, lengths: Tensor | None = None) -> dict[str, Tensor]:
        return self.levels_of(self.backbone(features, lengths), lengths)


class AuthorsReDimNet(Network):
    """ReDimNet or ReDimNet2 with the output layers of their authors: pooling, batch-norm, linear.

    Feature frames beyond a multiple of the step s of the slowest stage are left out.

    Args:
        embedding: width E of the embedding.
        pooling: WeSpeaker's name of the pooling.
        context: whether attention of the pooling also takes mean and deviation of the whole view.
        normalised: whether there is a batch-norm after the embedding.

    Levels: frames (B, T / s, D), each the mean over a frame of the slowest stage; stats (B, 2 D); embedding (B, E).
    """

    takes_lengths = True

    def __init__(
        self, shape: Shape, embedding: int, pooling: str = "ASTP", context: bool = True, normalised: bool = False
    ) -> None:
        super().__init__()
        self.shape, self._step, self._repeated, self._stride = shape, shape.step, shape.repeated, shape.stem[1]
        self.backbone = Backbone(shape)
        self.pool, factor = make_pooling(pooling, shape.pooled, context)
        pooled = factor * shape.pooled
        self.bn, self.linear = nn.BatchNorm1d(pooled), nn.Linear(pooled, embedding)
        self.bn2 = nn.BatchNorm1d(embedding) if normalised else None
        self.levels = in_steps(describe(shape.pooled, {"stats": pooled, "embedding": embedding}), shape.step)
        self.widest = _widest(shape)

    def run(self, features: Tensor, lengths: Tensor | None = None) -> dict[str, Tensor]:
        step = self._step
        whole = features.shape[-1] // step * step
        return self._of_steps(features[..., :whole], None if lengths is None else lengths // step * step)

    def _of_steps(self, features: Tensor, lengths: Tensor | None) -> dict[str, Tensor]:
        """Levels of features, and lengths, that are whole steps."""
        frames = self.backbone(features, lengths)
        stats = self.pool(frames, None if lengths is None else lengths // self._stride)
        embedding = self.linear(self.bn(stats))
        return {
            "frames": frames.transpose(1, 2).unflatten(1, (-1, self._repeated)).mean(2),
            "stats": stats,
            "embedding": embedding if self.bn2 is None else self.bn2(embedding),
        }


def in_steps(levels: dict[str, Target], step: int) -> dict[str, Target]:
    """Levels whose frames are each the mean of `step` frames that come every 10 ms."""
    frames = replace(levels[FRAME_LEVEL], hop=step * HOP, window=WINDOW + (step - 1) * HOP)
    return levels | {FRAME_LEVEL: frames}


def _widest(shape: Shape) -> int:
    return round(shape.wide * max(1, *(stage.expansion for stage in shape.stages)))


def names_of(shape: Shape, wespeaker: bool = False) -> Names:
    """Rules that turn names of weights here into those of a toolkit (see spkd.teachers.toolkit.fill).

    Toolkits number the layers of a stage; the authors also count the mean and the reshaping before them.

    Args:
        wespeaker: whether the names are those of WeSpeaker's ReDimNet; else those of the authors.
    """
    duals = [shape.dual and stage.reduction is not None for stage in shape.stages]
    theirs = [f"backbone.stage{number}{'_pre' if dual else ''}." for number, dual in enumerate(duals)]
    means = [f"{name}0.w" for name in theirs[1:]] + ["backbone.fin_wght1d.w"]
    if wespeaker:
        means = [f"backbone.inputs_weights.{number}" for number in range(1, len(shape.stages) + 1)]
    rules: Names = [(rf"^backbone\.means\.{number}$", name) for number, name in enumerate(means)]
    rules += [(r"^backbone\.norm\.", "backbone.stem_gnorm."), (r"^backbone\.last\.", _LAST[shape.second])]
    for number, (stage, name, dual) in enumerate(zip(shape.stages, theirs, duals, strict=True)):
        here, first = rf"^backbone\.stages\.{number}\.", 0 if wespeaker else 2
        joined = first + 1 + stage.blocks + (stage.expansion != 1)  # number of the reshaping after the 2-d blocks
        repeated = joined + 1 + (stage.reduction is not None)
        blocks = [(rf"{here}blocks\.{n}\.", f"{name}{first + 1 + n}.conv_block.") for n in range(stage.blocks)]
        context = f"backbone.stage{number}_1d." if dual else f"{name}{joined + 1}."
        norms = (
            [f"backbone.stage{number}_up_{kind}.1." for kind in ("2d", "1d")] if dual else [f"{name}{repeated + 1}."]
        )
        rules += [
            (rf"{here}reduce\.", f"{name}{first}."),
            *blocks,
            (rf"{here}squeeze\.", f"{name}{joined - 1}."),
            (rf"{here}context\.", context),
            *((rf"{here}norms\.{n}\.", norm) for n, norm in enumerate(norms)),
        ]
    return rules


_LAST = {False: "backbone.mfa.", True: "backbone.head."}  # the last layer, by whether it is a ReDimNet2
