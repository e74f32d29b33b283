"""Encoder of wav2vec 2.0 (Baevski et al., NeurIPS 2020), HuBERT and WavLM (Chen et al., IEEE JSTSP 2022): strided
convolutions over the samples, a convolution over positions, transformer layers.

Tensors are named as in torchaudio.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, scaled_dot_product_attention

from spkd.networks import padding

MOST_DISTANCE = 2**20  # steps; WavLM has 800


class ConvolutionLayer(nn.Module):
    """Convolution without padding, normalisation and GELU.

    Args:
        norm: "group_norm" (every channel over the time of a view), "layer_norm" (every step over its channels) or "".
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, bias: bool, norm: str) -> None:
        super().__init__()
        self.layer_norm: nn.Module | None = None
        if norm:
            self.layer_norm = nn.GroupNorm(outputs, outputs) if norm == "group_norm" else nn.LayerNorm(outputs)
        self.conv = nn.Conv1d(inputs, outputs, kernel, stride, bias=bias)

    def steps(self, lengths: Tensor | None) -> Tensor | None:
        """Number (B,) of valid steps of its output; None: all are valid."""
        return None if lengths is None else (lengths - self.conv.kernel_size[0]) // self.conv.stride[0] + 1

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        x, lengths = self.conv(x), self.steps(lengths)
        norm = self.layer_norm
        if isinstance(norm, nn.GroupNorm) and lengths is not None:
            variance, mean = padding.var_mean(x, lengths)
            x = (x - mean) / (variance + norm.eps).sqrt() * norm.weight[:, None] + norm.bias[:, None]
        elif isinstance(norm, nn.GroupNorm):
            x = norm(x)
        elif norm is not None:
            x = norm(x.transpose(1, 2)).transpose(1, 2)
        return gelu(x)


class Convolutions(nn.Module):
    """Strided convolutions: waveforms (B, samples) -> (B, T, C)."""

    def __init__(self, layers: list[list[int]], norm: str, bias: bool) -> None:
        super().__init__()
        inputs, built = 1, []
        for i, (outputs, kernel, stride) in enumerate(layers):
            kind = norm if norm == "layer_norm" or i == 0 else ""
            built.append(ConvolutionLayer(inputs, outputs, kernel, stride, bias, kind))
            inputs = outputs
        self.conv_layers: Any = nn.ModuleList(built)

    def steps(self, lengths: Tensor | None) -> Tensor | None:
        """Number (B,) of valid steps of views with `lengths` samples (B,); None: all are valid."""
        for layer in self.conv_layers:
            lengths = layer.steps(lengths)
        return lengths

    def forward(self, waves: Tensor, lengths: Tensor | None) -> Tensor:
        x = waves[:, None]
        for layer in self.conv_layers:
            x, lengths = layer(x, lengths), layer.steps(lengths)
        return x.transpose(1, 2)


