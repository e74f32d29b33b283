"""Student with the architecture of a self-supervised teacher."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import elu, layer_norm, pad

from spkd.corpus.audio import SAMPLE_RATE
from spkd.errors import SpkdError, UsageError, first_line
from spkd.files.reading import check_folder
from spkd.networks import padding
from spkd.networks.encoder import Convolutions, Projection, Transformer, of_transformers
from spkd.networks.network import FRAME_LEVEL, Network, statistics
from spkd.networks.settings import StudentConfig
from spkd.outputs.features import MELS, WAVE
from spkd.outputs.target import Target

CONVOLUTIONS = ((10, 5), *((3, 2),) * 4, *((2, 2),) * 2)  # kernels and strides: 25 ms windows every 20 ms
HOP, WINDOW = 320, 400  # samples
FAMILIES = ("wav2vec2", "hubert", "wavlm")
# Settings of config.json with the values that the network has.
FIXED = {
    "hidden_act": "gelu",
    "feat_extract_activation": "gelu",
    "layer_norm_eps": 1e-5,
    "feat_proj_layer_norm": True,
    "conv_pos_batch_norm": False,
    "adapter_attn_dim": None,
}
EXTRACTOR = {"sampling_rate": SAMPLE_RATE, "num_mel_bins": MELS, "stride": 2}  # likewise of preprocessor_config.json
HEAD_WIDTH = 64  # width of a head of attention
NOISE = (0.1, 0.5)  # range of the standard deviation of the adapters' noise, in mean magnitudes


class Noise(nn.Module):
    """Gaussian noise added during training: (B, T, C) -> (B, T, C).

    Its standard deviation is drawn between 0.1 and 0.5 times the mean magnitude of the batch (OS-KDFT's code).
    """

    def forward(self, hidden: Tensor) -> Tensor:
        if not self.training:
            return hidden
        low, high = NOISE
        share = low + (high - low) * torch.rand((), device=hidden.device)
        return hidden + share * self.deviation(hidden) * self.normal(hidden)

    def deviation(self, hidden: Tensor) -> Tensor:
        """Mean magnitude () of a batch, without gradient."""
        return hidden.detach().abs().mean()

    def normal(self, hidden: Tensor) -> Tensor:
        """Standard normal numbers in the shape of a batch."""
        return torch.randn_like(hidden)


class Adapted(nn.Module):
    """Feed-forward layer with an adapter parallel to it: linear, ELU, noise during training, linear.

    The last weights are initially zero, so that the adapter changes nothing at first (OS-KDFT's variant for XLSR).
    """

    def __init__(self, feed_forward: nn.Module, width: int, bottleneck: int) -> None:
        super().__init__()
        self.feed_forward = feed_forward
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        self.noise = Noise()
        self.plain = 0  # number of views, at the beginning of the batch, that do not go through the adapter

    def forward(self, x: Tensor) -> Tensor:
        change = self.up(self.noise(elu(self.down(x))))
        if self.plain:
            change = torch.cat([torch.zeros_like(change[: self.plain]), change[self.plain :]])
        return self.feed_forward(x) + change


class SSLStudent(Network):
    """Strided convolutions on the waveform, transformer layers, learnt weights over all their outputs, mean and
    standard deviation over time, linear with batch-norm.

    This is DistilHuBERT's architecture (Chang et al., ICASSP 2022) with the pooling of OS-KDFT (Heo et al., Interspeech
    2023, arXiv 2305.17394). C is the width of the transformer (a multiple of 64, or 16, 32 or 48). The convolutions
    have 2/3 of it, unless `shape` comes from a teacher. C = 192 with 2 layers has 1.5 M parameters.

    Args:
        channels: width C.
        embedding: width E of the embedding.
        adapters: width of the adapters; 0: none. With adapters the network has two paths: `forward(features, plain)`
            sends the first `plain` views past the adapters, and all others through them.
        relative: whether attention has WavLM's gated relative positions.
        shape: widths and depths of the encoder (torchaudio's names); None: those of a base model, scaled to C.

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
        # Layers trained without an adapter have other names once they have one.
        ours = self.state_dict()
        return {with_adapter(k) if k not in ours and with_adapter(k) in ours else k: v for k, v in weights.items()}

    def forward(self, features: Tensor, plain: int = 0, lengths: Tensor | None = None) -> dict[str, Tensor]:
        self._pass(plain)
        try:
            levels = self.run(features, lengths)
        finally:
            self._pass(0)
        vectors = self.embed(levels["stats"])
        if not plain:
            return levels | {"embedding": self.norm(vectors)}
        # Each path is normalised by its own statistics; those kept for evaluation are those of the path with adapters.
        adapted = self.norm(vectors[plain:])
        with _kept_statistics(self.norm):
            return levels | {"embedding": torch.cat([self.norm(vectors[:plain]), adapted])}

    def run(self, features: Tensor, lengths: Tensor | None = None) -> dict[str, Tensor]:
        samples = None if lengths is None else lengths * WAVE.dim
        hidden, lengths = self.hidden(features.flatten(1), samples), self._steps(samples)
        weights = self.layer_weights.softmax(0)
        mixed = sum(weight * layer for weight, layer in zip(weights, hidden, strict=True))
        assert isinstance(mixed, Tensor)
        return {"frames": hidden[-1], "stats": statistics(mixed.transpose(1, 2), lengths)}

    def hidden(self, waves: Tensor, lengths: Tensor | None = None) -> list[Tensor]:
        """Input of the transformer and output of each of its layers, (B, T, C) each, for waveforms (B, samples)."""
        if lengths is None:
            waves = layer_norm(waves, waves.shape[-1:])
        else:
            variance, mean = padding.var_mean(waves, lengths)
            waves = padding.mask((waves - mean) / (variance + 1e-5).sqrt(), lengths)
        if waves.shape[1] < WINDOW:
            waves = pad(waves, (0, WINDOW - waves.shape[1]))
        at_least_window = None if lengths is None else lengths.clamp_min(WINDOW)
        return self.transformer(self.project(self.convolutions(waves, at_least_window)), self._steps(lengths))

    def _steps(self, samples: Tensor | None) -> Tensor | None:
        """Number (B,) of frames of views with `samples` (B,) samples; a view shorter than a window has one frame."""
        return None if samples is None else self.convolutions.steps(samples.clamp_min(WINDOW))

    def _pass(self, plain: int) -> None:
        """Let the first `plain` views of a batch go past the adapters."""
        for layer in self.transformer.layers if self.adapters else ():
            layer.feed_forward.plain = plain


@contextmanager
def _kept_statistics(norm: nn.BatchNorm1d) -> Iterator[None]:
    """Keep the running statistics of a batch-norm unchanged while the block runs."""
    momentum, norm.momentum = norm.momentum, 0.0
    try:
        yield
    finally:
        norm.momentum = momentum


def _shape(channels: int) -> dict[str, Any]:
    """Widths and depths of a base model, scaled to another width."""
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
    """Student initialised from the convolutions and the first `layers` layers of a transformers model.

    The model is a wav2vec 2.0, a HuBERT or a WavLM.

    Args:
        source: folder or hub id of the model.
        adapters: width of the adapters; 0: none.
    Raises:
        UsageError: transformers is missing, no such model, or a model with fewer layers.
    """
    # The model, and checks of its architecture.
    try:
        from transformers import AutoModel
    except ImportError as error:
        raise UsageError(f"student.init={source} needs transformers: pip install 'spkd[teachers]'") from error
    try:
        config = read_config(source)
        if config.model_type not in FAMILIES:
            raise UsageError(
                f"student.init={source}: a {config.model_type} model; ssl can be initialised from {', '.join(FAMILIES)}"
            )
        teacher = AutoModel.from_pretrained(source, config=config, trust_remote_code=False)
    except SpkdError:
        raise
    except Exception as error:  # transformers raises many kinds for a damaged or unknown model
        if (problem := broken_torchaudio(error)) is not None:
            raise UsageError(problem) from error
        raise UsageError(
            f"student.init={source}: neither a student trained by spkd, nor a local model folder, nor a reachable hub "
            f"id ({first_line(error)})"
        ) from error
    if list(zip(config.conv_kernel, config.conv_stride, strict=False)) != list(CONVOLUTIONS):
        raise UsageError(f"student.init={source}: its convolutions are not those of wav2vec 2.0 (25 ms every 20 ms)")
    read_extractor(source)
    _check_values(source, "config.json", config, FIXED)
    if layers > config.num_hidden_layers:
        raise UsageError(f"student.ssl.layers={layers}: {source} has {config.num_hidden_layers}")
    # A student of the same widths, with the first layers' weights.
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
        with torch.no_grad():  # transformers checks some values only when the model runs
            student.eval()(torch.zeros(1, 100, WAVE.dim))
        student.train()
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError, AssertionError) as error:
        raise UsageError(f"student.init={source}: a shape that ssl cannot have ({first_line(error)})") from error
    # The same student with adapters.
    if not adapters:
        return student
    adapted = SSLStudent(config.hidden_size, embedding, layers, adapters, relative, shape)
    weights = student.state_dict().items()
    adapted.load_state_dict({with_adapter(k): v for k, v in weights}, strict=False)
    return adapted


def with_adapter(name: str) -> str:
    """Name of a layer's weight once the layer has an adapter."""
    return name.replace(".feed_forward.", ".feed_forward.feed_forward.")


def read_config(source: str) -> Any:
    """Configuration of a model of transformers, before the model is loaded.

    Args:
        source: folder or hub id of the model.
    Raises:
        UsageError: it names code of the hub, which transformers would download and run.
        SpkdError: the folder holds a pipe or a device.
        Exception: any kind, for a damaged or unknown model.
    """
    from transformers import AutoConfig

    if Path(source).is_dir():
        check_folder(Path(source))
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    if "/" in str(config._attn_implementation or ""):
        raise UsageError(
            f"{source}: its config.json names code of the hub ({config._attn_implementation}), which is not run"
        )
    return config


def read_extractor(source: str) -> Any:
    """Feature extractor of a model of transformers; None where it has none.

    Raises:
        UsageError: it makes other features than spkd has, or is for audio at another rate.
    """
    from transformers import AutoFeatureExtractor

    try:
        extractor = AutoFeatureExtractor.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return None
    _check_values(source, "preprocessor_config.json", extractor, EXTRACTOR)
    return extractor


def _check_values(source: str, file: str, settings: Any, expected: dict[str, Any]) -> None:
    """Check settings of a model's file. Raises UsageError: one has another value than the expected one."""
    for key, value in expected.items():
        if (given := getattr(settings, key, value)) != value:
            raise UsageError(f"{source}: {key} of its {file} is {str(given)[:40]}; spkd has {value}")


def broken_torchaudio(error: Exception) -> str | None:
    """Advice where transformers fails since it imports a torchaudio for another torch; None for other errors."""
    if not isinstance(error, OSError) or "torchaudio" not in str(error):
        return None
    return (
        f"transformers cannot be used: the torchaudio that is installed does not import with torch "
        f"{torch.__version__}; pip uninstall torchaudio (spkd does not need it)"
    )
