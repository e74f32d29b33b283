"""What every student network is."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from spkd.corpus.audio import SAMPLE_RATE
from spkd.networks import padding
from spkd.networks.settings import StudentConfig
from spkd.outputs.features import FBANK, HOP, WINDOW, input_features
from spkd.outputs.target import Target

FRAME_LEVEL = "frames"


class Network(nn.Module):
    """Features (B, T, F) -> levels by name: `frames` (B, U, D), every other level (B, D).

    A new architecture is a subclass in a file of its own and its name in spkd.registry.STUDENTS.

    Attributes:
        input_kind: its input features: 80 mel bands every 10 ms, or the samples themselves, 160 in a row.
        levels: its outputs, described as a teacher's: the width D of every level, the times of the frames.
        settings: what `build` needs to make the same network again.
        widest: numbers in its widest layer for each 10 ms; what it needs memory for.
        default_channels: its width unless another is asked for.
        adapters: whether it has a second path, through adapters (see `forward`).
        takes_lengths: whether views of different lengths can share a batch, each with the outputs it has alone.
    """

    input_kind: Target = FBANK
    levels: dict[str, Target]
    settings: dict[str, Any]
    widest: int = 4096
    default_channels: int
    adapters: bool = False
    takes_lengths: bool = False

    @classmethod
    def from_pretrained(cls, source: str, config: StudentConfig) -> Network | None:
        """A student initialised from a model of another library; None for architectures that have no such way.

        Args:
            source: a folder or a hub id.
        """
        return None

    def renamed(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of the same architecture under the names that they have here."""
        return weights

    def take(self, kind: Target) -> None:
        """Take the fbank of another toolkit, whose windows shift those of the frames."""
        self.levels = {name: level.after(self.input_kind, kind) for name, level in self.levels.items()}
        self.input_kind = kind

    def features(self, waves: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Its input features of waveforms (B, samples) at 16 kHz; lengths as for `input_features`."""
        return input_features(self.input_kind, waves, lengths)

    def forward(
        self, features: Tensor, adapted: Tensor | None = None, lengths: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Mean-normalise per crop (the field's usual front end), then run the network.

        Args:
            adapted: (B,) which views take the path through the adapters, where there are any (default: all).
            lengths: (B,) valid feature frames of each view, where shorter ones are padded (default: all are valid).
                Frames of the result that come from padding are undefined.
        """
        features = features.transpose(1, 2)
        features = features - padding.mean(features, lengths)
        return self.run(features) if lengths is None else self.run(features, lengths)

    @abstractmethod
    def run(self, features: Tensor, lengths: Tensor | None = None) -> dict[str, Tensor]:
        """Levels from mean-normalised features (B, 80, T); lengths as for `forward`."""


def describe(frames: int, vectors: dict[str, int], stride: int = 1) -> dict[str, Target]:
    """Levels by name: frames of a width, one for every `stride` fbank frames, and vectors of others."""
    levels = {FRAME_LEVEL: Target(FRAME_LEVEL, frames, stride * HOP, WINDOW)}
    return levels | {name: Target(name, dim) for name, dim in vectors.items()}


def forward_crops(network: nn.Module, crops: list[Tensor]) -> list[dict[str, Tensor]]:
    """The network's levels of several crops (B, T_i, F); equally long neighbours go through it together."""
    outputs: list[dict[str, Tensor]] = []
    while len(outputs) < len(crops):
        first = len(outputs)
        last = first + 1
        while last < len(crops) and crops[last].shape == crops[first].shape:
            last += 1
        levels = network(torch.cat(crops[first:last]))
        frames = levels[FRAME_LEVEL]
        if frames.requires_grad and frames.mT.is_contiguous():
            frames.register_hook(_time_last)
        if last - first == 1:  # the gradient of a chunk is a copy, of the only one, too
            outputs.append(levels)
            continue
        parts = {name: values.chunk(last - first) for name, values in levels.items()}
        outputs.extend({name: values[i] for name, values in parts.items()} for i in range(last - first))
    return outputs


def _time_last(gradient: Tensor | None) -> Tensor | None:
    """Of frames, as convolutions have them in memory: with another order every layer below takes longer on a CPU.

    A compiled network calls it with None where no loss takes the frames."""
    return None if gradient is None else gradient.mT.contiguous().mT


def count_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def count_macs(
    network: Network, seconds: float = 1.0, features: Callable[[Tensor, Tensor | None], Tensor] | None = None
) -> int:
    """Multiply-accumulates of one view of so many seconds (convolutions, matrix products), features not counted.

    Args:
        features: of waveforms (B, samples) and their lengths; None: the network's own.
    """
    from torch.utils.flop_counter import FlopCounterMode

    training, device = network.training, next(network.parameters()).device
    given = (features or network.features)(torch.zeros(1, round(seconds * SAMPLE_RATE), device=device), None)
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network.eval()(given)
    finally:
        network.train(training)
    return counter.get_total_flops() // 2


def statistics(frames: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Mean and standard deviation over the valid steps: (B, D, T) -> (B, 2D)."""
    variance, mean = padding.var_mean(frames, lengths)
    # The floor keeps the gradient of the root finite where a channel is constant.
    return torch.cat([mean, variance.clamp_min(1e-6).sqrt()], 1)[..., 0]


class ConvBlock(nn.Sequential):
    """1-d convolution (same length), ReLU, batch-norm: the layer of the TDNN family.

    Args:
        reflect: whether the edges are mirrored (SpeechBrain); else they are zeros.
        activation: instead of ReLU.
        groups: of channels, each convolved alone.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 1,
        dilation: int = 1,
        stride: int = 1,
        reflect: bool = False,
        activation: Callable[[], nn.Module] = nn.ReLU,
        groups: int = 1,
    ) -> None:
        self._edge = dilation * (kernel - 1) // 2
        edge = 0 if reflect else self._edge
        super().__init__(
            nn.Conv1d(inputs, outputs, kernel, stride, padding=edge, dilation=dilation, groups=groups),
            activation(),
            nn.BatchNorm1d(outputs),
        )
        self._reflect = reflect

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        if self._edge:
            x = padding.reflect(x, self._edge, lengths) if self._reflect else padding.mask(x, lengths)
        return super().forward(x)
