"""Extended TDNN (Snyder et al., "Speaker recognition for multi-speaker conversations using x-vectors", ICASSP
2019, table 1)."""

from __future__ import annotations

from spkd.networks.network import ConvBlock
from spkd.networks.xvector import XVector
from spkd.outputs.features import MELS


class ETDNN(XVector):
    """Extended TDNN: four convolutions (contexts 5, 3, 3, 3 at dilations 1, 2, 3, 4), a dense layer after each, two
    more dense layers, statistics pooling, two segment layers.

    The paper's widths are 512, and 1500 before pooling; here they are `channels` C and 2C. The segment layers have the
    width of the embedding.

    Levels: frames (B, T, 2C), stats (B, 4C), segment.a and embedding (B, E).
    """

    default_channels = 208

    def __init__(self, channels: int = default_channels, embedding: int = 192) -> None:
        super().__init__(channels, embedding)

    @staticmethod
    def frame_layers(channels: int, wide: int) -> list[ConvBlock]:
        layers: list[ConvBlock] = []
        for inputs, kernel, dilation in ((MELS, 5, 1), (channels, 3, 2), (channels, 3, 3), (channels, 3, 4)):
            layers += [ConvBlock(inputs, channels, kernel, dilation), ConvBlock(channels, channels)]
        return [*layers, ConvBlock(channels, channels), ConvBlock(channels, wide)]
