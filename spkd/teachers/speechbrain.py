"""Models trained by SpeechBrain (Ravanelli et al., 2021, arXiv 2106.04624): a folder of hyperparams.yaml and
embedding_model.ckpt, with the labels of the classifier beside them."""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spkd.corpus.audio import SAMPLE_RATE
from spkd.errors import UsageError
from spkd.networks.network import Network
from spkd.networks.toolkits.recognise import SPEECHBRAIN_RESNET, SPEECHBRAIN_XVECTOR, recognise
from spkd.networks.toolkits.resnet import SpeechBrainResNet
from spkd.networks.toolkits.xvector import SpeechBrainXVector
from spkd.outputs.features import HOP, WINDOW
from spkd.outputs.head import Head
from spkd.outputs.target import Target
from spkd.students import read_weights
from spkd.teachers.settings import ModelConfig
from spkd.teachers.toolkit import FrontEnd, Rules, ToolkitTeacher, bare, check_rate, fill, read_settings

SETTINGS, WEIGHTS, CLASSIFIER, LABELS = (
    "hyperparams.yaml",
    "embedding_model.ckpt",
    "classifier.ckpt",
    "label_encoder.txt",
)
SCALE = 30.0  # of the additive angular margin of its recipes
TOP_DB = 80.0  # below the loudest number of a view everything is equal
CITE = "Ravanelli et al., SpeechBrain: a general-purpose speech toolkit, 2021, arXiv 2106.04624"


class SpeechBrain(ToolkitTeacher):
    """ECAPA-TDNN, x-vector, ResNet.

    Targets: frames, stats, embedding, and logits over the training speakers where the classifier is there and is one of
    cosines (ECAPA-TDNN, ResNet).
    """

    cite = CITE
    family = "speechbrain"

    @classmethod
    def load(cls, config: ModelConfig, device: torch.device) -> SpeechBrain:
        """weights: the folder."""
        return cls(config.weights, device)

    def __init__(self, weights: str | None, device: torch.device) -> None:
        if weights is None:
            raise UsageError(f"teacher={self.family}: name the folder of {WEIGHTS} by teacher.weights")
        folder = Path(weights)
        tensors = bare(read_weights(str(folder / WEIGHTS)))
        settings = read_settings(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
        check_rate(settings, "sample_rate", weights)
        self.source = folder.name
        try:
            network, rules, mels = _network(tensors)
        except (ValueError, KeyError, IndexError) as error:
            raise UsageError(f"{folder}: of an architecture that spkd does not have ({error})") from error
        if isinstance(network, SpeechBrainResNet):  # it convolves over (time, bands)
            tensors = {n: v.transpose(2, 3) if v.dim() == 4 else v for n, v in tensors.items()}
        self.architecture = type(network).__name__
        fill(network, tensors, str(folder / WEIGHTS), rules)
        if not _mean_only(settings):
            raise UsageError(f"{folder}: its features are normalised in a way that spkd does not have")
        front_end = FrontEnd(
            Target("fbank", mels, HOP, 0),
            partial(fbank, mels=mels),
            f"{mels}-mel fbank of SpeechBrain (dB, 80 dB below the loudest), 25/10 ms, mean-normalised per view",
        )
        super().__init__(network, front_end, _head(folder), device)


def fbank(waves: Tensor, mels: int) -> Tensor:
    """SpeechBrain's Fbank (its defaults): centred windows of 25 ms (Hamming) every 10 ms, edges of zeros, power,
    triangles, 10 log10, not lower than 80 dB below the loudest number of the view.

    Args:
        waves: (B, samples); zeros behind a shorter view change none of its frames.
    Returns:
        (B, 1 + samples // 160, mels).
    """
    window = torch.hamming_window(WINDOW, device=waves.device)
    spectrum = torch.stft(waves.float(), WINDOW, HOP, WINDOW, window, True, "constant", return_complex=True)
    power = spectrum.real.square() + spectrum.imag.square()
    decibels = 10 * (power.transpose(1, 2) @ _triangles(mels, waves.device)).clamp_min(1e-10).log10()
    return decibels.maximum(decibels.amax((1, 2), keepdim=True) - TOP_DB)


@lru_cache
def _triangles(mels: int, device: torch.device) -> Tensor:
    """(201, mels): even on mel = 2595 log10(1 + f / 700), as wide on both sides as to the lower neighbour."""
    top = 2595 * math.log10(1 + SAMPLE_RATE / 2 / 700)
    hz = 700 * (10 ** (torch.linspace(0, top, mels + 2) / 2595) - 1)
    slope = (torch.linspace(0, SAMPLE_RATE / 2, WINDOW // 2 + 1)[:, None] - hz[1:-1]) / (hz[1:-1] - hz[:-2])
    return (1 - slope.abs()).clamp_min(0.0).to(device)


def _network(tensors: dict[str, Tensor]) -> tuple[Network, Rules, int]:
    """The network that the weights belong to, the rules of its names, the bands it takes."""
    if "fc.conv.weight" in tensors:
        network, rules = recognise(tensors)
        return network, rules, tensors["blocks.0.conv.conv.weight"].shape[1]
    if "blocks.16.w.weight" in tensors:
        layers = [tensors[f"blocks.{3 * i}.conv.weight"] for i in range(5)]
        widths, mels = tuple(layer.shape[0] for layer in layers), layers[0].shape[1]
        return SpeechBrainXVector(widths, tensors["blocks.16.w.weight"].shape[0], mels), SPEECHBRAIN_XVECTOR, mels
    names = list(
        OrderedDict.fromkeys(n.rsplit(".", 2)[0] for n in tensors if re.fullmatch(r"layer\d\.\d+\.conv1\.weight", n))
    )
    depths = [sum(n.startswith(f"layer{i}.") for n in names) for i in range(1, 5)]
    channels = [tensors[f"layer{i}.0.conv1.weight"].shape[0] for i in range(1, 5)]
    embedding, wide = tensors["fc_embed.weight"].shape
    mels = 8 * (wide // (2 * channels[-1]))
    return SpeechBrainResNet(channels, depths, embedding, mels), SPEECHBRAIN_RESNET, mels


def _mean_only(settings: dict[str, Any]) -> bool:
    """Whether the features of a view lose their mean alone, as in the recipes for speakers."""
    norm = settings.get("mean_var_norm")
    return not isinstance(norm, dict) or (norm.get("norm_type") == "sentence" and norm.get("std_norm") is False)


def _head(folder: Path) -> Head | None:
    """The classifier, where it is one of cosines."""
    if not (folder / CLASSIFIER).is_file():
        return None
    tensors = bare(read_weights(str(folder / CLASSIFIER)))
    if set(tensors) != {"weight"}:
        return None
    count = len(tensors["weight"])
    return Head(tensors["weight"], _labels(folder / LABELS, count), SCALE)


def _labels(path: Path, count: int) -> list[str]:
    """Names of the speakers in the order of their numbers, from lines `'name' => number`; numbers where there are
    none."""
    names = {}
    if path.is_file():
        for match in re.finditer(r"^'(.*)' => (\d+)$", path.read_text("utf-8", "replace").split("=====")[0], re.M):
            names[int(match[2])] = match[1]
    return [names.get(i, str(i)) for i in range(count)]
