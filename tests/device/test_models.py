"""Features and teachers on a pretended GPU: nothing mixes devices, and a batch begins without a wait."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException

from spkd.device import sent
from spkd.outputs.features import FEATURES, input_features
from spkd.registry import STUDENTS
from spkd.students import build
from spkd.teachers import load_teacher
from spkd.teachers.base import EmbeddingModel
from spkd.teachers.dvector import DVector
from spkd.teachers.settings import ModelConfig
from spkd.teachers.sherpa import nemo_bank
from spkd.teachers.speechbrain_features import Fbank, fbank, unit_deviation
from spkd.teachers.toolkit import FrontEnd, NetworkModel
from tests.device.pretended import GPU, NoWaits, gpu
from tests.teachers.test_ssl import MODELS, made
from tests.teachers.test_wespeaker import ORACLES, load, save_wespeaker, weights_of

CPU = torch.device("cpu")
WAVES, LENGTHS = torch.randn(3, 8000), torch.tensor([8000, 6000, 7000])
BANKS: dict[str, Callable[[Tensor], Tensor]] = {
    "speechbrain": lambda waves: unit_deviation(fbank(waves, Fbank(mels=24, deltas=True)), 1e-5),
    "speechbrain, gaussian": lambda waves: fbank(waves, Fbank(shape="gaussian", left=1, right=1)),
    "nemo": lambda waves: nemo_bank(waves, 400, 160, "hann", 24),
}


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "padded"])
def test_features_are_computed_on_the_device(name: str, lengths: Tensor | None) -> None:
    with gpu(waits=True):
        given = [None if x is None else sent(x, GPU) for x in (WAVES, lengths)]
        input_features(FEATURES[name], *given)  # places window and filters
        with NoWaits():
            assert input_features(FEATURES[name], *given).device == GPU


@pytest.mark.parametrize("name", BANKS)
def test_features_of_toolkits_are_computed_on_the_device(name: str) -> None:
    with gpu(waits=True):
        waves = sent(WAVES, GPU)
        BANKS[name](waves)
        with NoWaits():
            assert BANKS[name](waves).device == GPU


def begun(model: EmbeddingModel, lengths: Tensor | None = None, *, waits: bool = False) -> None:
    """Begin a batch of a model twice: the first places what stays, the second waits for nothing."""
    names = list(model.targets)
    with gpu(waits=True):
        for part in vars(model).values():
            if isinstance(part, nn.Module):
                part.to(GPU)
        model.device = GPU
        model.begin(WAVES.pin_memory(), names, names[:1], lengths)
        with contextlib.nullcontext() if waits else NoWaits():
            model.begin(WAVES.pin_memory(), names, names[:1], lengths)


@pytest.mark.parametrize(
    "student", [pytest.param(s, marks=[] if s in ("tiny", "ssl") else pytest.mark.slow) for s in STUDENTS]
)
def test_a_student_scores_on_the_device(student: str) -> None:
    network = build(student, channels={"resnet34": 8, "campplus": 32, "ssl": 32}.get(student, 16), embedding=8)
    model = NetworkModel(network, FrontEnd(network.input_kind, network.features, "as in training"), CPU)
    begun(model, LENGTHS if model.takes_lengths else None)


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "padded"])
def test_the_d_vector_runs_on_the_device(lengths: Tensor | None, tmp_path: Path) -> None:
    lstm, linear = nn.LSTM(40, 256, 3), nn.Linear(256, 256)
    tensors = {f"lstm.{k}": v for k, v in lstm.state_dict().items()}
    save_file(tensors | {f"linear.{k}": v for k, v in linear.state_dict().items()}, tmp_path / "ge2e.safetensors")
    # The number of windows of padded views is on the device, and their embeddings are packed by it.
    teacher = DVector(str(tmp_path / "ge2e.safetensors"), CPU)
    if lengths is None:
        begun(teacher)
    else:
        with pytest.raises(DynamicOutputShapeException, match="nonzero"):
            begun(teacher, lengths, waits=True)


@pytest.mark.parametrize("precision", [pytest.param(None, marks=pytest.mark.slow), torch.bfloat16])
def test_a_model_of_transformers_runs_on_the_device(tiny_wavlm: Path, precision: Any) -> None:
    teacher = load_teacher(ModelConfig("wavlm", str(tiny_wavlm)), CPU)
    teacher.precision = precision
    begun(teacher)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_family_of_transformers_runs_on_the_device(name: str, tmp_path: Path) -> None:
    teacher, _, _ = made(tmp_path, name)
    begun(teacher, LENGTHS if teacher.takes_lengths else None)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == "XVEC" else pytest.mark.slow) for n in ORACLES["wespeaker"]]
)
def test_every_network_of_wespeaker_runs_on_the_device(name: str, tmp_path: Path) -> None:
    dim = ORACLES["wespeaker"][name]["model_args"]["embed_dim"]
    folder = save_wespeaker(tmp_path, name, {"projection.weight": torch.randn(4, dim)})
    begun(load("wespeaker", folder), LENGTHS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ORACLES["3d-speaker"])
def test_every_network_of_3d_speaker_runs_on_the_device(name: str, tmp_path: Path) -> None:
    torch.save(weights_of("3d-speaker", name), tmp_path / "model.ckpt")
    begun(load("3d-speaker", tmp_path), LENGTHS)
