"""Base class of student networks, and layers that several of them share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spkd.corpus.audio import SAMPLE_RATE
from spkd.networks import padding
from spkd.networks.settings import StudentConfig
from spkd.outputs.features import FBANK, HOP, WINDOW, input_features
from spkd.outputs.target import EMBEDDING, Target

FRAME_LEVEL = "frames"


class Network(nn.Module):
    """Base class of networks: features (B, T, F) -> levels by name: `frames` (B, U, D), every other level (B, D).

    A new architecture is a subclass in a file of its own and its name in spkd.registry.STUDENTS.

    Attributes:
        input_kind: kind of its input features: 80 mel bands every 10 ms, or samples in rows of 160.
        levels: description of its outputs, as for a teacher: the width D of every level, and the times of the frames.
        settings: arguments with which `build` makes the same network.
        widest: numbers in its widest layer for each 10 ms, which determine its memory.
        longest: number of feature frames of the longest view that it takes; None: any.
        default_channels: width unless another is asked for.
        adapters: whether it has a second path, through adapters (see `forward`).
        takes_lengths: whether views of different lengths can share a batch without changing their outputs.
        strided: whether its layers stride over the frames of a fbank, which converters for phones take for one length
            alone.
        nested: sizes at which the embedding was trained to be usable by its first numbers alone; (): the whole.
    """

    input_kind: Target = FBANK
    levels: dict[str, Target]
    settings: dict[str, Any]
    widest: int = 4096
    longest: int | None = None
    default_channels: int
    adapters: bool = False
    takes_lengths: bool = False
    nested: tuple[int, ...] = ()

    @classmethod
    def from_pretrained(cls, source: str, config: StudentConfig) -> Network | None:
        """Student initialised from a model of another library; None for architectures without this.

        Args:
            source: folder or hub id of the model.
        """
        return None

    def renamed(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of the same architecture under the names of this network."""
        return weights

    def take(self, kind: Target) -> None:
        """Use the fbank of another toolkit. Its windows determine those of the frames."""
        self.levels = {name: level.after(self.input_kind, kind) for name, level in self.levels.items()}
        self.input_kind = kind

    def keep(self, size: int) -> None:
        """Keep the first numbers of the embedding alone, as the embedding.

        A hook does it, since some networks have a `forward` of their own.
        """
        self.levels = self.levels | {EMBEDDING: replace(self.levels[EMBEDDING], dim=size)}
        self.register_forward_hook(partial(_first_numbers, size))

    def features(self, waves: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Input features (B, T, F) of waveforms (B, samples) at 16 kHz; lengths as for `input_features`."""
        return input_features(self.input_kind, waves, lengths)

    def forward(self, features: Tensor, plain: int = 0, lengths: Tensor | None = None) -> dict[str, Tensor]:
        """Levels by name, of features that are first mean-normalised per crop (the field's usual front end).

        Args:
            features: (B, T, F).
            plain: number of views, at the beginning of the batch, that take the path without adapters, where there are
                any.
            lengths: (B,) number of valid feature frames of each view, where shorter views are padded; None: all frames
                are valid. Output frames that come from padding are undefined.
        """
        features = features.transpose(1, 2)
        features = features - padding.mean(features, lengths)
        return self.run(features) if lengths is None else self.run(features, lengths)

    @abstractmethod
    def run(self, features: Tensor, lengths: Tensor | None = None) -> dict[str, Tensor]:
        """Levels from mean-normalised features (B, 80, T); lengths as for `forward`."""


def _first_numbers(size: int, network: nn.Module, given: object, levels: dict[str, Tensor]) -> dict[str, Tensor]:
    return levels | {EMBEDDING: levels[EMBEDDING][:, :size]}


def describe(frames: int, vectors: dict[str, int], stride: int = 1) -> dict[str, Target]:
    """Description of levels by name.

    Args:
        frames: width of the frames.
        vectors: widths of the vectors, by name.
        stride: number of fbank frames for each frame.
    """
    levels = {FRAME_LEVEL: Target(FRAME_LEVEL, frames, stride * HOP, WINDOW)}
    return levels | {name: Target(name, dim) for name, dim in vectors.items()}


def forward_crops(network: Callable[..., dict[str, Tensor]], crops: list[Tensor]) -> list[dict[str, Tensor]]:
    """Levels of each of several crops (B, T_i, F). Neighbours of equal length go through the network together."""
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
        if last - first == 1:  # the gradient of a chunk is a copy, even where there is only one
            outputs.append(levels)
            continue
        chunks = {name: values.chunk(last - first) for name, values in levels.items()}
        outputs.extend({name: values[i] for name, values in chunks.items()} for i in range(last - first))
    return outputs


def _time_last(gradient: Tensor | None) -> Tensor | None:
    """Gradient of frames with time last in memory, as convolutions have it.

    With another layout every layer below takes longer on a CPU. A compiled network passes None where no loss takes the
    frames.
    """
    return None if gradient is None else gradient.mT.contiguous().mT


def count_parameters(module: nn.Module) -> int:
    """Number of parameters of a module."""
    return sum(p.numel() for p in module.parameters())


def count_macs(
    network: Network, seconds: float = 1.0, features: Callable[[Tensor, Tensor | None], Tensor] | None = None
) -> int:
    """Multiply-accumulates (convolutions and matrix products) for one view, without its features.

    Args:
        features: function from waveforms (B, samples) and their lengths to features; None: the network's.
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
    """Layer of the TDNN family: 1-d convolution (same length), ReLU, batch-norm.

    Args:
        reflect: whether the edges are padded by reflection (SpeechBrain); else with zeros.
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
