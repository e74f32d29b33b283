"""Models trained by 3D-Speaker (Chen et al., 2024, arXiv 2403.19971): checkpoints of its page and of its recipes."""

from __future__ import annotations

from pathlib import Path

import torch

from spkd.errors import UsageError
from spkd.networks.toolkits.recognise import recognise
from spkd.outputs.head import Head
from spkd.students import read_weights
from spkd.teachers.settings import ModelConfig
from spkd.teachers.toolkit import ToolkitTeacher, bare, fill, kaldi_front_end

SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".safetensors")
EMBEDDING_MODEL, CLASSIFIER = "embedding_model.ckpt", "classifier.ckpt"
SCALE = 32.0  # of the margin losses of its recipes
FLOOR = 1e-8  # added to a variance before its root
CITE = (
    "Chen et al., 3D-Speaker-Toolkit: an open source toolkit for multi-modal speaker verification and diarization, "
    "2024, arXiv 2403.19971"
)


class ThreeDSpeaker(ToolkitTeacher):
    """CAM++, ERes2Net, ERes2NetV2, ECAPA-TDNN, ResNet34.

    Targets: frames, stats, embedding, segment.a where there are two embedding layers, and logits over the training
    speakers where classifier.ckpt lies beside the weights, as its recipes leave it.
    """

    cite = CITE
    family = "3d-speaker"

    @classmethod
    def load(cls, config: ModelConfig, device: torch.device) -> ThreeDSpeaker:
        """weights: the checkpoint, or a folder with one. input: the fbank, where it is not 3D-Speaker's own."""
        return cls(config.weights, config.settings.input, device)

    def __init__(self, weights: str | None, kind: str, device: torch.device) -> None:
        if weights is None:
            raise UsageError(f"teacher={self.family}: name the checkpoint by teacher.weights")
        file = _find(Path(weights))
        tensors = bare(read_weights(str(file)))
        self.source = file.name
        try:
            network, rules = recognise(tensors, floor=FLOOR)
        except (ValueError, KeyError, IndexError) as error:
            raise UsageError(f"{file}: of an architecture that spkd does not have ({error})") from error
        self.architecture = type(network).__name__
        fill(network, tensors, str(file), rules)
        head = None
        if (beside := file.with_name(CLASSIFIER)).is_file() and file.name == EMBEDDING_MODEL:
            classifier = bare(read_weights(str(beside)))
            if set(classifier) == {"weight"}:
                head = Head(classifier["weight"], [str(i) for i in range(len(classifier["weight"]))], SCALE)
        kind = self.family if kind == "auto" else kind
        super().__init__(network, kaldi_front_end(kind), head, device)


def _find(path: Path) -> Path:
    """The one checkpoint that a path names."""
    if not path.is_dir():
        return path
    if (path / EMBEDDING_MODEL).is_file():
        return path / EMBEDDING_MODEL
    found = sorted(f for f in path.iterdir() if f.suffix in SUFFIXES and f.name != CLASSIFIER)
    if len(found) != 1:
        raise UsageError(f"{path}: {len(found)} checkpoints there; name one of them by teacher.weights")
    return found[0]
