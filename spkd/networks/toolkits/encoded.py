"""Speaker network on the frames of a speech encoder, as WeSpeaker puts them together."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace

from torch import Tensor, nn

from spkd.networks import padding
from spkd.networks.network import Network
from spkd.networks.resnet import FLOOR
from spkd.outputs.features import HOP
from spkd.outputs.target import Target


class Encoder(nn.Module):
    """Base class of speech encoders.

    Attributes:
        frames: description of the output: width, times and hop.
        layers: descriptions of the outputs of single layers, by name.
        widest: numbers in its widest layer for each 10 ms.
        longest: number of feature frames of the longest view that it takes; None: any.
    """

    frames: Target
    layers: dict[str, Target]
    widest: int
    longest: int | None = None

    @abstractmethod
    def forward(self, features: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Output (B, D, U), the number (B,) of its valid frames, and outputs (B, U, D) of layers by name.

        Args:
            features: (B, F, T).
            lengths: (B,) number of valid feature frames of each view; None: all are valid.
        """


class Encoded(Network):
    """Speaker network that takes the frames of an encoder.

    Args:
        encoder: the encoder, which takes features as they are, not mean-normalised.
        network: the speaker network, whose bands are the channels of the encoder.
        taken: the features of the encoder.
        centred: whether the mean over time is subtracted from the encoder's frames (WeSpeaker's `cmvn`).
        scaled: whether they are then divided by their standard deviation (`norm_var`).

    Levels: those of the network, and the layers of the encoder.
    """

    def __init__(
        self, encoder: Encoder, network: Network, taken: Target, centred: bool = True, scaled: bool = False
    ) -> None:
        super().__init__()
        self.encoder, self.network, self._centred, self._scaled = encoder, network, centred, scaled
        self.input_kind, self.takes_lengths = taken, network.takes_lengths
        self.levels = {name: _on(level, network.input_kind, encoder.frames) for name, level in network.levels.items()}
        self.levels |= encoder.layers
        hop = encoder.frames.hop or HOP
        self.widest, self.longest = max(encoder.widest, network.widest * HOP // hop), encoder.longest

    def forward(self, features: Tensor, plain: int = 0, lengths: Tensor | None = None) -> dict[str, Tensor]:
        return self.run(features.transpose(1, 2), lengths)

    def run(self, features: Tensor, lengths: Tensor | None = None) -> dict[str, Tensor]:
        frames, lengths, layers = self.encoder(features, lengths)
        if self._centred or self._scaled:
            variance, mean = padding.var_mean(frames, lengths, correction=1)
            frames = frames - mean if self._centred else frames
            frames = frames / (variance + FLOOR).sqrt() if self._scaled else frames
        return self.network.run(frames, lengths) | layers


def _on(level: Target, taken: Target, given: Target) -> Target:
    """Description of a level of a network whose input frames are those of an encoder.

    Args:
        level: level of the network on its own features.
        taken: these features.
        given: the frames of the encoder.
    """
    if level.hop is None or taken.hop is None or given.hop is None:
        return level
    steps = given.hop / taken.hop
    window = given.window + round((level.window - taken.window) * steps)
    centre = round(given.middle + (level.middle - taken.middle) * steps)
    return replace(level, hop=round(level.hop * steps), window=window, centre=centre)
