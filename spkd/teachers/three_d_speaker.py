"""Models trained by 3D-Speaker (Chen et al., 2024, arXiv 2403.19971): published checkpoints, and those of recipes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from spkd.corpus.audio import SAMPLE_RATE
from spkd.errors import UsageError
from spkd.networks.toolkits.recognise import recognise
from spkd.outputs.features import MELS
from spkd.outputs.head import Head
from spkd.progress import log
from spkd.students import read_weights
from spkd.teachers.settings import ModelConfig
from spkd.teachers.toolkit import (
    ToolkitTeacher,
    bare,
    check_keys,
    fill,
    foreign,
    kaldi_front_end,
    lacking,
    read_settings,
    section,
)

CONFIG, POOLING = "config.yaml", "TSTP"
NETWORKS = "CAM++, ERes2Net, ERes2NetV2, ECAPA-TDNN and ResNet34 of 3D-Speaker"
FEATURES = "speakerlab.process.processor.FBank"
FEATURE_KEYS = ("n_mels", "sample_rate", "mean_nor")
# Settings of networks: pooling, those that the shapes of the weights tell, and two without effect.
NETWORK_KEYS = (
    "pooling_func",
    *("feat_dim", "embedding_size", "embed_dim", "input_size", "lin_neurons", "channels", "m_channels", "baseWidth"),
    *("scale", "expansion", "growth_rate", "bn_size", "init_channels", "num_blocks", "two_emb_layer", "kernel_sizes"),
    *("attention_channels", "res2net_scale", "se_channels", "global_context"),
    *("device", "memory_efficient"),
)
SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".safetensors")
EMBEDDING_MODEL, CLASSIFIER = "embedding_model.ckpt", "classifier.ckpt"
SCALE = 32.0  # scale of the margin losses in its recipes
FLOOR = 1e-8  # number added to a variance before its root
CITE = (
    "Chen et al., 3D-Speaker-Toolkit: an open source toolkit for multi-modal speaker verification and diarization, "
    "2024, arXiv 2403.19971"
)


class ThreeDSpeaker(ToolkitTeacher):
    """3D-Speaker's CAM++, ERes2Net, ERes2NetV2, ECAPA-TDNN and ResNet34.

    Targets: frames, stats, embedding, segment.a where there are two embedding layers, and logits over the training
    speakers where classifier.ckpt is next to the weights, as its recipes leave it.
    """

    cite = CITE
    family = "3d-speaker"

    @classmethod
    def load(cls, config: ModelConfig, device: torch.device) -> ThreeDSpeaker:
        """Load a model.

        `weights` is the checkpoint or a folder with one; `input` is the fbank, where it is not 3D-Speaker's.
        """
        return cls(config.weights, config.settings.input, device)

    def __init__(self, weights: str | None, kind: str, device: torch.device) -> None:
        if weights is None:
            raise UsageError(f"{self.family}: name the checkpoint by weights=...")
        file = _find(Path(weights))
        tensors = bare(read_weights(str(file)))
        self.source = file.name
        mels = _check_settings(file)
        try:
            network, rules = recognise(tensors, mels, floor=FLOOR)
        except (ValueError, KeyError, IndexError) as error:
            raise UsageError(f"{file}: {foreign(tensors)} ({lacking(error)}); taken: {NETWORKS}") from error
        self.architecture = type(network).__name__
        fill(network, tensors, str(file), rules)
        head = None
        if (classifier_file := file.with_name(CLASSIFIER)).is_file() and file.name == EMBEDDING_MODEL:
            classifier = bare(read_weights(str(classifier_file)))
            if set(classifier) == {"weight"}:
                head = Head(classifier["weight"], [str(i) for i in range(len(classifier["weight"]))], SCALE)
        kind = self.family if kind == "auto" else kind
        super().__init__(network, kaldi_front_end(kind, mels), head, device)


def _find(path: Path) -> Path:
    """File of the checkpoint at a path: in the folder of a recipe, the last checkpoint that was trained."""
    if not path.is_dir():
        return path
    if (path / EMBEDDING_MODEL).is_file():
        return path / EMBEDDING_MODEL
    # exp/NAME/models/CKPT-EPOCH-70-00/embedding_model.ckpt
    for folder in (path, path / "models"):
        trained = [f for f in folder.glob("CKPT-*") if (f / EMBEDDING_MODEL).is_file()]
        if trained:
            chosen = max(trained, key=lambda f: [int(n) for n in re.findall(r"\d+", f.name)])
            log(f"note: {path}: {chosen.name} of {len(trained)} checkpoints there")
            return chosen / EMBEDDING_MODEL
    files = sorted(f for f in path.iterdir() if f.suffix in SUFFIXES and f.name != CLASSIFIER)
    if len(files) != 1:
        raise UsageError(f"{path}: {len(files)} checkpoints there; name one of them by weights=...")
    return files[0]


def _check_settings(file: Path) -> int:
    """Number of bands in the recipe's config.yaml, where that is in a folder above the weights; else 80."""
    config = next((f / CONFIG for f in list(file.parents)[:3] if (f / CONFIG).is_file()), None)
    settings = {} if config is None else read_settings(config)
    extractor = section(settings, "feature_extractor")
    if (kind := str(extractor.get("obj", FEATURES))) != FEATURES:
        raise UsageError(f"{config}: feature_extractor.obj is {kind[:100]}; spkd has {FEATURES} alone")
    arguments = section(extractor, "args")
    network = section(section(settings, "embedding_model"), "args")
    check_keys(arguments, FEATURE_KEYS, f"{config}: feature_extractor")
    check_keys(network, NETWORK_KEYS, f"{config}: embedding_model")
    if network.get("pooling_func", POOLING) != POOLING:
        raise UsageError(f"{config}: embedding_model.pooling_func: spkd has {POOLING} alone")

    def value(key: str, default: Any) -> Any:
        """Value of a setting; `<NAME>` refers to a setting at the top level."""
        given = arguments.get(key, default)
        named = re.fullmatch(r"<(\w+)>", given) if isinstance(given, str) else None
        return settings.get(named[1]) if named else given

    for key, expected in (("sample_rate", SAMPLE_RATE), ("mean_nor", True)):
        if arguments and value(key, False if key == "mean_nor" else expected) != expected:
            raise UsageError(f"{config}: feature_extractor.{key}: spkd has {expected} alone")
    mels = value("n_mels", MELS)
    if not isinstance(mels, int) or not 8 <= mels <= 256:
        raise UsageError(f"{config}: feature_extractor.n_mels: expected 8 to 256")
    return mels
