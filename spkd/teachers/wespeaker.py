"""Models trained by WeSpeaker (Wang et al., ICASSP 2023, arXiv 2210.17016): avg_model.pt and config.yaml."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spkd.errors import UsageError
from spkd.networks.toolkits.recognise import recognise
from spkd.outputs.head import Head
from spkd.students import read_weights
from spkd.teachers.settings import ModelConfig
from spkd.teachers.toolkit import ToolkitTeacher, bare, check_rate, fill, kaldi_front_end, read_settings, section

CONFIG, WEIGHTS = "config.yaml", ("avg_model.pt", "models/avg_model.pt", "model.pt")
COSINE = re.compile(r"(add|arc)_margin|sphereface2")
CITE = (
    "Wang et al., WeSpeaker: a research and production oriented speaker embedding learning toolkit, ICASSP 2023, "
    "arXiv 2210.17016"
)


class WeSpeaker(ToolkitTeacher):
    """ResNet18 to 293, ECAPA-TDNN (c512, c1024, GLOB), CAM++, x-vector, ERes2Net, SimAM-ResNet,
    ReDimNet B0 to B6.

    Targets: frames, stats, embedding, segment.a where there are two embedding layers, and logits over the training
    speakers where the projection is in the file.
    """

    cite = CITE
    family = "wespeaker"

    @classmethod
    def load(cls, config: ModelConfig, device: torch.device) -> WeSpeaker:
        """weights: the folder, or the file of weights in it. input: the fbank it was trained on, where that is not
        WeSpeaker's own (its hub's `campplus` and `eres2net` come from 3D-Speaker)."""
        return cls(config.weights, config.settings.input, device)

    def __init__(self, weights: str | None, kind: str, device: torch.device) -> None:
        if weights is None:
            raise UsageError(
                f"teacher={self.family}: name the folder of avg_model.pt and config.yaml by teacher.weights"
            )
        file, settings = _find(Path(weights))
        tensors = bare(read_weights(str(file)))
        projection = {n: tensors.pop(n) for n in list(tensors) if n.startswith("projection.")}
        arguments, mels = section(settings, "model_args"), _mels(settings, weights)
        self.source, self.architecture = file.parent.name, str(settings.get("model", "?"))
        try:
            pooling = arguments.get("pooling_func")
            network, rules = recognise(tensors, mels, None if pooling is None else str(pooling), name=self.architecture)
        except (ValueError, KeyError, IndexError) as error:
            raise UsageError(
                f"{file}: {self.architecture} is an architecture that spkd does not have ({error})"
            ) from error
        fill(network, tensors, str(file), rules)
        head = _head(projection, section(settings, "projection_args"))
        kind = self.family if kind == "auto" else kind
        super().__init__(network, kaldi_front_end(kind, mels), head, device)


def _find(path: Path) -> tuple[Path, dict[str, Any]]:
    """The file of weights, and the settings beside it or above it."""
    folder = path if path.is_dir() else path.parent
    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None) if path.is_dir() else path
    if file is None:
        raise UsageError(f"{path}: no {WEIGHTS[0]} there")
    config = next((f / CONFIG for f in (file.parent, file.parent.parent) if (f / CONFIG).is_file()), None)
    if config is None:
        raise UsageError(f"{path}: no {CONFIG} beside the weights; WeSpeaker writes both")
    return file, read_settings(config)


def _mels(settings: dict[str, Any], source: str) -> int:
    """Bands of its fbank.

    Raises:
        UsageError: another front end, or frames or normalisation that spkd does not have.
    """
    data = section(settings, "dataset_args")
    check_rate(data, "resample_rate", source)
    if (front_end := data.get("frontend", "fbank")) != "fbank":
        raise UsageError(f"{source}: its front end is {front_end}; spkd loads WeSpeaker's models of fbank")
    bank, norm = section(data, "fbank_args"), section(data, "cmvn_args")
    if (bank.get("frame_length", 25), bank.get("frame_shift", 10)) != (25, 10):
        raise UsageError(f"{source}: frames of {bank.get('frame_length')} ms every {bank.get('frame_shift')} ms")
    if not data.get("cmvn", True) or not norm.get("norm_mean", True) or norm.get("norm_var", False):
        raise UsageError(f"{source}: its features are not mean-normalised as WeSpeaker's recipes have it")
    mels = bank.get("num_mel_bins", section(settings, "model_args").get("feat_dim", 80))
    if not isinstance(mels, int) or not 8 <= mels <= 256:
        raise UsageError(f"{source}: fbank of {mels} bands")
    return mels


def _head(projection: dict[str, Tensor], arguments: dict[str, Any]) -> Head | None:
    """The classifier over the training speakers; None where the file has none that gives logits."""
    kind = str(arguments.get("project_type", "softmax"))
    scale, parts = float(arguments.get("scale", 32.0)), int(arguments.get("K", 3)) if "subcenter" in kind else 1
    if COSINE.match(kind) and "projection.weight" in projection:
        weight = projection["projection.weight"]
        return Head(weight, _names(len(weight) // parts), scale)
    if "projection.trans.weight" in projection:
        weight = projection["projection.trans.weight"]
        return Head(weight, _names(len(weight)), kind="linear", bias=projection.get("projection.trans.bias"))
    return None


def _names(count: int) -> list[str]:
    """WeSpeaker keeps the speakers' names elsewhere: their numbers."""
    return [str(i) for i in range(count)]
