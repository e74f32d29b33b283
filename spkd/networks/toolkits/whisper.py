"""Whisper-PMFA (Zhao et al., Interspeech 2024, arXiv 2408.15585) as in WeSpeaker: the outputs of several blocks of
Whisper's encoder, joined, under attentive statistics."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from spkd.networks import padding
from spkd.networks.network import Network, describe
from spkd.networks.toolkits.encoded import Encoder
from spkd.networks.toolkits.pooling import Attentive
from spkd.outputs.features import HOP
from spkd.outputs.target import Target

STEPS = 1500  # positions of the encoder, of 20 ms each
STRIDE = 2  # frames of the input for each of the encoder


class Attention(nn.Module):
    """Self-attention over (B, T, D), of which keys have no bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self._heads = heads

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        layers = (self.query, self.key, self.value)
        query, key, value = (layer(x).unflatten(2, (self._heads, -1)).transpose(1, 2) for layer in layers)
        return self.out(scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Self-attention and feed-forward layer, each after layer-norm and with a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn, self.attn_ln = Attention(width, heads), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.mlp_ln = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attn(self.attn_ln(x), mask)
        return x + self.mlp(self.mlp_ln(x))


class WhisperEncoder(Encoder):
    """Whisper's encoder (Radford et al., ICML 2023, arXiv 2212.04356): two convolutions, positions, and blocks, of
    which several are joined under a layer-norm.

    Args:
        mels: bands F of the input.
        width: width D of the encoder.
        heads: number of heads of its attention.
        blocks: number of its blocks.
        first: number of the first block that is joined.
        last: number of the last one.
    Raises:
        ValueError: numbers that do not fit one another.

    Levels: frames.layerN (B, T / 2, D) of each joined block, counted from 0. At most 30 s.
    """

    def __init__(self, mels: int, width: int, heads: int, blocks: int, first: int, last: int) -> None:
        super().__init__()
        if not 0 <= first <= last < blocks:
            raise ValueError(f"layers {first} to {last} of {blocks}")
        if not 0 < heads <= width or width % heads:
            raise ValueError(f"{heads} heads do not fit a width of {width}")
        self._numbers = range(first, last + 1)
        wide = len(self._numbers) * width
        self.conv1 = nn.Conv1d(mels, width, 3, padding=1)
        self.conv2 = nn.Conv1d(width, width, 3, STRIDE, 1)
        self.positional_embedding: Tensor
        self.register_buffer("positional_embedding", torch.zeros(STEPS, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.ln_post2 = nn.LayerNorm(wide)
        # Windows of the features are centred on their first sample.
        self.frames = Target("frames", wide, STRIDE * HOP, HOP, centre=0)
        layers = [Target(f"frames.layer{i}", width, STRIDE * HOP, HOP, centre=0) for i in self._numbers]
        self.layers = {layer.name: layer for layer in layers}
        self.widest, self.longest = max(4 * wide, heads * STEPS), STRIDE * STEPS

    def forward(self, features: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        x = gelu(self.conv1(padding.mask(features, lengths)))
        x = gelu(self.conv2(padding.mask(x, lengths)))
        lengths = padding.strided(lengths, STRIDE)
        mask = None if lengths is None else padding.valid(x, lengths)[:, None]
        x = x.transpose(1, 2) + self.positional_embedding[: x.shape[2]]
        layers = {}
        for i, block in enumerate(self.blocks[: self._numbers[-1] + 1]):
            x = block(x, mask)
            if i in self._numbers:
                layers[f"frames.layer{i}"] = x
        return self.ln_post2(torch.cat(list(layers.values()), -1)).transpose(1, 2), lengths, layers


class PMFA(Network):
    """Attentive statistics with context, batch-norm, linear.

    Levels: frames (B, T, D) as they come, stats (B, 2D), embedding (B, E).
    """

    takes_lengths = True

    def __init__(self, width: int, embedding: int) -> None:
        super().__init__()
        self.pool, self.norm = Attentive(width, context=True), nn.BatchNorm1d(2 * width)
        self.project = nn.Linear(2 * width, embedding)
        self.levels = describe(width, {"stats": 2 * width, "embedding": embedding})
        self.widest = 3 * width

    def run(self, features: Tensor, lengths: Tensor | None = None) -> dict[str, Tensor]:
        stats = self.norm(self.pool(features, lengths))
        return {"frames": features.transpose(1, 2), "stats": stats, "embedding": self.project(stats)}