class Projection(nn.Module):
    """Layer-norm and linear projection of the convolutions' output to the width of the transformer."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layer_norm, self.projection = nn.LayerNorm(inputs), nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(self.layer_norm(x))


class PositionalConvolution(nn.Module):
    """Grouped convolution over time, whose output has the length of its input."""

    def __init__(self, width: int, kernel: int, groups: int) -> None:
        super().__init__()
        conv = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=groups)
        self.conv = nn.utils.parametrizations.weight_norm(conv, name="weight", dim=2)

    def forward(self, x: Tensor) -> Tensor:
        return gelu(self.conv(x.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)


class Attention(nn.Module):
    """Self-attention with several heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"{heads} attention heads do not divide a width of {width}")
        self._heads = heads
        self.k_proj, self.v_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.q_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Output (B, T, D), and the bias unchanged.

        Args:
            x: (B, T, D).
            mask: (B, 1, 1, T) whether a step is attended to; None: all are.
            bias: bias of the positions, not used here.
        """
        q, k, v = (split(proj(x), self._heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(joined(scaled_dot_product_attention(q, k, v, mask))), bias


class RelativeAttention(nn.Module):
    """WavLM's self-attention: a learnt bias for every distance and head is gated in each layer by the layer's input.

    The first layer computes the bias for all.

    Args:
        width: width D of the input.
        buckets: number of classes of distances; None in all layers but the first.
        distance: distance from which all are in the last class.
    """

    _classes: Tensor

    def __init__(self, width: int, heads: int, buckets: int | None, distance: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"{heads} attention heads do not divide a width of {width}")
        if buckets is not None and not buckets // 4 < distance <= MOST_DISTANCE:
            raise ValueError(f"{buckets} classes of positions up to a distance of {distance}")
        self._heads, self._distance = heads, distance
        self.rel_attn_embed = None if buckets is None else nn.Embedding(buckets, heads)
        # On the device from the beginning: a step copies nothing from the host, which no CUDA graph can repeat.
        classes = None if buckets is None else classes_of_distances(buckets, distance)
        self.register_buffer("_classes", classes, persistent=False)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.gru_rel_pos_linear = nn.Linear(width // heads, 8)
        self.gru_rel_pos_const = nn.Parameter(torch.ones(1, heads, 1, 1))

    def forward(self, x: Tensor, mask: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Output (B, T, D), and the bias for the next layer.

        Args:
            x: (B, T, D).
            mask: (B, 1, 1, T) whether a step is attended to; None: all are.
            bias: (1, heads, T, T) bias of the positions; None in the first layer, which computes it.
        """
        if self.rel_attn_embed is not None and bias is None:
            step = torch.arange(x.shape[1], device=x.device)
            offset = (step[None, :] - step[:, None]).clamp(-self._distance, self._distance)
            bias = self.rel_attn_embed(self._classes[offset + self._distance]).permute(2, 0, 1)[None]
        assert bias is not None
        gates = self.gru_rel_pos_linear(split(x, self._heads)).unflatten(-1, (2, 4)).sum(-1).sigmoid()
        first, second = gates.chunk(2, -1)
        gated = (first * (second * self.gru_rel_pos_const - 1.0) + 2.0) * bias
        if mask is not None:
            gated = gated.masked_fill(~mask, -torch.inf)
        layer = self.attention
        projected = linear(x, layer.in_proj_weight, layer.in_proj_bias)
        q, k, v = (split(values, self._heads) for values in projected.chunk(3, -1))
        return layer.out_proj(joined(scaled_dot_product_attention(q, k, v, gated.to(q.dtype)))), bias


def classes_of_distances(buckets: int, distance: int) -> Tensor:
    """Class (2 distance + 1) of each offset from -`distance` to `distance`; those beyond have the classes of the ends.

    Half of the classes are for each sign. In each half, every short distance has its own class, and the longer
    distances share logarithmic classes (WavLM's code).
    """
    offset = torch.arange(-distance, distance + 1)
    half, far = buckets // 2, offset.abs()
    exact = half // 2
    scaled = torch.log(far.float() / exact) / math.log(distance / exact) * (half - exact)
    logarithmic = (exact + scaled.long()).clamp_max(half - 1)
    return (offset > 0).long() * half + torch.where(far < exact, far, logarithmic)


