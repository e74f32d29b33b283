"""Self-supervised speech encoders through transformers, with or without a speaker head (`...ForXVector`)."""

from __future__ import annotations

import json
import logging
import re
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from torch import Tensor, nn
from torch.nn.functional import group_norm

from spkd.corpus.audio import SAMPLE_RATE
from spkd.errors import SpkdError, UsageError, first_line
from spkd.files import digest
from spkd.files.reading import MOST_OF_SETTINGS, read_text
from spkd.files.text import counted
from spkd.networks import padding
from spkd.networks.network import count_parameters, statistics
from spkd.networks.ssl import broken_torchaudio, read_config, read_extractor
from spkd.outputs.features import FBANK, fbank
from spkd.outputs.head import Head
from spkd.outputs.target import EMBEDDING, LOGITS, Target
from spkd.outputs.teacher_card import TeacherCard
from spkd.teachers.base import Teacher
from spkd.teachers.settings import ModelConfig
from spkd.teachers.toolkit import PlainLoader

ATTENTION_BYTES = 1 << 31  # largest memory of the attention of one layer for one view
UNKNOWN_LICENCE = "see the model's own card"
# Settings of transformers that have an effect only in training, or name the origin of a model.
WITHOUT_EFFECT = re.compile(
    r"dropout|layerdrop|^mask_|ctc_|initializer_range|codevector|negatives|contrastive|diversity|spec_augment|replace_prob|"
    r"token_id|2label|^num_labels$|^architectures$|dtype|_name_or_path|transformers_version|gradient_checkpointing|"
    r"^tokenizer_class$|classifier_proj_size|^problem_type$|^return_dict$|^use_cache$"
)
RUN_ERRORS = (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError)


