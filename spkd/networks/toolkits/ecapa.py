"""ECAPA-TDNN of SpeechBrain (which 3D-Speaker took over) and of WeSpeaker.

They differ from each other and from this project's student in padding, order of layers and attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from spkd.networks.ecapa import (
    BOTTLENECK,
    ECAPA,
    SCALE,
    AttentiveStatistics,
    Res2,
    SERes2Block,
    SqueezeExcitation,
)
from spkd.networks.network import ConvBlock, Network, describe
from spkd.networks.toolkits.pooling import make_pooling
from spkd.outputs.features import MELS


class SpeechBrainBlock(nn.Module):
    """SE-Res2 block with SpeechBrain's options; activation and groups apply to the outer layers."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        dilation: int,
        scale: int,
        squeeze: int,
        activation: Callable[[], nn.Module],
        groups: int,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [
                ConvBlock(inputs, outputs, activation=activation, groups=groups),
                Res2(outputs, dilation, True, scale, kernel),
                ConvBlock(outputs, outputs, activation=activation, groups=groups),
                SqueezeExcitation(outputs, squeeze),
            ]
        )
        self.shortcut = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        out = x
        for layer in self.layers:
            out = layer(out, lengths)
        return out + (x if self.shortcut is None else self.shortcut(x))


class SpeechBrainECAPA(Network):
    """ECAPA-TDNN with padding by reflection, and SpeechBrain's options.

    Args:
        channels: widths of the first layer, of each block, and of the layer that joins the blocks.
        scale: number of Res2 groups.
        squeeze: width of the bottleneck of squeeze-excitation.
        attention: width of the bottleneck of the attention.
        context: whether the attention takes mean and deviation of the view.
        activation: non-linearity of all layers but those of Res2 and of the attention.
    """

    FLOOR = 1e-12  # least variance

    takes_lengths = True

    def __init__(
        self,
        channels: Sequence[int],
        embedding: int,
        mels: int = MELS,
        kernels: Sequence[int] = (5, 3, 3, 3, 1),
        dilations: Sequence[int] = (1, 2, 3, 4, 1),
        groups: Sequence[int] = (1, 1, 1, 1, 1),
        scale: int = SCALE,
        squeeze: int = BOTTLENECK,
        attention: int = BOTTLENECK,
        context: bool = True,
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        first, *inner, wide = channels
        self.kernels = list(kernels[1:-1])
        self.levels = describe(wide, {"stats": 2 * wide, "embedding": embedding})
        self.widest = max(self.widest, 3 * wide)
        self.stem = ConvBlock(
            mels, first, kernels[0], dilations[0], reflect=True, activation=activation, groups=groups[0]
        )
        self.blocks = nn.ModuleList(
            SpeechBrainBlock(inputs, outputs, kernel, dilation, scale, squeeze, activation, group)
            for inputs, outputs, kernel, dilation, group in zip(
                channels, inner, kernels[1:], dilations[1:], groups[1:], strict=False
            )
        )
        self.join = ConvBlock(
            sum(inner), wide, kernels[-1], dilations[-1], reflect=True, activation=activation, groups=groups[-1]
        )
        pool = AttentiveStatistics(wide, self.FLOOR, attention, context)
        self.pool = nn.ModuleList([pool, nn.BatchNorm1d(2 * wide)])
        self.project = nn.Linear(2 * wide, embedding)

    def run(self, features: Tensor, lengths: Tensor | None = None) -> dict[str, Tensor]:
        x = self.stem(features, lengths)
        outputs = []
        for block in self.blocks:
            x = block(x, lengths)
            outputs.append(x)
        frames = self.join(torch.cat(outputs, 1), lengths)
        attention, norm = self.pool
        stats = norm(attention(frames, lengths))
        return {"frames": frames.transpose(1, 2), "stats": stats, "embedding": self.project(stats)}


class AllGroups(Res2):
    """Res2 convolution of every group but the last; the student's Res2 convolves every group but the first."""

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        *groups, last = x.chunk(SCALE, 1)
        outputs: list[Tensor] = []
        for block, group in zip(self.blocks, groups, strict=True):
            outputs.append(block(group + outputs[-1] if outputs else group, lengths))
        return torch.cat([*outputs, last], 1)


class WeSpeakerECAPA(ECAPA):
    """WeSpeaker's ECAPA-TDNN: blocks joined without batch-norm into 1536 channels, attention without batch-norm.

    Args:
        context: whether the attention takes mean and deviation of the view in addition to the frames (GLOB).
        normalised: whether batch-norm follows the embedding (`emb_bn`).
        pooling: WeSpeaker's name of the pooling.
    """

    WIDE = 1536

    def __init__(
        self,
        channels: int,
        embedding: int,
        mels: int = MELS,
        context: bool = False,
        normalised: bool = False,
        pooling: str = "ASTP",
    ) -> None:
        super().__init__(channels, embedding, mels)
        self.blocks = nn.ModuleList(SERes2Block(channels, dilation, kind=AllGroups) for dilation in (2, 3, 4))
        pool, factor = make_pooling(pooling, self.WIDE, context)
        pooled = factor * self.WIDE
        self.levels = describe(self.WIDE, {"stats": pooled, "embedding": embedding})
        self.join = nn.Sequential(nn.Conv1d(3 * channels, self.WIDE, 1), nn.ReLU())
        self.pool = nn.ModuleList([pool, nn.BatchNorm1d(pooled)])
        project = nn.Linear(pooled, embedding)
        self.project = nn.Sequential(project, nn.BatchNorm1d(embedding)) if normalised else project
