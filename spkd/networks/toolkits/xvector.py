"""X-vector TDNN (Snyder et al., ICASSP 2018) as in WeSpeaker and SpeechBrain."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from spkd.networks import padding
from spkd.networks.network import FRAME_LEVEL, ConvBlock, Network, describe
from spkd.networks.resnet import Pooled
from spkd.networks.toolkits.pooling import make_pooling
from spkd.outputs.features import HOP, MELS, WINDOW
from spkd.outputs.target import Target

CONTEXTS = ((5, 1), (3, 2), (3, 3), (1, 1), (1, 1))  # kernels and dilations of the five frame layers


class FrameLayer(nn.Module):
    """Convolution without padding, ReLU, and batch-norm without scale and shift, as in Kaldi."""

    def __init__(self, inputs: int, outputs: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.conv_1d = nn.Conv1d(inputs, outputs, kernel, dilation=dilation)
        self.bn = nn.BatchNorm1d(outputs, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(relu(self.conv_1d(x)))


class WeSpeakerXVector(Pooled):
    """WeSpeaker's x-vector, with its names of tensors.

    Each frame comes from 15 frames of fbank; both segment layers are levels.
    """

    takes_lengths = True

    def __init__(
        self, hidden: int = 512, wide: int = 1500, embedding: int = 512, mels: int = MELS, pooling: str = "TSTP"
    ) -> None:
        super().__init__()
        widths = [mels, hidden, hidden, hidden, hidden, wide]
        for i, (kernel, dilation) in enumerate(CONTEXTS):
            setattr(self, f"frame_{i + 1}", FrameLayer(widths[i], widths[i + 1], kernel, dilation))
        self._context = sum((kernel - 1) * dilation for kernel, dilation in CONTEXTS)
        pool, pooled = make_pooling(pooling, wide)
        vectors = self.add_pooling(wide, embedding, pool, pooled, segment=True)
        frames = Target(FRAME_LEVEL, wide, HOP, WINDOW + self._context * HOP)
        self.levels = describe(wide, vectors) | {FRAME_LEVEL: frames}

    def run(self, features: Tensor, lengths: Tensor | None = None) -> dict[str, Tensor]:
        frames = features
        for i in range(len(CONTEXTS)):
            frames = getattr(self, f"frame_{i + 1}")(frames)
        lengths = None if lengths is None else lengths - self._context
        return self.levels_of(frames, lengths)


class SpeechBrainXVector(Network):
    """SpeechBrain's x-vector: frame layers padded by reflection, mean and standard deviation, linear.

    SpeechBrain adds noise between 1e-5 and 9e-5 to the mean, even at inference; here the middle value is added.

    Args:
        widths: width of each frame layer.
        contexts: kernel and dilation of each frame layer.
    """

    NOISE, FLOOR = 5e-5, 1e-5

    takes_lengths = True

    def __init__(
        self,
        widths: Sequence[int],
        embedding: int,
        mels: int,
        contexts: Sequence[tuple[int, int]] = CONTEXTS,
        activation: Callable[[], nn.Module] = nn.LeakyReLU,
    ) -> None:
        super().__init__()
        inputs = (mels, *widths[:-1])
        self.blocks = nn.ModuleList(
            ConvBlock(*shape, reflect=True, activation=activation)
            for shape in ((a, b, k, d) for a, b, (k, d) in zip(inputs, widths, contexts, strict=True))
        )
        self.project = nn.Linear(2 * widths[-1], embedding)
        self.levels = describe(widths[-1], {"stats": 2 * widths[-1], "embedding": embedding})

    def run(self, features: Tensor, lengths: Tensor | None = None) -> dict[str, Tensor]:
        frames = features
        for block in self.blocks:
            frames = block(frames, lengths)
        variance, mean = padding.var_mean(frames, lengths, correction=1)
        stats = torch.cat([mean + self.NOISE, variance.sqrt() + self.FLOOR], 1)[..., 0]
        return {"frames": frames.transpose(1, 2), "stats": stats, "embedding": self.project(stats)}