class SSLTeacher(Teacher):
    """Base class of self-supervised encoders.

    Targets: `frames.layer0..N` (layer 0: the input of the first transformer layer) and `embedding`, mean and standard
    deviation over time of one layer.

    A model with a speaker head (transformers' `...ForXVector`) also has the levels of the head: `frames.tdnn1..K`,
    `stats`, `embedding` (transformers' `embeddings`), `segment.b` (transformers' `logits`), and `logits` over its
    training speakers, where their weights are in the file.

    Attributes:
        hub: hub id used where no weights are named.
        model_type: transformers' name of the family.
    """

    hub: ClassVar[str]
    cite: ClassVar[str]
    model_type: ClassVar[str]
    on_card = ("layer",)

    def __init__(self, weights: str | None, layer: int | None, device: torch.device) -> None:
        """Load a model.

        Args:
            weights: a hub id or a local folder; None: `hub`.
            layer: number of the pooled layer; None: the last, or the pooling of the head.
        """
        self._source, self.device = weights or self.hub, device
        config, model = self._load()
        self._config, self._xvector = config, model if hasattr(model, "tdnn") and layer is None else None
        self._model = getattr(model, model.base_model_prefix) if hasattr(model, "tdnn") else model
        self._layers = int(config.num_hidden_layers)
        self._pooled = self._layers if layer is None else layer
        if not 0 <= self._pooled <= self._layers:
            raise UsageError(f"layer={layer}: {self._source} has layers 0 to {self._layers}")
        self._whole = model.to(device).eval()
        try:  # transformers checks some values only when the model runs
            window, hop = self.frame_shape()
            if not 0 < hop <= window <= SAMPLE_RATE:
                raise ValueError(f"frames of {window} samples every {hop}")
            self.targets = self._targets(window, hop)
            shortest = max(t.window for t in self.targets.values()) + (0 if self._xvector is None else hop)
            with torch.no_grad():
                self.forward(torch.zeros(1, max(window + 10 * hop, shortest), device=device), list(self.targets))
        except RUN_ERRORS as error:
            raise UsageError(f"weights={self._source}: cannot be run ({first_line(error)})") from error
        self.min_samples = shortest
        # Attention has a number for every pair of frames and every head.
        self.max_samples = hop * int((ATTENTION_BYTES / (4 * config.num_attention_heads)) ** 0.5)
        self.num_parameters = count_parameters(self._whole)

    @classmethod
    def load(cls, config: ModelConfig, device: torch.device) -> SSLTeacher:
        return cls(config.weights, config.settings.layer, device)

    def _load(self) -> tuple[Any, Any]:
        """Configuration and model of transformers."""
        try:
            from transformers import AutoModel, AutoModelForAudioXVector
            from transformers import logging as transformers_logging
        except ImportError as error:
            raise UsageError(f"teacher={self.family} needs transformers: pip install 'spkd[teachers]'") from error
        transformers_logging.disable_progress_bar()
        logging.getLogger("transformers").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask")
        try:
            config = read_config(self._source)
            if config.model_type != self.model_type:
                raise UsageError(f"weights={self._source} is a {config.model_type} model, not {self.family}")
            has_head = any(str(name).endswith("ForXVector") for name in config.architectures or ())
            kind = AutoModelForAudioXVector if has_head else AutoModel
            # Code in the folder is never run, and transformers does not ask whether it may be.
            model, loading = kind.from_pretrained(
                self._source, config=config, output_loading_info=True, trust_remote_code=False
            )
        except SpkdError:
            raise
        except Exception as error:  # transformers raises many kinds for a damaged or unknown model
            if (problem := broken_torchaudio(error)) is not None:
                raise UsageError(problem) from error
            raise UsageError(
                f"weights={self._source}: neither a local model folder nor a reachable hub id ({first_line(error)})"
            ) from error
        if getattr(config, "add_adapter", False):
            raise UsageError(f"weights={self._source}: models with a convolutional adapter are not supported")
        missing = {str(name) for name in loading["missing_keys"]}
        self._classes = has_head and "objective.weight" not in missing
        if lacking := sorted(n for n in missing if not n.endswith("masked_spec_embed") and n != "objective.weight"):
            raise UsageError(f"weights={self._source}: lacks {counted(len(lacking), 'weight')} ({lacking[0]}, ...)")
        normalised = getattr(read_extractor(self._source), "do_normalize", None)
        # For folders without a preprocessor: the layer-norm variants were trained on normalised audio.
        self._normalise = getattr(config, "feat_extract_norm", "layer") == "layer" if normalised is None else normalised
        return config, model.float()  # weights may be stored in half precision

    def frame_shape(self) -> tuple[int, int]:
        """Window and hop of the frames (samples)."""
        return receptive_field(self._config.conv_kernel, self._config.conv_stride)

    def _targets(self, window: int, hop: int) -> dict[str, Target]:
        dim = int(self._config.hidden_size)
        targets = [Target(f"frames.layer{i}", dim, hop, window) for i in range(self._layers + 1)]
        if self._xvector is None:
            return {t.name: t for t in (Target(EMBEDDING, 2 * dim), *targets)}
        for i, (width, context) in enumerate(zip(self._config.tdnn_dim, self._contexts(), strict=True), 1):
            window += context * hop
            targets.append(Target(f"frames.tdnn{i}", width, hop, window))
        size = int(self._config.xvector_output_dim)
        vectors = [Target(EMBEDDING, size), Target("stats", 2 * width), Target("segment.b", size)]
        if self._classes:
            names = getattr(self._config, "id2label", None) or {}
            weight = self._xvector.objective.weight.detach().T
            whole = all(i in names for i in range(len(weight)))
            classes = [str(names[i] if whole else i) for i in range(len(weight))]
            layer = self._xvector.classifier
            self.head = Head(weight, classes, self._xvector.objective.scale, layer=(layer.weight, layer.bias))
            vectors.append(Target(LOGITS, len(classes)))
        return {t.name: t for t in (*vectors, *targets)}

    def _contexts(self) -> list[int]:
        """Number of frames that each TDNN layer takes in addition to one."""
        return [(k - 1) * d for k, d in zip(self._config.tdnn_kernel, self._config.tdnn_dilation, strict=True)]

    def card(self) -> TeacherCard:
        pooled = f"mean and standard deviation of layer {self._pooled}"
        return TeacherCard(
            family=self.family,
            weights_sha256=digest.of_tensors(dict(self._whole.state_dict())),
            licence=_licence(self._source),
            source=Path(self._source).name if Path(self._source).is_dir() else self._source,
            cite=self.cite,
            preprocessing=self.preprocessing(),
            details={
                "embedding": pooled if self._xvector is None else "x-vector of the model's own speaker head",
                "config": digest.of_tree(acting(self._config)),
            },
            library=f"transformers {version('transformers')}",
        )

    def preprocessing(self) -> str:
        """Preprocessing of the waveform, in words."""
        return "zero mean, unit variance per view" if self._normalise else "waveform as it is"

    def forward(self, waves: Tensor, names: list[str], lengths: Tensor | None = None) -> dict[str, Tensor]:
        hidden = self.hidden_states(waves, lengths)
        if len(hidden) != self._layers + 1:
            raise SpkdError(f"{self._source}: gave {len(hidden)} hidden states, expected {self._layers + 1}")
        outputs = {f"frames.layer{i}": states for i, states in enumerate(hidden)}
        counts = None if lengths is None else self.targets["frames.layer0"].num_frames(lengths)
        if self._xvector is None:
            outputs[EMBEDDING] = statistics(hidden[self._pooled].transpose(1, 2), counts)
        elif any(not name.startswith("frames.layer") for name in names):
            outputs |= self._head_levels(hidden, counts)
        return outputs

    def _head_levels(self, hidden: tuple[Tensor, ...], counts: Tensor | None) -> dict[str, Tensor]:
        """Levels of the head of transformers' ...ForXVector, from hidden states (B, T, D) of all layers."""
        outputs: dict[str, Tensor] = {}
        model: Any = self._xvector
        x = hidden[-1]
        if self._config.use_weighted_layer_sum:
            x = torch.einsum("l,lbtd->btd", model.layer_weights.softmax(-1), torch.stack(hidden))
        x = model.projector(x)
        for i, (layer, context) in enumerate(zip(model.tdnn, self._contexts(), strict=True), 1):
            x, counts = layer(x), None if counts is None else counts - context
            outputs[f"frames.tdnn{i}"] = x
        variance, mean = padding.var_mean(x.transpose(1, 2), counts, correction=1)
        outputs["stats"] = torch.cat([mean, variance.sqrt()], 1)[..., 0]
        outputs[EMBEDDING] = model.feature_extractor(outputs["stats"])
        outputs["segment.b"] = model.classifier(outputs[EMBEDDING])
        if self.head is not None:
            outputs[LOGITS] = self.head.logits(outputs[EMBEDDING])
        return outputs

    def hidden_states(self, waves: Tensor, lengths: Tensor | None) -> tuple[Tensor, ...]:
        """Input of the transformer and output of each layer: (B, T, D) each."""
        raise NotImplementedError


