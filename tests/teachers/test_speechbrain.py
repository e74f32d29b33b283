from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from spkd.errors import UsageError
from spkd.teachers import load_teacher
from spkd.teachers.base import Teacher
from spkd.teachers.settings import ModelConfig
from spkd.teachers.speechbrain import fbank

from ..conftest import HAS_SPEECHBRAIN
from .fixed import fixed_wave

pytestmark = pytest.mark.skipif(not HAS_SPEECHBRAIN, reason="needs speechbrain")
SETTINGS = """
sample_rate: 16000
n_mels: 24
compute_features: !new:speechbrain.lobes.features.Fbank
    n_mels: !ref <n_mels>
mean_var_norm: !new:speechbrain.processing.features.InputNormalization
    norm_type: sentence
    std_norm: False
evil: !apply:os.system [touch ran]
"""


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Weights, features and embedding of SpeechBrain's own models."""
    folder = tmp_path_factory.mktemp("speechbrain")
    command = [sys.executable, "-m", "tests.teachers.speechbrain_oracle", str(folder)]
    subprocess.run(command, cwd=Path(__file__).parents[2], check=True, capture_output=True)
    return {file.stem: torch.load(file, weights_only=True) for file in folder.iterdir()}


def save(folder: Path, weights: dict[str, torch.Tensor], settings: str = SETTINGS) -> Path:
    torch.save(weights, folder / "embedding_model.ckpt")
    (folder / "hyperparams.yaml").write_text(settings)
    return folder


def load(folder: Path) -> Teacher:
    return load_teacher(ModelConfig("speechbrain", str(folder)), torch.device("cpu"))


@pytest.mark.parametrize(("name", "mels"), [("ecapa", 80), ("resnet", 80), ("xvector", 24)])
def test_features_and_embedding_are_speechbrains(tmp_path: Path, oracle: dict, name: str, mels: int) -> None:
    teacher = load(save(tmp_path, oracle[name]["weights"]))
    wave, expected = torch.from_numpy(fixed_wave())[None], oracle[name]["embedding"]
    assert torch.allclose(fbank(wave, mels), oracle[name]["features"], atol=2e-3)
    outputs = teacher.extract(wave, list(teacher.targets))
    assert torch.allclose(torch.from_numpy(outputs["embedding"][0]), expected, atol=2e-3 * float(expected.abs().max()))
    for level, target in teacher.targets.items():
        rows = () if target.hop is None else (target.num_frames(wave.shape[1]),)
        assert outputs[level].shape == (1, *rows, target.dim), level
    short = wave[:, :16_001]
    both = torch.cat([wave, nn.functional.pad(short, (0, wave.shape[1] - short.shape[1]))])
    together = teacher.extract(both, list(teacher.targets), lengths=torch.tensor([wave.shape[1], short.shape[1]]))
    for level, values in teacher.extract(short, list(teacher.targets)).items():
        padded = together[level][1, : values.shape[1]] if values.ndim == 3 else together[level][1]
        assert np.allclose(padded, values[0], rtol=1e-3, atol=1e-4 * np.abs(values).max()), level
    assert not Path("ran").exists()


def test_the_classifier_gives_logits_with_the_speakers_names(tmp_path: Path, oracle: dict) -> None:
    save(tmp_path, oracle["ecapa"]["weights"])
    torch.save({"weight": torch.randn(3, 24)}, tmp_path / "classifier.ckpt")
    (tmp_path / "label_encoder.txt").write_text(
        "'id2' => 1\n'id1' => 0\n'it\\'s' => 2\n================\n'starting_index' => 0\n"
    )
    teacher = load(tmp_path)
    assert teacher.head is not None
    assert teacher.head.classes == ["id1", "id2", "it\\'s"]
    outputs = teacher.extract(torch.from_numpy(fixed_wave())[None], ["embedding", "logits"])
    rows = teacher.head.weight.double()
    vector = torch.from_numpy(outputs["embedding"][0]).double()
    cosines = rows @ vector / rows.norm(dim=1) / vector.norm()
    assert np.allclose(outputs["logits"][0], 30 * cosines, atol=1e-3)


def test_what_spkd_does_not_have_is_refused(tmp_path: Path, oracle: dict) -> None:
    weights = oracle["ecapa"]["weights"]
    save(tmp_path, weights, SETTINGS.replace("std_norm: False", "std_norm: True"))
    with pytest.raises(UsageError, match="normalised in a way"):
        load(tmp_path)
    save(tmp_path, weights, SETTINGS.replace("16000", "8000"))
    with pytest.raises(UsageError, match="8000 Hz"):
        load(tmp_path)
    torch.save({"w": torch.zeros(2)}, tmp_path / "embedding_model.ckpt")
    (tmp_path / "hyperparams.yaml").unlink()
    with pytest.raises(UsageError, match="architecture that spkd does not have"):
        load(tmp_path)
