"""Models trained by SpeechBrain (Ravanelli et al., 2021, arXiv 2106.04624).

A model is a folder with hyperparams.yaml and embedding_model.ckpt, and optionally with the classifier and its labels.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor, nn

from spkd.errors import UsageError, first_line
from spkd.files.reading import read_text
from spkd.networks.network import Network
from spkd.networks.toolkits.recognise import (
    SPEECHBRAIN_ECAPA,
    SPEECHBRAIN_RESNET,
    SPEECHBRAIN_XVECTOR,
    speechbrain_ecapa,
)
from spkd.networks.toolkits.resnet import SpeechBrainResNet
from spkd.networks.toolkits.xvector import CONTEXTS, SpeechBrainXVector
from spkd.outputs.head import Head
from spkd.progress import log
from spkd.students import read_weights
from spkd.teachers.hyperpyyaml import Hyperparams, Section, Tagged
from spkd.teachers.settings import ModelConfig
from spkd.teachers.speechbrain_features import front_end_of
from spkd.teachers.toolkit import Rules, ToolkitTeacher, bare, check_rate, fill, foreign, lacking

SETTINGS, WEIGHTS, CLASSIFIER, LABELS = (
    "hyperparams.yaml",
    "embedding_model.ckpt",
    "classifier.ckpt",
    "label_encoder.txt",
)
SCALE = 30.0  # scale of the additive angular margin in its recipes
CITE = "Ravanelli et al., SpeechBrain: a general-purpose speech toolkit, 2021, arXiv 2106.04624"

MODELS = "speechbrain.lobes.models."
ECAPA, XVECTOR, RESNET = (f"{MODELS}{name}" for name in ("ECAPA_TDNN.ECAPA_TDNN", "Xvector.Xvector", "ResNet.ResNet"))
# Settings of each network: those that have an effect, those that the shapes of the weights tell, those without effect.
KNOWN = {
    ECAPA: (
        *("activation", "dilations", "groups"),
        *("input_size", "lin_neurons", "channels", "kernel_sizes", "attention_channels", "res2net_scale"),
        *("se_channels", "global_context"),
        *("device", "dropout"),
    ),
    XVECTOR: (
        *("activation", "tdnn_dilations"),
        *("in_channels", "lin_neurons", "tdnn_blocks", "tdnn_channels", "tdnn_kernel_sizes"),
        "device",
    ),
    RESNET: ("activation", "strides", "input_size", "channels", "block_sizes", "lin_neurons", "device"),
}
# Modules that are not run for an embedding: classifiers, statistics of embeddings, augmentation.
NOT_RUN = (
    *("classifier", "mean_var_norm_emb", "augmentation", "wav_augment", "env_corrupt", "augment_speed"),
    *("augment_wavedrop", "augment_pipeline", "speed_perturb", "add_noise", "add_reverb", "drop_freq", "drop_chunk"),
)
RUN = ("compute_features", "mean_var_norm", "embedding_model")
LOADED = ("embedding_model", "mean_var_norm", "mean_var_norm_emb", "classifier", "label_encoder")
ACTIVATIONS = (
    *("ReLU", "LeakyReLU", "ReLU6", "ELU", "SELU", "CELU", "GELU", "SiLU", "Mish", "Softplus", "Softsign", "Tanh"),
    *("Sigmoid", "LogSigmoid", "Hardtanh", "Hardswish", "Hardsigmoid", "Identity"),
)
Activation = Callable[[], nn.Module]


class SpeechBrain(ToolkitTeacher):
    """SpeechBrain's ECAPA-TDNN, x-vector and ResNet.

    Targets: frames, stats, embedding, and logits over the training speakers where the folder has a classifier of
    cosines (ECAPA-TDNN, ResNet).

    Every setting of hyperparams.yaml that changes an embedding is applied, or refused with its name.
    """

    cite = CITE
    family = "speechbrain"

    @classmethod
    def load(cls, config: ModelConfig, device: torch.device) -> SpeechBrain:
        """Load a model: `weights` is the folder."""
        return cls(config.weights, device)

    def __init__(self, weights: str | None, device: torch.device) -> None:
        if weights is None:
            raise UsageError(f"{self.family}: name the folder of {WEIGHTS} by weights=...")
        folder = Path(weights)
        tensors = bare(read_weights(str(folder / WEIGHTS)))
        file = Hyperparams.read(folder / SETTINGS)
        check_rate(file.tree, "sample_rate", weights)
        _check_modules(file)
        self.source = folder.name
        front_end = front_end_of(file)
        network, rules, self.settings = _network(file, tensors, front_end.frames.dim)
        if isinstance(network, SpeechBrainResNet):  # SpeechBrain's convolves over (time, bands)
            tensors = {n: v.transpose(2, 3) if v.dim() == 4 else v for n, v in tensors.items()}
        self.architecture = type(network).__name__
        fill(network, tensors, str(folder / WEIGHTS), rules)
        super().__init__(network, front_end, _head(folder, file), device)


def _check_modules(file: Hyperparams) -> None:
    """Check the parts of a model. Raises UsageError for an unknown module, file of weights or audio format."""
    modules = file.resolved(file.tree.get("modules", {}), "modules")
    for name in modules if isinstance(modules, dict) else ():
        if name not in (*RUN, *NOT_RUN):
            raise UsageError(f"{file.path}: modules.{str(name)[:60]} is not known here; does it change an embedding?")
    if "audio_normalizer" in file.tree:
        audio = file.section("audio_normalizer")
        audio.check(["speechbrain.dataio.preprocess.AudioNormalizer"], ["sample_rate", "mix"])
        audio.only("sample_rate", 16_000, 16_000)
    pretrainer = file.resolved(file.tree.get("pretrainer", {}), "pretrainer")
    named = pretrainer.value if isinstance(pretrainer, Tagged) else pretrainer
    for key in ("loadables", "paths"):
        section = named.get(key, {}) if isinstance(named, dict) else {}
        for name, value in section.items() if isinstance(section, dict) else ():
            if name not in LOADED:
                raise UsageError(f"{file.path}: pretrainer.{key}.{str(name)[:60]} is not known here")
            text = str(value.value) if isinstance(value, Tagged) else str(value)[:1000]
            if key == "paths" and name == "embedding_model" and PurePosixPath(text).name != WEIGHTS:
                raise UsageError(f"{file.path}: pretrainer.paths.{name}={text[-60:]!r}; expected a file {WEIGHTS}")


def _network(file: Hyperparams, tensors: dict[str, Tensor], mels: int) -> tuple[Network, Rules, dict[str, Any]]:
    """Network that the weights and the settings describe.

    Returns:
        The network, the rules of its names, and the settings that only the file tells.
    """
    path = file.path.with_name(WEIGHTS)
    build = {ECAPA: _ecapa, XVECTOR: _xvector, RESNET: _resnet}
    kind = next((kind for kind, name in _MARKS.items() if name in tensors), None)
    if kind is None:
        raise UsageError(f"{path}: {foreign(tensors)}; SpeechBrain's {', '.join(build)} are taken")
    if "embedding_model" in file.tree or "embedding_model" in _names(file):
        section = file.section("embedding_model")
        section.check([kind], KNOWN[kind])
    else:
        log(f"note: {file.path}: nothing there of embedding_model; the defaults of {kind} are taken")
        section = Section(file, "embedding_model", kind, {})
    try:
        network, rules, settings = build[kind](section, tensors, mels)
    except (ValueError, KeyError, IndexError, ZeroDivisionError) as error:
        raise UsageError(f"{path}: of an architecture that spkd does not have ({lacking(error)})") from error
    return network, rules, settings


# Name of a weight that identifies each network.
_MARKS = {ECAPA: "mfa.conv.conv.weight", XVECTOR: "blocks.0.conv.weight", RESNET: "fc_embed.weight"}


def _names(file: Hyperparams) -> dict[str, Any]:
    modules = file.resolved(file.tree.get("modules", {}), "modules")
    return modules if isinstance(modules, dict) else {}


def _ecapa(section: Section, tensors: dict[str, Tensor], mels: int) -> tuple[Network, Rules, dict[str, Any]]:
    activation, named = _activation(section, "ReLU")
    count = 2 + sum(re.fullmatch(r"blocks\.\d+\.tdnn1\.conv\.conv\.weight", name) is not None for name in tensors)
    dilations = section.wholes("dilations", [1, *range(2, count), 1], count)
    groups = section.wholes("groups", [1] * count, count)
    network = speechbrain_ecapa(tensors, groups[0], dilations=dilations, activation=activation)
    _check_input(section, "input_size", tensors["blocks.0.conv.conv.weight"].shape[1] * groups[0], mels)
    kernels = [
        tensors["blocks.0.conv.conv.weight"].shape[2],
        *network.kernels,
        tensors["mfa.conv.conv.weight"].shape[2],
    ]
    _check_kernels(section, "kernel_sizes", kernels, dilations)
    return network, SPEECHBRAIN_ECAPA, {"activation": named, "dilations": dilations, "groups": groups}


def _xvector(section: Section, tensors: dict[str, Tensor], mels: int) -> tuple[Network, Rules, dict[str, Any]]:
    activation, named = _activation(section, "LeakyReLU")
    count = sum(re.fullmatch(r"blocks\.\d+\.conv\.weight", name) is not None for name in tensors)
    layers = [tensors[f"blocks.{3 * i}.conv.weight"] for i in range(count)]
    dilations = section.wholes("tdnn_dilations", [dilation for _, dilation in CONTEXTS], count)
    kernels = [layer.shape[2] for layer in layers]
    _check_input(section, "in_channels", layers[0].shape[1], mels)
    _check_kernels(section, "tdnn_kernel_sizes", kernels, dilations)
    last = f"blocks.{3 * count + 1}.w."
    widths, contexts = [len(layer) for layer in layers], list(zip(kernels, dilations, strict=True))
    network = SpeechBrainXVector(widths, len(tensors[f"{last}weight"]), mels, contexts, activation)
    rules = (*SPEECHBRAIN_XVECTOR, (r"^project\.", last))
    return network, rules, {"activation": named, "dilations": dilations}


def _resnet(section: Section, tensors: dict[str, Tensor], mels: int) -> tuple[Network, Rules, dict[str, Any]]:
    activation, named = _activation(section, "ReLU")
    names = list(
        OrderedDict.fromkeys(n.rsplit(".", 2)[0] for n in tensors if re.fullmatch(r"layer\d\.\d+\.conv1\.weight", n))
    )
    depths = [sum(n.startswith(f"layer{i}.") for n in names) for i in range(1, 5)]
    channels = [tensors[f"layer{i}.0.conv1.weight"].shape[0] for i in range(1, 5)]
    strides = section.wholes("strides", [1, 2, 2, 2], 4)
    embedding, wide = tensors["fc_embed.weight"].shape
    network = SpeechBrainResNet(channels, depths, embedding, mels, strides, activation)
    if network.levels["stats"].dim != wide:
        raise UsageError(
            f"{section.file.path}: its weights are not of {mels} features a frame and strides {strides}; see "
            "compute_features and embedding_model.strides"
        )
    return network, SPEECHBRAIN_RESNET, {"activation": named, "strides": strides}


def _check_input(section: Section, key: str, expected: int, mels: int) -> None:
    """Check the number of features. Raises UsageError where the weights take another number."""
    if expected != mels:
        raise UsageError(
            f"{section.file.path}: its weights take {expected} features a frame, and compute_features gives {mels}; "
            f"see n_mels, deltas, context and embedding_model.{key}"
        )


def _check_kernels(section: Section, key: str, kernels: list[int], dilations: list[int]) -> None:
    """Check that convolutions keep the number of frames. Raises UsageError where they do not."""
    for kernel, dilation in zip(kernels, dilations, strict=True):
        if (kernel - 1) * dilation % 2:
            raise UsageError(
                f"{section.file.path}: {section.name}.{key}: {kernel} with dilation {dilation} loses a frame; spkd "
                "takes odd kernels"
            )


def _activation(section: Section, default: str) -> tuple[Activation, str]:
    """Activation of a network, and its name."""
    expected = f"!name:torch.nn.ACTIVATION of {', '.join(ACTIVATIONS)}"
    given = section.get("activation", Tagged(f"name:torch.nn.{default}", ""), lambda v: isinstance(v, Tagged), expected)
    name = re.sub(r"^name:torch\.nn\.(modules\.activation\.)?", "", given.tag)
    values = {} if given.value in ("", None) else given.value
    settings = (
        {key: section.file.resolved(v, "activation") for key, v in values.items()} if isinstance(values, dict) else None
    )
    if (
        name not in ACTIVATIONS
        or settings is None
        or any(isinstance(v, Tagged | dict | list) for v in settings.values())
    ):
        raise UsageError(f"{section.file.path}: {section.name}.activation=!{given.tag[:80]}; spkd takes {expected}")
    made = partial(getattr(nn, name), **settings)
    try:
        made()(torch.zeros(1))
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"{section.file.path}: {section.name}.activation: {first_line(error)}") from error
    return made, f"{name}{settings or ''}"


def _head(folder: Path, file: Hyperparams) -> Head | None:
    """Classifier over the training speakers; None where there is none of cosines."""
    if not (folder / CLASSIFIER).is_file():
        return None
    tensors = bare(read_weights(str(folder / CLASSIFIER)))
    if set(tensors) != {"weight"}:
        return None
    count = len(tensors["weight"])
    return Head(tensors["weight"], _labels(folder / LABELS, count), _scale(file))


def _scale(file: Hyperparams) -> float:
    """Scale of the loss that the model was trained with; where the file has none, that of the recipes."""
    cost = file.tree.get("compute_cost")
    loss = cost.value.get("loss_fn") if isinstance(cost, Tagged) and isinstance(cost.value, dict) else None
    if not isinstance(loss, Tagged) or not isinstance(loss.value, dict):
        return SCALE
    section = Section(file, "compute_cost.loss_fn", loss.tag, loss.value)
    return float(section.number("scale", SCALE, 1e-3, 1e4))


def _labels(path: Path, count: int) -> list[str]:
    """Names of the speakers in the order of their numbers, from lines `'name' => number`; numbers where any lacks."""
    names = {}
    if path.is_file():
        for match in re.finditer(r"^'(.*)' => (\d+)$", read_text(path, errors="replace").split("=====")[0], re.M):
            names[int(match[2])] = match[1]
    whole = all(i in names for i in range(count))
    return [names[i] if whole else str(i) for i in range(count)]
