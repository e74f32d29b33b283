"""RepVGG (Ding et al., CVPR 2021, arXiv 2101.03697) and its variant for speakers RSBB (Ma et al., 2021, arXiv
2110.09720) as in WeSpeaker, in the deployed form: one convolution a block, into which `deployed` merges the branches
that training has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, relu

from spkd.networks import padding
from spkd.networks.network import Network, describe
from spkd.networks.toolkits.pooling import make_pooling
from spkd.outputs.features import MELS

STRIDES = (1, 1, 2, 2, 2)  # of the first block of each stage, over bands and time
EPSILON = 1e-5  # of batch-norm


@dataclass(frozen=True)
class BlockShape:
    """Shape of a block.

    Attributes:
        kernel: 3, or 5 in RSBB.
        squeeze: width of the bottleneck of squeeze-excitation; 0: none.
    """

    inputs: int
    outputs: int
    kernel: int
    groups: int
    squeeze: int


class Gate(nn.Module):
    """Squeeze-excitation: scales the channels of (B, C, F, T) by a function of their means."""

    def __init__(self, channels: int, bottleneck: int) -> None:
        super().__init__()
        self.fc_1, self.fc_2 = nn.Linear(channels, bottleneck), nn.Linear(bottleneck, channels)

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        means = padding.mean(x, lengths).mean((2, 3))
        return x * self.fc_2(relu(self.fc_1(means))).sigmoid()[..., None, None]


class Block(nn.Module):
    """Convolution, ReLU and, on request, squeeze-excitation."""

    def __init__(self, shape: BlockShape, stride: int) -> None:
        super().__init__()
        self.rbr_reparam = nn.Conv2d(
            shape.inputs, shape.outputs, shape.kernel, stride, shape.kernel // 2, groups=shape.groups
        )
        self.se = Gate(shape.outputs, shape.squeeze) if shape.squeeze else None
        self._stride = stride

    def forward(self, x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        x, lengths = relu(self.rbr_reparam(padding.mask(x, lengths))), padding.strided(lengths, self._stride)
        return (x if self.se is None else self.se(x, lengths)), lengths


class RepVGG(Network):
    """RepVGG with WeSpeaker's names of tensors.

    Args:
        stages: shapes of the blocks of each of the five stages; the last three halve bands and time.
        pooling: WeSpeaker's name of the pooling.

    Levels: frames (B, T / 8, D), stats, embedding (B, E).
    """

    takes_lengths = True

    def __init__(
        self, stages: Sequence[Sequence[BlockShape]], embedding: int, mels: int = MELS, pooling: str = "TSTP"
    ) -> None:
        super().__init__()
        for number, (shapes, stride) in enumerate(zip(stages, STRIDES, strict=True)):
            blocks = [Block(shape, 1 if i else stride) for i, shape in enumerate(shapes)]
            setattr(self, f"stage{number}", nn.ModuleList(blocks))
        step = prod(STRIDES)
        wide = stages[-1][-1].outputs * (mels // step)
        self.pool, pooled = make_pooling(pooling, wide)
        self.seg = nn.Linear(pooled * wide, embedding)
        self.levels = describe(wide, {"stats": pooled * wide, "embedding": embedding}, stride=step)
        self.widest = mels * max(shape.outputs for shapes in stages[:2] for shape in shapes)

    def run(self, features: Tensor, lengths: Tensor | None = None) -> dict[str, Tensor]:
        x = features[:, None]
        for number in range(len(STRIDES)):
            for block in getattr(self, f"stage{number}"):
                x, lengths = block(x, lengths)
        frames = x.flatten(1, 2)
        stats = self.pool(frames, lengths)
        return {"frames": frames.transpose(1, 2), "stats": stats, "embedding": self.seg(stats)}


def deployed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the deployed form, of those of either form.

    The branches of a block are a 3 x 3 convolution, a 1 x 1 one (RepVGG) or a dilated 3 x 3 one (RSBB) and, where the
    shape stays, the identity, each with batch-norm. They are linear, so that their sum is one convolution (section 3.3
    of the paper); it is computed in float64.

    Raises:
        KeyError: a weight is lacking.
    """
    merged = {name: values for name, values in tensors.items() if ".rbr_" not in name or ".rbr_reparam." in name}
    for name in tensors:
        if not name.endswith(".rbr_dense.conv.weight"):
            continue
        block = name.removesuffix("rbr_dense.conv.weight")
        kernel, bias = _branch(tensors, f"{block}rbr_dense.")
        if f"{block}rbr_dense_dilation.conv.weight" in tensors:  # every second tap of a kernel of 5
            kernel = pad(kernel, (1, 1, 1, 1))
            taps, second = slice(None, None, 2), "rbr_dense_dilation"
        else:  # the tap in the middle of a kernel of 3
            taps, second = slice(1, 2), "rbr_1x1"
        other, its_bias = _branch(tensors, f"{block}{second}.")
        kernel[:, :, taps, taps] += other
        bias = bias + its_bias
        if f"{block}rbr_identity.weight" in tensors:
            scale, its_bias = _norm(tensors, f"{block}rbr_identity.")
            channels, middle = torch.arange(len(kernel)), kernel.shape[-1] // 2
            kernel[channels, channels % kernel.shape[1], middle, middle] += scale
            bias = bias + its_bias
        merged |= {f"{block}rbr_reparam.weight": kernel.float(), f"{block}rbr_reparam.bias": bias.float()}
    return merged


def _branch(tensors: dict[str, Tensor], prefix: str) -> tuple[Tensor, Tensor]:
    """Kernel and bias of a convolution with batch-norm, in float64."""
    scale, bias = _norm(tensors, f"{prefix}bn.")
    return tensors[f"{prefix}conv.weight"].double() * scale[:, None, None, None], bias


def _norm(tensors: dict[str, Tensor], prefix: str) -> tuple[Tensor, Tensor]:
    """Factor and summand of a batch-norm, in float64."""
    weight, bias, mean, variance = (
        tensors[prefix + name].double() for name in ("weight", "bias", "running_mean", "running_var")
    )
    scale = weight / (variance + EPSILON).sqrt()
    return scale, bias - mean * scale
