"""Models trained by WeSpeaker (Wang et al., ICASSP 2023, arXiv 2210.17016): avg_model.pt and config.yaml."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spkd.errors import UsageError
from spkd.networks.toolkits.recognise import recognise
from spkd.networks.toolkits.redimnet import SHAPES
from spkd.networks.toolkits.resnet import DEPTHS
from spkd.outputs.head import Head
from spkd.students import read_weights
from spkd.students.description import record_of_export, training_of
from spkd.teachers.settings import ModelConfig
from spkd.teachers.toolkit import (
    ToolkitTeacher,
    bare,
    check_keys,
    check_rate,
    fill,
    foreign,
    kaldi_front_end,
    lacking,
    read_settings,
    section,
)

CONFIG, WEIGHTS = "config.yaml", ("avg_model.pt", "models/avg_model.pt", "model.pt")
COSINE = re.compile(r"(add|arc)_margin")  # the logits of others (sphereface2, ham_margin) are functions of their own
CITE = (
    "Wang et al., WeSpeaker: a research and production oriented speaker embedding learning toolkit, ICASSP 2023, "
    "arXiv 2210.17016"
)


NETWORKS = (
    *(f"ResNet{n}" for n in DEPTHS),
    *("ECAPA_TDNN_c512", "ECAPA_TDNN_c1024", "ECAPA_TDNN_GLOB_c512", "ECAPA_TDNN_GLOB_c1024", "CAMPPlus", "XVEC"),
    *("ERes2Net34_Base", "ERes2Net34_Large", "ERes2Net34_aug", "SimAM_ResNet34_ASP", "SimAM_ResNet100_ASP"),
    *SHAPES,
)
POOLINGS = ("TSTP", "ASTP", "TAP", "TSDP")
# Settings of networks: pooling, those that the shapes of the weights tell, and one with an effect only in training.
MODEL_KEYS = (
    "pooling_func",
    *("feat_dim", "acoustic_dim", "embed_dim", "two_emb_layer", "emb_bn", "in_planes", "hid_dim", "stats_dim"),
    *("expansion", "baseWidth", "scale", "growth_rate", "bn_size", "init_channels"),
    "dropout",
)
FBANK_KEYS = (
    *("num_mel_bins", "frame_length", "frame_shift", "resample_rate"),
    *("dither", "raw_wav"),  # only in training
)
# Settings of data: those that are read here, and those with an effect only in training.
DATA_KEYS = (
    *("resample_rate", "frontend", "fbank_args", "cmvn", "cmvn_args"),
    *("aug_prob", "chunk_info_args", "filter", "filter_args", "musan_scp", "num_frms", "rirs_scp", "shuffle"),
    *("sample_num_per_epoch", "shuffle_args", "spec_aug", "spec_aug_args", "speed_perturb", "speed_perturb_mode"),
    *("train_label", "train_scp", "s3prl_args", "tfmel_args", "w2vbert_args", "whisper_encoder_args"),
)


class WeSpeaker(ToolkitTeacher):
    """WeSpeaker's ResNet18 to 293, ECAPA-TDNN (c512, c1024, GLOB), CAM++, x-vector, ERes2Net, SimAM-ResNet and
    ReDimNet B0 to B6.

    Targets: frames, stats, embedding, segment.a where there are two embedding layers, and logits over the training
    speakers where the projection is in the file.
    """

    cite = CITE
    family = "wespeaker"

    @classmethod
    def load(cls, config: ModelConfig, device: torch.device) -> WeSpeaker:
        """Load a model.

        `weights` is the folder, or the file of weights in it. `input` is the fbank that the model was trained on, where
        it is not WeSpeaker's (`campplus` and `eres2net` of its hub come from 3D-Speaker); a folder that spkd exported
        says it.
        """
        return cls(config.weights, config.settings.input, device)

    def __init__(self, weights: str | None, kind: str, device: torch.device) -> None:
        if weights is None:
            raise UsageError(f"{self.family}: name the folder of avg_model.pt and config.yaml by weights=...")
        file, settings = _find(Path(weights))
        tensors = bare(read_weights(str(file)))
        projection = {n: tensors.pop(n) for n in list(tensors) if n.startswith("projection.")}
        mels = _mels(settings, weights)
        self.source, self.architecture = file.parent.name, _text(settings.get("model"))
        pooling = _pooling(settings, self.architecture, weights)
        self.settings = {} if pooling is None else {"pooling": pooling}
        try:
            network, rules = recognise(tensors, mels, pooling, name=self.architecture)
        except (ValueError, KeyError, IndexError) as error:
            raise UsageError(
                f"{file}: these are not the weights of {self.architecture} ({lacking(error)}); {foreign(tensors)}"
            ) from error
        fill(network, tensors, str(file), rules)
        head = _head(weights, projection, section(settings, "projection_args"))
        exported = record_of_export(file)
        if kind == "auto":  # a student keeps the features that it was trained on
            kind = str((exported or {}).get("features", self.family))
        super().__init__(network, kaldi_front_end(kind, mels), head, device)
        if exported is not None:
            self.training = training_of(file.parent.parent, exported.get("student"))
            self.training_lost = self.training is None


def _find(path: Path) -> tuple[Path, dict[str, Any]]:
    """File of weights, and the settings next to it or in a folder above."""
    folder = path if path.is_dir() else path.parent
    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None) if path.is_dir() else path
    if file is None:
        raise UsageError(f"{path}: no {WEIGHTS[0]} there")
    config = next((f / CONFIG for f in (file.parent, file.parent.parent) if (f / CONFIG).is_file()), None)
    if config is None:
        raise UsageError(f"{path}: no {CONFIG} next to the weights; WeSpeaker writes both")
    return file, read_settings(config)


def _text(value: Any) -> str:
    """Name in a settings file, as shown in errors."""
    return value[:100] if isinstance(value, str) else f"a {type(value).__name__}"


def _pooling(settings: dict[str, Any], architecture: str, source: str) -> str | None:
    """WeSpeaker's name of the pooling of a network; None: the pooling of the architecture."""
    if "model" not in settings:
        raise UsageError(f"{source}: no model in its {CONFIG}, which names the network")
    if architecture not in NETWORKS:
        raise UsageError(f"{source}: model is {architecture}, which spkd does not have; taken: {', '.join(NETWORKS)}")
    arguments = section(settings, "model_args")
    check_keys(arguments, MODEL_KEYS, f"{source}: model_args")
    pooling = arguments.get("pooling_func")
    if pooling not in (None, *POOLINGS):
        raise UsageError(f"{source}: model_args.pooling_func is {_text(pooling)}; taken: {', '.join(POOLINGS)}")
    fixed = _FIXED_POOLING.get(architecture.split("_")[0])
    if pooling is not None and fixed is not None and pooling != fixed:
        raise UsageError(f"{source}: model_args.pooling_func is {pooling}; of {architecture} spkd has {fixed}")
    return pooling