def split(x: Tensor, heads: int) -> Tensor:
    """(B, T, D) -> (B, heads, T, D / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    """(B, heads, T, D) -> (B, T, heads * D)."""
    return x.transpose(1, 2).flatten(2)


class FeedForward(nn.Module):
    """Feed-forward layer with GELU.

    Args:
        inner: width between the two linear layers.
        approximate: approximation of GELU, "none" or "tanh".
    """

    def __init__(self, width: int, inner: int, approximate: str = "none") -> None:
        super().__init__()
        self.intermediate_dense, self.output_dense = nn.Linear(width, inner), nn.Linear(inner, width)
        self._approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        return self.output_dense(gelu(self.intermediate_dense(x), approximate=self._approximate))


class Layer(nn.Module):
    """Transformer layer: attention and feed-forward, each with a shortcut around it.

    Args:
        first: whether normalisation comes before attention and feed-forward; else after them.
    """

    def __init__(self, attention: nn.Module, width: int, inner: int, first: bool) -> None:
        super().__init__()
        self.attention, self.layer_norm = attention, nn.LayerNorm(width)
        self.feed_forward: Any = FeedForward(width, inner)
        self.final_layer_norm, self._first = nn.LayerNorm(width), first

    def forward(self, x: Tensor, mask: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        attended, bias = self.attention(self.layer_norm(x) if self._first else x, mask, bias)
        x = x + attended
        if self._first:
            return x + self.feed_forward(self.final_layer_norm(x)), bias
        x = self.layer_norm(x)
        return self.final_layer_norm(x + self.feed_forward(x)), bias


class Transformer(nn.Module):
    """Positional convolution and transformer layers.

    A further layer-norm comes at the end where the layers normalise first, else at the beginning.

    Args:
        shape: widths and depths (torchaudio's names).
        relative: whether attention is WavLM's.
    """

    def __init__(self, shape: dict[str, Any], layers: int, relative: bool) -> None:
        super().__init__()
        width, heads = shape["encoder_embed_dim"], shape["encoder_num_heads"]
        inner, self.norm_last = shape["encoder_ff_interm_features"], bool(shape["encoder_layer_norm_first"])
        kernel, groups = shape["encoder_pos_conv_kernel"], shape["encoder_pos_conv_groups"]
        self.pos_conv_embed = PositionalConvolution(width, kernel, groups)
        self.layer_norm = nn.LayerNorm(width)
        buckets, distance = shape.get("encoder_num_buckets", 320), shape.get("encoder_max_distance", 800)
        built = []
        for i in range(layers):
            attention = (
                RelativeAttention(width, heads, None if i else buckets, distance)
                if relative
                else Attention(width, heads)
            )
            built.append(Layer(attention, width, inner, self.norm_last))
        self.layers: Any = nn.ModuleList(built)

    def forward(self, x: Tensor, lengths: Tensor | None) -> list[Tensor]:
        """Input of the first layer, and output of each layer: (B, T, D) each."""
        mask = None
        if lengths is not None:
            x = padding.mask(x.transpose(1, 2), lengths).transpose(1, 2)
            mask = padding.valid(x.transpose(1, 2), lengths)[:, None]
        x = x + self.pos_conv_embed(x)
        hidden = [x if self.norm_last else self.layer_norm(x)]
        bias = None
        for layer in self.layers:
            x, bias = layer(hidden[-1], mask, bias)
            hidden.append(x)
        if self.norm_last:
            hidden[-1] = self.layer_norm(hidden[-1])
        return hidden


def of_transformers(model: Any, layers: int) -> dict[str, dict[str, Tensor]]:
    """Weights of a transformers model under the names of this module, for convolutions, projection and transformer."""
    state = dict(model.encoder.state_dict())
    kept = {n: v for n, v in state.items() if not n.startswith("layers.") or int(n.split(".")[1]) < layers}
    if model.config.model_type == "wavlm":
        for i in range(layers):
            theirs, ours = f"layers.{i}.attention", f"layers.{i}.attention.attention"
            for kind in ("weight", "bias"):
                parts = [kept.pop(f"{theirs}.{name}_proj.{kind}") for name in ("q", "k", "v")]
                kept[f"{ours}.in_proj_{kind}"] = torch.cat(parts)
                kept[f"{ours}.out_proj.{kind}"] = kept.pop(f"{theirs}.out_proj.{kind}")
    return {
        "convolutions": dict(model.feature_extractor.state_dict()),
        "project": dict(model.feature_projection.state_dict()),
        "transformer": kept,
    }
