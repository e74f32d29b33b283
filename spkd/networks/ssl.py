"""A student in the shape of a self-supervised teacher."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import elu, layer_norm, pad

from spkd.errors import UsageError, first_line
from spkd.networks import padding
from spkd.networks.encoder import Convolutions, Projection, Transformer, of_transformers
from spkd.networks.network import FRAME_LEVEL, Network, statistics
from spkd.networks.settings import StudentConfig
from spkd.outputs.features import WAVE
from spkd.outputs.target import Target

CONVOLUTIONS = ((10, 5), *((3, 2),) * 4, *((2, 2),) * 2)  # kernel and stride: 25 ms windows every 20 ms
HOP, WINDOW = 320, 400  # samples
FAMILIES = ("wav2vec2", "hubert", "wavlm")
HEAD_WIDTH = 64  # of attention
NOISE = (0.1, 0.5)  # standard deviation of the adapters' noise, in mean magnitudes: drawn between these


class Noise(nn.Module):
    """Gaussian noise added while training, of a deviation between 0.1 and 0.5 of the mean magnitude of the batch
    (OS-KDFT's code): (B, T, C) -> (B, T, C)."""

    def forward(self, hidden: Tensor) -> Tensor:
        if not self.training:
            return hidden
        low, high = NOISE
        share = low + (high - low) * torch.rand((), device=hidden.device)
        return hidden + share * self.deviation(hidden) * self.normal(hidden)

    def deviation(self, hidden: Tensor) -> Tensor:
        """The mean magnitude of a batch, without gradient: ()."""
        return hidden.detach().abs().mean()

    def normal(self, hidden: Tensor) -> Tensor:
        """Standard normal numbers for every place of a batch."""
        return torch.randn_like(hidden)


class Adapted(nn.Module):
    """A feed-forward layer with an adapter parallel to it: linear, ELU, noise while training, linear.

    The last weights begin at zero, so that the adapter changes nothing at first (OS-KDFT's variant for XLSR).
    """

    def __init__(self, feed_forward: nn.Module, width: int, bottleneck: int) -> None:
        super().__init__()
        self.feed_forward = feed_forward
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        self.noise = Noise()
        self.taken: Tensor | None = None  # (B,) which views go through the adapter; None: all

    def forward(self, x: Tensor) -> Tensor:
        change = self.up(self.noise(elu(self.down(x))))
        if self.taken is not None:
            change = torch.where(self.taken[:, None, None], change, 0.0)
        return self.feed_forward(x) + change


class SSLStudent(Network):
    """Strided convolutions on the waveform, transformer layers, learnt weights over all their outputs, mean and
    standard deviation over time, linear with batch-norm: DistilHuBERT's shape (Chang et al., ICASSP 2022) with the
    pooling of OS-KDFT (Heo et al., Interspeech 2023, arXiv 2305.17394).

    C is the width of the transformer (a multiple of 64, or less); the convolutions have 2/3 of it unless `shape` comes
    from a teacher. C = 192 with 2 layers has 1.5 M parameters.

    Args:
        adapters: their width, 0 for none. With adapters the network has two paths: `forward(features, adapted)` takes
            the one through them for the views where `adapted`, and for all without it.
        relative: WavLM's gated relative positions. shape: widths and depths of the encoder (torchaudio's names).

    Levels: frames (B, T, C) every 20 ms, stats (B, 2C), embedding (B, E).
    """

    input_kind = WAVE
    takes_lengths = True
    default_channels = 192

    def __init__(
        self,
        channels: int = default_channels,
        embedding: int = 192,
        layers: int = 2,
        adapters: int = 0,
        relative: bool = False,
        shape: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if shape is None and channels % HEAD_WIDTH and channels not in (16, 32, 48):
            raise ValueError(f"student.channels={channels}: ssl needs 16, 32, 48 or a multiple of {HEAD_WIDTH}")
        if layers < 1:
            raise ValueError(f"student.ssl.layers={layers}: at least 1")
        shape = dict(shape or _shape(channels))
        self.settings = {"channels": channels, "embedding": embedding, "layers": layers, "adapters": adapters}
        self.settings |= {"relative": relative, "shape": shape}
        self.levels = {
            FRAME_LEVEL: Target(FRAME_LEVEL, channels, HOP, WINDOW),
            **{name: Target(name, dim) for name, dim in (("stats", 2 * channels), ("embedding", embedding))},
        }
        self.widest = shape["extractor_conv_layer_config"][0][0] * HOP // 2 // CONVOLUTIONS[0][1]
        self.adapters = adapters > 0
        convolutions = shape["extractor_conv_layer_config"]
        self.convolutions = Convolutions(convolutions, shape["extractor_mode"], shape["extractor_conv_bias"])
        self.project = Projection(convolutions[-1][0], shape["encoder_embed_dim"])
        self.transformer = Transformer(shape, layers, relative)
        if self.adapters:
            for layer in self.transformer.layers:
                layer.feed_forward = Adapted(layer.feed_forward, channels, adapters)
        self.layer_weights = nn.Parameter(torch.zeros(layers + 1))
        self.embed = nn.Linear(2 * channels, embedding)
        self.norm = nn.BatchNorm1d(embedding)

    @classmethod
    def from_pretrained(cls, source: str, config: StudentConfig) -> SSLStudent:
        return from_teacher(source, config.embedding, config.settings.layers, config.settings.adapters)

    def renamed(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        # Adapters come new to layers that were trained without.
        own = self.state_dict()
        return {beside_adapter(k) if k not in own and beside_adapter(k) in own else k: v for k, v in weights.items()}

    def forward(
        self, features: Tensor, adapted: Tensor | None = None, lengths: Tensor | None = None
    ) -> dict[str, Tensor]:
        if adapted is not None:
            self._take(adapted)
        try:
            levels = self.run(features, lengths)
        finally:
            if adapted is not None:
                self._take(None)
        if adapted is None:
            return levels | {"embedding": self.norm(self.embed(levels["stats"]))}
        # The two paths have statistics of their own; those kept for evaluation are the adapters'.
        vectors = self.embed(levels["stats"])
        embedding = vectors.new_empty(vectors.shape)
        embedding[adapted] = self.norm(vectors[adapted])
        with _kept_statistics(self.norm):
            embedding[~adapted] = self.norm(vectors[~adapted])
        return levels | {"embedding": embedding}

    def run(self, features: Tensor, lengths: Tensor | None = None) -> dict[str, Tensor]:
        samples = None if lengths is None else lengths * WAVE.dim
        hidden, lengths = self.hidden(features.flatten(1), samples), self._steps(samples)
        weights = self.layer_weights.softmax(0)
        mixed = sum(weight * layer for weight, layer in zip(weights, hidden, strict=True))
        assert isinstance(mixed, Tensor)
        return {"frames": hidden[-1], "stats": statistics(mixed.transpose(1, 2), lengths)}

    def hidden(self, waves: Tensor, lengths: Tensor | None = None) -> list[Tensor]:
        """Waveforms (B, samples) -> the input of the transformer and the output of each layer, (B, T, C)."""
        if lengths is None:
            waves = layer_norm(waves, waves.shape[-1:])
        else:
            variance, mean = padding.var_mean(waves, lengths)
            waves = padding.mask((waves - mean) / (variance + 1e-5).sqrt(), lengths)
        if waves.shape[1] < WINDOW:
            waves = pad(waves, (0, WINDOW - waves.shape[1]))
        whole = None if lengths is None else lengths.clamp_min(WINDOW)
        return self.transformer(self.project(self.convolutions(waves, whole)), self._steps(lengths))

    def _steps(self, samples: Tensor | None) -> Tensor | None:
        """Frames of views of so many samples; a view shorter than one window is one, with zeros behind it."""
        return None if samples is None else self.convolutions.steps(samples.clamp_min(WINDOW))

    def _take(self, adapted: Tensor | None) -> None:
        for layer in self.transformer.layers:
            if self.adapters:
                layer.feed_forward.taken = adapted


@contextmanager
def _kept_statistics(norm: nn.BatchNorm1d) -> Iterator[None]:
    """Inside, a batch-norm normalises by the batch while training, and does not remember it."""
    momentum, norm.momentum = norm.momentum, 0.0
    try:
        yield
    finally:
        norm.momentum = momentum


def _shape(channels: int) -> dict[str, Any]:
    """A base model's shape at another width."""
    narrow = max(2 * channels // 3, 32)
    return {
        "extractor_mode": "group_norm",
        "extractor_conv_layer_config": [[narrow, kernel, stride] for kernel, stride in CONVOLUTIONS],
        "extractor_conv_bias": False,
        "encoder_embed_dim": channels,
        "encoder_projection_dropout": 0.0,
        "encoder_pos_conv_kernel": 128,
        "encoder_pos_conv_groups": 16,
        "encoder_num_heads": max(channels // HEAD_WIDTH, 1),
        "encoder_attention_dropout": 0.0,
        "encoder_ff_interm_features": 4 * channels,
        "encoder_ff_interm_dropout": 0.0,
        "encoder_dropout": 0.0,
        "encoder_layer_norm_first": False,
        "encoder_layer_drop": 0.0,
    }


def from_teacher(source: str, embedding: int, layers: int, adapters: int) -> SSLStudent:
    """A student initialised from the convolutions and the first `layers` layers of a transformers model (wav2vec 2.0,
    HuBERT, WavLM).

    Args:
        source: a folder or a hub id.
    Raises:
        UsageError: transformers is missing, no such model, or one with fewer layers.
    """
    try:
        from transformers import AutoModel
    except ImportError as error:
        raise UsageError(f"student.init={source} needs transformers: pip install 'spkd[teachers]'") from error
    try:
        teacher = AutoModel.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for a damaged or unknown model
        if (problem := broken_torchaudio(error)) is not None:
            raise UsageError(problem) from error
        raise UsageError(
            f"student.init={source}: neither a student trained by spkd, nor a local model folder, nor a reachable hub "
            f"id ({first_line(error)})"
        ) from error
    config = teacher.config
    if config.model_type not in FAMILIES:
        raise UsageError(
            f"student.init={source}: a {config.model_type} model; ssl can be initialised from {', '.join(FAMILIES)}"
        )
    if list(zip(config.conv_kernel, config.conv_stride, strict=False)) != list(CONVOLUTIONS):
        raise UsageError(f"student.init={source}: its convolutions are not those of wav2vec 2.0 (25 ms every 20 ms)")
    if layers > config.num_hidden_layers:
        raise UsageError(f"student.ssl.layers={layers}: {source} has {config.num_hidden_layers}")
    relative = config.model_type == "wavlm"
    shape = _shape(config.hidden_size) | {
        "extractor_mode": f"{config.feat_extract_norm}_norm",
        "extractor_conv_layer_config": [
            list(layer) for layer in zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True)
        ],
        "extractor_conv_bias": config.conv_bias,
        "encoder_pos_conv_kernel": config.num_conv_pos_embeddings,
        "encoder_pos_conv_groups": config.num_conv_pos_embedding_groups,
        "encoder_num_heads": config.num_attention_heads,
        "encoder_ff_interm_features": config.intermediate_size,
        "encoder_layer_norm_first": config.do_stable_layer_norm,
    }
    if relative:
        shape |= {"encoder_num_buckets": config.num_buckets, "encoder_max_distance": config.max_bucket_distance}
    try:
        student = SSLStudent(config.hidden_size, embedding, layers, 0, relative, shape)
        for name, tensors in of_transformers(teacher, layers).items():
            getattr(student, name).load_state_dict(tensors)
        with torch.no_grad():  # some values are looked at only when it runs
            student.eval()(torch.zeros(1, 100, WAVE.dim))
        student.train()
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError, AssertionError) as error:
        raise UsageError(f"student.init={source}: a shape that ssl cannot have ({first_line(error)})") from error
    if not adapters:
        return student
    adapted = SSLStudent(config.hidden_size, embedding, layers, adapters, relative, shape)
    weights = student.state_dict().items()
    adapted.load_state_dict({beside_adapter(k): v for k, v in weights}, strict=False)
    return adapted


def beside_adapter(name: str) -> str:
    """The name of a layer's weight once the layer has an adapter."""
    return name.replace(".feed_forward.", ".feed_forward.feed_forward.")


def broken_torchaudio(error: Exception) -> str | None:
    """What to do where transformers fails because it imports a torchaudio that is not for this torch; else None."""
    if not isinstance(error, OSError) or "torchaudio" not in str(error):
        return None
    return (
        f"transformers cannot be used: the torchaudio that is installed does not import beside torch "
        f"{torch.__version__}; pip uninstall torchaudio (spkd does not need it)"
    )