_FIXED_POOLING = {"ECAPA": "ASTP", "CAMPPlus": "TSTP"}


def _mels(settings: dict[str, Any], source: str) -> int:
    """Number of bands of the fbank."""
    data = section(settings, "dataset_args")
    check_keys(data, DATA_KEYS, f"{source}: dataset_args")
    check_rate(data, "resample_rate", source)
    if (front_end := data.get("frontend", "fbank")) != "fbank":
        raise UsageError(f"{source}: its front end is {_text(front_end)}; spkd loads WeSpeaker's models of fbank")
    # Earlier releases of WeSpeaker have the settings of features at the top level.
    bank, norm = section(data, "fbank_args") or section(settings, "feature_args"), section(data, "cmvn_args")
    check_rate(bank, "resample_rate", source)
    check_keys(bank, FBANK_KEYS, f"{source}: dataset_args.fbank_args")
    check_keys(norm, ("norm_mean", "norm_var"), f"{source}: dataset_args.cmvn_args")
    for key, expected in (("frame_length", 25), ("frame_shift", 10)):
        if (given := bank.get(key, expected)) != expected:
            shown = given if isinstance(given, int | float) else _text(given)
            raise UsageError(f"{source}: fbank_args.{key} is {shown} ms; spkd has {expected}")
    if not data.get("cmvn", True) or not norm.get("norm_mean", True) or norm.get("norm_var", False):
        raise UsageError(
            f"{source}: its features are not mean-normalised as WeSpeaker's recipes have it (cmvn, norm_mean, norm_var)"
        )
    mels = bank.get("num_mel_bins", 80)
    if not isinstance(mels, int) or not 8 <= mels <= 256:
        raise UsageError(f"{source}: fbank_args.num_mel_bins: expected 8 to 256")
    return mels


def _head(source: str, projection: dict[str, Tensor], arguments: dict[str, Any]) -> Head | None:
    """Classifier over the training speakers; None where the file has none that gives cosine logits."""
    kind = _text(arguments.get("project_type", "softmax"))
    scale, subcentres = arguments.get("scale", 32.0), arguments.get("K", 3) if "subcenter" in kind else 1
    if (
        not isinstance(scale, int | float)
        or not 0 < scale < 1e4
        or not isinstance(subcentres, int)
        or not 0 < subcentres < 1000
    ):
        raise UsageError(f"{source}: projection_args: scale or K is no number of a classifier")
    if COSINE.match(kind) and "projection.weight" in projection:
        weight = projection["projection.weight"]
        return Head(weight, _names(len(weight) // subcentres), float(scale))
    if "projection.trans.weight" in projection:
        weight = projection["projection.trans.weight"]
        return Head(weight, _names(len(weight)), kind="linear", bias=projection.get("projection.trans.bias"))
    return None


def _names(count: int) -> list[str]:
    """Numbers of the speakers instead of their names, which WeSpeaker does not keep with the model."""
    return [str(i) for i in range(count)]
