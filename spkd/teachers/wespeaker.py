"""Models trained by WeSpeaker (Wang et al., ICASSP 2023, arXiv 2210.17016): avg_model.pt and config.yaml."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spkd.errors import UsageError
from spkd.outputs.head import Head
from spkd.students import read_state, weights_of
from spkd.students.description import record_of_export, training_of
from spkd.teachers.settings import ModelConfig
from spkd.teachers.toolkit import ToolkitTeacher, bare, foreign, lacking, read_settings, section
from spkd.teachers.wespeaker_layouts import PYANNOTE, authors_settings, is_authors, is_pyannotes, of_pyannote
from spkd.teachers.wespeaker_networks import CONFIG, Model, build, text

WEIGHTS = ("avg_model.pt", "models/avg_model.pt", "model.pt", "pytorch_model.bin")
COSINE = re.compile(r"(add|arc)_margin")  # the logits of others (sphereface2, ham_margin) are functions of their own
CITE = (
    "Wang et al., WeSpeaker: a research and production oriented speaker embedding learning toolkit, ICASSP 2023, "
    "arXiv 2210.17016"
)


class WeSpeaker(ToolkitTeacher):
    """Networks of WeSpeaker (`wespeaker_networks.NETWORKS`), also as pyannote.audio and the authors of w2v-BERT 2.0
    with adapters save them.

    Targets: frames, stats, embedding, segment.a where there are two embedding layers, frames.layerN where the network
    is on a speech encoder, and logits over the training speakers where the projection is in the file.
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
        file = _find(Path(weights))
        exported = record_of_export(file)
        model = _read(file, weights, str((exported or {}).get("features", self.family)))
        if kind != "auto":  # a student keeps the features that it was trained on
            model.features = kind
        projection = {n: model.tensors.pop(n) for n in list(model.tensors) if n.startswith("projection.")}
        self.source, self.architecture = file.parent.name, text(model.settings.get("model"))
        try:
            built = build(model)
        except (ValueError, KeyError, IndexError, RuntimeError) as error:
            raise UsageError(
                f"{file}: these are not the weights of {self.architecture} ({lacking(error)}); {foreign(model.tensors)}"
            ) from error
        self.settings = built.settings
        head = _head(weights, projection, section(model.settings, "projection_args"))
        super().__init__(built.network, built.front_end, head, device)
        if exported is not None:
            self.training = training_of(file.parent.parent, exported.get("student"))
            self.training_lost = self.training is None


def _find(path: Path) -> Path:
    """File of weights at a path."""
    file = next((path / name for name in WEIGHTS if (path / name).is_file()), None) if path.is_dir() else path
    if file is None:
        raise UsageError(f"{path}: no {WEIGHTS[0]} there")
    return file


def _read(file: Path, source: str, features: str) -> Model:
    """Weights and settings of a model, whoever saved them."""
    state = read_state(str(file), PYANNOTE)
    tensors = bare(weights_of(state, str(file)))
    if is_pyannotes(tensors):
        return of_pyannote(state, tensors, file)
    if is_authors(state):
        return Model(str(file), tensors, authors_settings(file), features, padded=False)
    config = next((f / CONFIG for f in (file.parent, file.parent.parent) if (f / CONFIG).is_file()), None)
    if config is None:
        raise UsageError(f"{source}: no {CONFIG} next to the weights; WeSpeaker writes both")
    return Model(source, tensors, read_settings(config), features)


def _head(source: str, projection: dict[str, Tensor], arguments: dict[str, Any]) -> Head | None:
    """Classifier over the training speakers; None where the file has none that gives cosine logits."""
    kind = text(arguments.get("project_type", "softmax"))
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