class WaveformEncoder(SSLTeacher):
    """Model that takes samples: strided convolutions, then the transformer."""

    def _load(self) -> tuple[Any, Any]:
        config, model = super()._load()
        # Before the positional convolution, batch-norm would turn the zeros of padding into other numbers.
        self.takes_lengths = not getattr(config, "conv_pos_batch_norm", False)
        for block in model.modules():
            if isinstance(getattr(block, "layer_norm", None), nn.GroupNorm):
                block.layer_norm = ViewNorm(block.layer_norm, config.conv_kernel[0], config.conv_stride[0])
        self._view_norms = [m for m in model.modules() if isinstance(m, ViewNorm)]
        return config, model

    def hidden_states(self, waves: Tensor, lengths: Tensor | None) -> tuple[Tensor, ...]:
        if self._normalise:
            variance, mean = padding.var_mean(waves, lengths)
            # Formula of Wav2Vec2FeatureExtractor, which pads afterwards.
            waves = padding.mask((waves - mean) / (variance + 1e-7).sqrt(), lengths)
        for norm in self._view_norms:
            norm.lengths = lengths
        mask = None if lengths is None else padding.valid(waves, lengths).long()
        return tuple(self._model(waves, attention_mask=mask, output_hidden_states=True).hidden_states)


class ViewNorm(nn.Module):
    """Group-norm of the first convolution, which normalises every channel over the time of a view.

    Attributes:
        lengths: (B,) number of valid samples of each waveform; None: all are valid.
    """

    def __init__(self, norm: nn.GroupNorm, kernel: int, stride: int) -> None:
        super().__init__()
        self.weight, self.bias, self._eps = norm.weight, norm.bias, norm.eps
        self._kernel, self._stride = kernel, stride
        self.lengths: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.lengths is None:
            return group_norm(x, x.shape[1], self.weight, self.bias, self._eps)
        variance, mean = padding.var_mean(x, (self.lengths - self._kernel) // self._stride + 1)
        return (x - mean) / (variance + self._eps).sqrt() * self.weight[:, None] + self.bias[:, None]


class WavLM(WaveformEncoder):
    family = model_type = "wavlm"
    hub = "microsoft/wavlm-base-plus-sv"
    cite = (
        "Chen et al., WavLM: large-scale self-supervised pre-training for full stack speech processing, "
        "IEEE JSTSP 2022, arXiv 2110.13900"
    )


class HuBERT(WaveformEncoder):
    family = model_type = "hubert"
    hub = "facebook/hubert-large-ll60k"
    cite = (
        "Hsu et al., HuBERT: self-supervised speech representation learning by masked prediction of hidden units, "
        "IEEE/ACM TASLP 2021, arXiv 2106.07447"
    )


class Wav2Vec2(WaveformEncoder):
    family = model_type = "wav2vec2"
    hub = "facebook/wav2vec2-large-lv60"
    cite = (
        "Baevski et al., wav2vec 2.0: a framework for self-supervised learning of speech representations, "
        "NeurIPS 2020, arXiv 2006.11477"
    )


class Data2Vec(WaveformEncoder):
    family = "data2vec"
    model_type = "data2vec-audio"
    hub = "facebook/data2vec-audio-large"
    cite = (
        "Baevski et al., data2vec: a general framework for self-supervised learning in speech, vision and language, "
        "ICML 2022, arXiv 2202.03555"
    )

    def _load(self) -> tuple[Any, Any]:
        loaded = super()._load()
        self.takes_lengths = False  # the stacked positional convolutions spread padding into the view
        return loaded


class W2VBert(SSLTeacher):
    """Model that takes Kaldi's fbank; each of its frames is made of two of fbank."""

    family = "w2v-bert"
    model_type = "wav2vec2-bert"
    hub = "facebook/w2v-bert-2.0"
    cite = (
        "Barrault et al., Seamless: multilingual expressive and streaming speech translation, 2023, arXiv 2312.05187 "
        "(w2v-BERT 2.0)"
    )
    takes_lengths = True

    def frame_shape(self) -> tuple[int, int]:
        hop = FBANK.hop or 1
        return FBANK.window + hop, 2 * hop

    def preprocessing(self) -> str:
        return "80-mel Kaldi fbank, 25/10 ms, zero mean and unit variance of each band per view"

    def hidden_states(self, waves: Tensor, lengths: Tensor | None) -> tuple[Tensor, ...]:
        # As SeamlessM4TFeatureExtractor: every band to zero mean and unit variance of the sample, then pairs of frames.
        bands = fbank(waves).transpose(1, 2)
        counts = None if lengths is None else FBANK.num_frames(lengths)
        variance, mean = padding.var_mean(bands, counts, correction=1)
        bands = padding.mask((bands - mean) / (variance + 1e-7).sqrt(), counts).transpose(1, 2)
        pairs = bands[:, : bands.shape[1] // 2 * 2].unflatten(1, (-1, 2)).flatten(2)
        mask = None if counts is None else padding.valid(pairs.transpose(1, 2), counts // 2)[:, 0].long()
        return tuple(self._model(pairs, attention_mask=mask, output_hidden_states=True).hidden_states)


def acting(config: Any) -> dict[str, Any]:
    """Settings of a transformers model that differ from the defaults of the library and may change an output."""
    settings = json.loads(config.to_json_string(use_diff=True))
    return {key: value for key, value in settings.items() if not WITHOUT_EFFECT.search(key)}


def receptive_field(kernels: list[int], strides: list[int]) -> tuple[int, int]:
    """Window and hop (samples) of a stack of unpadded convolutions: 400 and 320 for the usual encoder."""
    window, hop = 1, 1
    for kernel, stride in zip(kernels, strides, strict=True):
        window += (kernel - 1) * hop
        hop *= stride
    return window, hop


def _licence(source: str) -> str:
    """Licence that the model's card names (README.md next to the weights)."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        local = Path(source) / "README.md"
        file = local if Path(source).is_dir() else Path(hf_hub_download(source, "README.md"))
        text = read_text(file, MOST_OF_SETTINGS)
        head = yaml.load(text.split("---")[1], Loader=PlainLoader) if text.startswith("---") else {}
        return str(head.get("license", UNKNOWN_LICENCE))[:200]
    except (OSError, SpkdError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError):
        return UNKNOWN_LICENCE
    except (yaml.YAMLError, AttributeError, IndexError, RecursionError):
        return UNKNOWN_LICENCE
