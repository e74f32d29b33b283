"""Self-supervised speech encoders through transformers: WavLM, HuBERT, wav2vec 2.0."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from torch import Tensor

from spkd import digest
from spkd.audio import SAMPLE_RATE
from spkd.cache.card import TeacherCard
from spkd.config import ModelConfig
from spkd.errors import SpkdError, UsageError, first_line
from spkd.students.network import count_parameters, statistics
from spkd.target import EMBEDDING, Target
from spkd.teachers.base import Teacher

ATTENTION_BYTES = 1 << 31  # of one layer of one view
UNKNOWN_LICENCE = "see the model's own card"


class SSLTeacher(Teacher):
    """Targets: `frames.layer0..N` (layer 0: the input of the first transformer layer) and `embedding`, mean and
    standard deviation over time of one layer.

    Attributes:
        hub: the hub id taken where no weights are named.
        cite: the paper.
    """

    hub: ClassVar[str]
    cite: ClassVar[str]

    def __init__(self, weights: str | None, layer: int | None, device: torch.device) -> None:
        """weights: a hub id or a local folder. layer: the pooled one, None the last."""
        try:
            from transformers import AutoConfig, AutoFeatureExtractor, AutoModel
            from transformers import logging as transformers_logging
        except ImportError as error:
            raise UsageError(f"teacher={self.family} needs transformers: pip install 'spkd[teachers]'") from error
        transformers_logging.disable_progress_bar()
        logging.getLogger("transformers").setLevel(logging.ERROR)
        self._source, self.device = weights or self.hub, device
        # Never the code of the folder itself, and never a question whether it may run.
        plain: dict[str, Any] = {"trust_remote_code": False}
        try:
            config = AutoConfig.from_pretrained(self._source, **plain)
            model = AutoModel.from_pretrained(self._source, **plain)
        except Exception as error:  # transformers raises many kinds for a damaged or unknown model
            raise UsageError(
                f"teacher.weights={self._source}: neither a local model folder nor a reachable hub id "
                f"({first_line(error)})"
            ) from error
        if config.model_type != self.family:
            raise UsageError(
                f"teacher.weights={self._source} is a {config.model_type} model, not teacher={self.family}"
            )
        if getattr(config, "add_adapter", False):
            raise UsageError(f"teacher.weights={self._source}: models with a convolutional adapter are not supported")
        self._model = model.to(device).eval()
        try:
            self._normalise = bool(AutoFeatureExtractor.from_pretrained(self._source, **plain).do_normalize)
        except (OSError, ValueError, AttributeError, KeyError, TypeError):
            # Folders without a preprocessor: the layer-norm variants were trained on normalised audio.
            self._normalise = config.feat_extract_norm == "layer"
        self._layers = int(config.num_hidden_layers)
        self._pooled = self._layers if layer is None else layer
        if not 0 <= self._pooled <= self._layers:
            raise UsageError(f"teacher.layer={layer}: {self._source} has layers 0 to {self._layers}")
        try:  # some values are looked at only when it runs
            window, hop = receptive_field(config.conv_kernel, config.conv_stride)
            if not 0 < hop <= window <= SAMPLE_RATE:
                raise ValueError(f"frames of {window} samples every {hop}")
            with torch.no_grad():
                self._model(torch.zeros(1, window + 10 * hop, device=device))
        except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError) as error:
            raise UsageError(f"teacher.weights={self._source}: cannot be run ({first_line(error)})") from error
        self.min_samples = window
        # Attention holds a number for every pair of frames and every head.
        self.max_samples = hop * int((ATTENTION_BYTES / (4 * config.num_attention_heads)) ** 0.5)
        dim = int(config.hidden_size)
        frames = [Target(f"frames.layer{i}", dim, hop, window) for i in range(self._layers + 1)]
        self.targets = {t.name: t for t in (Target(EMBEDDING, 2 * dim), *frames)}
        self.num_parameters = count_parameters(self._model)

    @classmethod
    def load(cls, config: ModelConfig, device: torch.device) -> SSLTeacher:
        return cls(config.weights, config.layer, device)

    def card(self) -> TeacherCard:
        return TeacherCard(
            family=self.family,
            weights_sha256=digest.of_tensors(dict(self._model.state_dict())),
            licence=_licence(self._source),
            source=Path(self._source).name if Path(self._source).is_dir() else self._source,
            cite=self.cite,
            preprocessing="zero mean, unit variance per view" if self._normalise else "waveform as it is",
            details={"embedding": f"mean and standard deviation of layer {self._pooled}"},
        )

    def forward(self, waves: Tensor, names: list[str]) -> dict[str, Tensor]:
        if self._normalise:
            variance, mean = torch.var_mean(waves, dim=-1, correction=0, keepdim=True)
            waves = (waves - mean) / (variance + 1e-7).sqrt()  # Wav2Vec2FeatureExtractor's own formula
        hidden = self._model(waves, output_hidden_states=True).hidden_states
        if len(hidden) != self._layers + 1:
            raise SpkdError(f"{self._source}: gave {len(hidden)} hidden states, expected {self._layers + 1}")
        outputs = {f"frames.layer{i}": states for i, states in enumerate(hidden)}
        outputs[EMBEDDING] = statistics(hidden[self._pooled].transpose(1, 2))
        return outputs


class WavLM(SSLTeacher):
    family = "wavlm"
    hub = "microsoft/wavlm-large"
    cite = (
        "Chen et al., WavLM: large-scale self-supervised pre-training for full stack speech processing, "
        "IEEE JSTSP 2022, arXiv 2110.13900"
    )


class HuBERT(SSLTeacher):
    family = "hubert"
    hub = "facebook/hubert-large-ll60k"
    cite = (
        "Hsu et al., HuBERT: self-supervised speech representation learning by masked prediction of hidden units, "
        "IEEE/ACM TASLP 2021, arXiv 2106.07447"
    )


class Wav2Vec2(SSLTeacher):
    family = "wav2vec2"
    hub = "facebook/wav2vec2-large-lv60"
    cite = (
        "Baevski et al., wav2vec 2.0: a framework for self-supervised learning of speech representations, "
        "NeurIPS 2020, arXiv 2006.11477"
    )


def receptive_field(kernels: list[int], strides: list[int]) -> tuple[int, int]:
    """Window and hop (samples) of a stack of unpadded convolutions: 400 and 320 for the usual encoder."""
    window, hop = 1, 1
    for kernel, stride in zip(kernels, strides, strict=True):
        window += (kernel - 1) * hop
        hop *= stride
    return window, hop


def _licence(source: str) -> str:
    """The licence that the model's own card (README.md beside the weights) names."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        local = Path(source) / "README.md"
        text = (local if Path(source).is_dir() else Path(hf_hub_download(source, "README.md"))).read_text()
        head = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else {}
        return str(head.get("license", UNKNOWN_LICENCE))[:200]
    except (OSError, ValueError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError):
        return UNKNOWN_LICENCE
    except (yaml.YAMLError, AttributeError, IndexError, RecursionError):
        return UNKNOWN_LICENCE
