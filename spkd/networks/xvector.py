"""X-vector TDNN (Snyder et al., "X-vectors: robust DNN embeddings for speaker recognition", ICASSP 2018)."""

from __future__ import annotations

from torch import Tensor, nn

from spkd.networks.network import ConvBlock, Network, describe, statistics
from spkd.outputs.features import MELS


class XVector(Network):
    """Five frame layers (contexts 5, 3, 3, 1, 1 at dilations 1, 2, 3), statistics pooling, two segment layers.

    The paper's widths are 512, and 1500 before pooling; here they are `channels` C and 2C. The segment layers have the
    width of the embedding. C = 256 with embedding 192 has 0.93 M parameters.

    Levels: frames (B, T, 2C), stats (B, 4C), segment.a and embedding (B, E).
    """

    default_channels = 256
    takes_lengths = True

    def __init__(self, channels: int = default_channels, embedding: int = 192) -> None:
        super().__init__()
        self.settings = {"channels": channels, "embedding": embedding}
        wide = 2 * channels
        self.levels = describe(wide, {"stats": 2 * wide, "segment.a": embedding, "embedding": embedding})
        self.tdnn = nn.ModuleList(self.frame_layers(channels, wide))
        self.segment_a = nn.Linear(2 * wide, embedding)
        self.segment_b = nn.Sequential(nn.ReLU(), nn.BatchNorm1d(embedding), nn.Linear(embedding, embedding))

    @staticmethod
    def frame_layers(channels: int, wide: int) -> list[ConvBlock]:
        return [
            ConvBlock(MELS, channels, 5),
            ConvBlock(channels, channels, 3, dilation=2),
            ConvBlock(channels, channels, 3, dilation=3),
            ConvBlock(channels, channels),
            ConvBlock(channels, wide),
        ]

    def run(self, features: Tensor, lengths: Tensor | None = None) -> dict[str, Tensor]:
        frames = features
        for layer in self.tdnn:
            frames = layer(frames, lengths)
        stats = statistics(frames, lengths)
        segment_a = self.segment_a(stats)
        return {
            "frames": frames.transpose(1, 2),
            "stats": stats,
            "segment.a": segment_a,
            "embedding": self.segment_b(segment_a),
        }
