"""w2v-BERT 2.0 with adapters on all of its layers (Li et al., 2025, arXiv 2510.04213), as in WeSpeaker."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spkd.networks import padding
from spkd.networks.network import FRAME_LEVEL, Network
from spkd.networks.toolkits.pooling import AttentiveReLU
from spkd.outputs.features import HOP, WINDOW
from spkd.outputs.target import Target

PAIR = 2  # frames of fbank for each frame of the encoder
ATTENTION_BYTES = 1 << 31  # largest memory of the attention of one layer for one view


class W2VBertMFA(Network):
    """w2v-BERT 2.0 through transformers; an adapter on each of its last layers; attentive statistics of all, joined.

    Args:
        config: settings of transformers' Wav2Vec2BertConfig that differ from its defaults.
        adapted: number of adapters, on as many last outputs of the encoder, of which the input of its first layer is
            one.
        width: width A of an adapter.
        padded: whether a last fbank frame without a partner makes a frame, as WeSpeaker has it: the attention and the
            convolutions do not take it, while the adapters and the pooling do. Else it is dropped.

    Levels: frames.layer0..N (B, T / 2, D), where layer 0 is the input of the first layer, frames (B, T / 2, A L), stats
    (B, 2 A L), embedding (B, E). fbank is normalised to zero mean and unit variance for each view and band.
    """

    takes_lengths = True

    def __init__(self, config: dict[str, Any], adapted: int, width: int, embedding: int, padded: bool = True) -> None:
        super().__init__()
        from transformers import Wav2Vec2BertConfig, Wav2Vec2BertModel

        # Without masks in training, the model has no vector for masked frames.
        settings = Wav2Vec2BertConfig(**(config | {"mask_time_prob": 0.0, "mask_feature_prob": 0.0}))
        if not 1 <= adapted <= settings.num_hidden_layers + 1:
            raise ValueError(f"{adapted} adapters on {settings.num_hidden_layers} layers")
        self.encoder = Wav2Vec2BertModel(settings)
        dim, wide = settings.hidden_size, adapted * width
        self.adapter_layers = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, width), nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, width))
            for _ in range(adapted)
        )
        self.pool, self.project = AttentiveReLU(wide, width), nn.Linear(2 * wide, embedding)
        self._padded = padded
        # The first frame is made of two windows; where the last one may lack its partner, one window is enough.
        window, centre = (WINDOW if padded else WINDOW + HOP), (WINDOW + HOP) // 2
        widths = {f"frames.layer{i}": dim for i in range(settings.num_hidden_layers + 1)} | {FRAME_LEVEL: wide}
        self.levels = {n: Target(n, size, PAIR * HOP, window, centre=centre) for n, size in widths.items()}
        self.levels |= {"stats": Target("stats", 2 * wide), "embedding": Target("embedding", embedding)}
        self.widest = max(4 * dim, wide)
        # Attention has a number for every pair of frames and every head.
        self.longest = PAIR * int((ATTENTION_BYTES / (4 * settings.num_attention_heads)) ** 0.5)

    def forward(self, features: Tensor, plain: int = 0, lengths: Tensor | None = None) -> dict[str, Tensor]:
        return self.run(features.transpose(1, 2), lengths)

    def run(self, features: Tensor, lengths: Tensor | None = None) -> dict[str, Tensor]:
        # As SeamlessM4TFeatureExtractor: every band to zero mean and unit variance of the sample, then pairs of frames.
        variance, mean = padding.var_mean(features, lengths, correction=1)
        bands = padding.mask((features - mean) / (variance + 1e-7).sqrt(), lengths)
        counts = torch.full((len(bands),), bands.shape[2], device=bands.device) if lengths is None else lengths
        odd = bands.shape[2] % PAIR
        bands = nn.functional.pad(bands, (0, odd)) if self._padded else bands[..., : bands.shape[2] - odd]
        pairs = bands.transpose(1, 2).unflatten(1, (-1, PAIR)).flatten(2)
        whole = counts // PAIR  # pairs of which both frames are there
        mask = padding.valid(pairs.mT, whole)[:, 0].long()
        hidden = self.encoder(pairs, attention_mask=mask, output_hidden_states=True).hidden_states
        levels = {f"frames.layer{i}": states for i, states in enumerate(hidden)}
        last = hidden[-len(self.adapter_layers) :]
        frames = torch.cat([layer(states) for layer, states in zip(self.adapter_layers, last, strict=True)], -1)
        stats = self.pool(frames.transpose(1, 2), (counts + 1) // PAIR if self._padded else whole)
        return levels | {"frames": frames, "stats": stats, "embedding": self.project(stats)}


def shape_of(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Settings of transformers' Wav2Vec2BertConfig that the shapes of its weights tell.

    Args:
        tensors: weights by transformers' names.
    Raises:
        KeyError: a weight is lacking.
    """
    attention = "encoder.layers.0.self_attn.distance_embedding.weight"
    dim, bands = tensors["feature_projection.projection.weight"].shape
    depth = 0
    while f"encoder.layers.{depth}.ffn1.intermediate_dense.weight" in tensors:
        depth += 1
    return {
        "hidden_size": dim,
        "feature_projection_input_dim": bands,
        "num_hidden_layers": depth,
        "num_attention_heads": dim // tensors[attention].shape[1],
        "intermediate_size": len(tensors["encoder.layers.0.ffn1.intermediate_dense.weight"]),
        "conv_depthwise_kernel_size": tensors["encoder.layers.0.conv_module.depthwise_conv.weight"].shape[2],
    }


def merged(tensors: dict[str, Tensor], alpha: float | None) -> dict[str, Tensor]:
    """Weights of the encoder with LoRA's products added (Hu et al., ICLR 2022: W + alpha / r B A, in float64).

    Args:
        tensors: weights by transformers' names, or by those of peft around it.
        alpha: scale alpha; None: unknown.
    Raises:
        ValueError: there is LoRA whose scale is not known, or on something else than linear layers.
        KeyError: a weight is lacking.
    """
    plain = {name.removeprefix("base_model.model."): values for name, values in tensors.items()}
    result = {}
    for name, values in plain.items():
        if ".lora_" in name:
            continue
        layer, _, kind = name.rpartition(".base_layer.")
        if not layer:
            result[name] = values
            continue
        result[f"{layer}.{kind}"] = values
        if kind == "weight" and f"{layer}.lora_A.default.weight" in plain:
            down, up = (plain[f"{layer}.lora_{part}.default.weight"].double() for part in "AB")
            if alpha is None or values.dim() != 2:
                raise ValueError(f"LoRA of {layer}, whose scale or kind is not known")
            result[f"{layer}.{kind}"] = (values.double() + alpha / len(down) * (up @ down)).float()
    return result
