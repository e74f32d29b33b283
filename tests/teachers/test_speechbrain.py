from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
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
from spkd.teachers.speechbrain_features import Fbank, fbank

from ..conftest import HAS_SPEECHBRAIN
from .fixed import fixed_wave
from .speechbrain_grid import CASES, REFUSED

pytestmark = pytest.mark.skipif(not HAS_SPEECHBRAIN, reason="needs speechbrain")
WAVE = torch.from_numpy(fixed_wave())[None]


# Cases of the fast tests; `pytest -m slow` runs the whole grid.
FAST = (
    *("ecapa", "ecapa f_min", "ecapa deltas", "ecapa context", "ecapa std_norm", "ecapa GELU", "ecapa dilations"),
    *("ecapa groups", "ecapa all", "xvector", "xvector deltas", "resnet", "resnet strides"),
)


def made_by_speechbrain(folder: Path, names: Iterable[str]) -> Path:
    """A folder of each of these cases of the grid, with the embedding that SpeechBrain gives."""
    command = [sys.executable, "-m", "tests.teachers.speechbrain_oracle", str(folder), *names]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=Path(__file__).parents[2], env=one_thread, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_by_speechbrain(tmp_path_factory.mktemp("speechbrain"), FAST)


@pytest.fixture(scope="session")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_by_speechbrain(tmp_path_factory.mktemp("speechbrain"), CASES)


def save(folder: Path, weights: dict[str, torch.Tensor], settings: str = CASES["ecapa"]) -> Path:
    torch.save(weights, folder / "embedding_model.ckpt")
    (folder / "hyperparams.yaml").write_text(settings)
    return folder


def load(folder: Path) -> Teacher:
    return load_teacher(ModelConfig("speechbrain", str(folder)), torch.device("cpu"))


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """1 - cosine, in double precision."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return 1 - float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("name", FAST)
def test_a_setting_gives_what_speechbrain_gives(oracle: Path, name: str) -> None:
    check(oracle, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in FAST])
def test_every_setting_gives_what_speechbrain_gives(grid: Path, name: str) -> None:
    check(grid, name)


def check(folder: Path, name: str) -> None:
    teacher = load(folder / name)
    expected = torch.load(folder / name / "expected.pt", weights_only=True).numpy()
    outputs = teacher.extract(WAVE, list(teacher.targets))
    # SpeechBrain adds noise to an x-vector's mean.
    assert np.abs(outputs["embedding"][0] - expected).max() < 2e-3 * np.abs(expected).max()
    assert distance(outputs["embedding"][0], expected) < 1e-6
    for level, target in teacher.targets.items():
        rows = () if target.hop is None else (target.num_frames(WAVE.shape[1]),)
        assert outputs[level].shape == (1, *rows, target.dim), level


@pytest.mark.slow
def test_settings_change_the_embedding(grid: Path) -> None:
    """The grid is one: no two cases give the same, but those that differ in a setting without effect."""
    same = {"ecapa context is off": "ecapa", "ecapa small epsilon": "ecapa std_norm",
            "ecapa default std_norm": "ecapa std_norm", "ecapa default n_mels": "ecapa n_mels"}  # fmt: skip
    found = {name: torch.load(grid / name / "expected.pt", weights_only=True).numpy() for name in CASES}
    names = [name for name in CASES if name not in same]
    for i, a in enumerate(names):
        for b in names[:i]:
            if found[a].shape == found[b].shape:
                assert distance(found[a], found[b]) > 1e-6, (a, b)


@pytest.mark.parametrize("name", ["ecapa", "ecapa dilations", "ecapa groups", "xvector", "resnet", "resnet strides"])
def test_padding_changes_nothing(oracle: Path, name: str) -> None:
    teacher = load(oracle / name)
    assert teacher.takes_lengths
    short = WAVE[:, :16_001]
    both = torch.cat([WAVE, nn.functional.pad(short, (0, WAVE.shape[1] - short.shape[1]))])
    together = teacher.extract(both, list(teacher.targets), lengths=torch.tensor([WAVE.shape[1], short.shape[1]]))
    for level, values in teacher.extract(short, list(teacher.targets)).items():
        padded = together[level][1, : values.shape[1]] if values.ndim == 3 else together[level][1]
        assert np.allclose(padded, values[0], rtol=1e-3, atol=1e-4 * np.abs(values).max()), level


@pytest.mark.parametrize("name", ["ecapa std_norm", "ecapa deltas", "ecapa context"])
def test_features_that_depend_on_the_whole_view_share_no_padded_batch(oracle: Path, name: str) -> None:
    assert not load(oracle / name).takes_lengths


@pytest.mark.parametrize("message", REFUSED)
def test_settings_that_spkd_does_not_have_are_refused_by_name(oracle: Path, tmp_path: Path, message: str) -> None:
    weights = torch.load(oracle / "ecapa" / "embedding_model.ckpt", weights_only=True)
    if "loses a frame" in message:
        weights["blocks.0.conv.conv.weight"] = weights["blocks.0.conv.conv.weight"][..., :4]
    with pytest.raises(UsageError, match=message):
        load(save(tmp_path, weights, REFUSED[message]))


def test_settings_that_act_are_on_the_card(oracle: Path) -> None:
    cards = [load(oracle / name).card() for name in ("ecapa", "ecapa dilations", "ecapa f_min", "ecapa GELU")]
    described = [(card.preprocessing, str(card.details)) for card in cards]
    assert len(set(described)) == 4


def test_nothing_that_the_settings_name_is_run(oracle: Path, tmp_path: Path) -> None:
    weights = torch.load(oracle / "ecapa" / "embedding_model.ckpt", weights_only=True)
    ran = tmp_path / "ran"
    load(save(tmp_path, weights, f"{CASES['ecapa']}evil: !apply:os.system [touch {ran}]\n"))
    load(save(tmp_path, weights, f"{CASES['ecapa']}evil: !!python/object/apply:os.system ['touch {ran}']\n"))
    assert not ran.exists()


def test_a_file_that_says_nothing_of_the_network_is_noted(oracle: Path, tmp_path: Path, capsys: Any) -> None:
    weights = torch.load(oracle / "ecapa" / "embedding_model.ckpt", weights_only=True)
    settings = CASES["ecapa"].split("embedding_model:")[0]
    outputs = load(save(tmp_path, weights, settings)).extract(WAVE, ["embedding"])["embedding"][0]
    assert "nothing there of embedding_model" in "".join(capsys.readouterr())
    assert distance(outputs, torch.load(oracle / "ecapa" / "expected.pt", weights_only=True).numpy()) < 1e-6


def test_the_classifier_gives_logits_with_the_speakers_names(tmp_path: Path, oracle: Path) -> None:
    save(tmp_path, torch.load(oracle / "ecapa" / "embedding_model.ckpt", weights_only=True))
    torch.save({"weight": torch.randn(3, 14)}, tmp_path / "classifier.ckpt")
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
    # Where a name lacks, none is taken: a number beside names would be a name.
    (tmp_path / "label_encoder.txt").write_text("'id2' => 1\n'id1' => 0\n================\n'starting_index' => 0\n")
    numbered = load(tmp_path).head
    assert numbered is not None
    assert numbered.classes == ["0", "1", "2"]


def test_folders_that_are_no_such_model(oracle: Path, tmp_path: Path) -> None:
    weights = torch.load(oracle / "ecapa" / "embedding_model.ckpt", weights_only=True)
    save(tmp_path, weights)
    (tmp_path / "hyperparams.yaml").unlink()
    with pytest.raises(UsageError, match=r"hyperparams.yaml: missing"):
        load(tmp_path)
    with pytest.raises(UsageError, match=r"architecture that spkd does not have .*'w'"):
        load(save(tmp_path, {"w": torch.zeros(2)}))
    with pytest.raises(UsageError, match="a CAM.. of WeSpeaker or 3D-Speaker"):
        load(save(tmp_path, {"xvector.tdnn.linear.weight": torch.zeros(2)}))


def test_a_click_at_the_end_is_not_louder_behind_it() -> None:
    """The window behind a view has the click in its middle, but it is not the view's: it must not raise the floor."""
    waves = 1e-4 * torch.randn(2, 4000, generator=torch.Generator().manual_seed(0))
    waves[0, 1759], waves[0, 1760:] = 1.0, 0.0
    found = fbank(waves, Fbank(80), torch.tensor([1760, 4000]))[0, :12]
    assert torch.allclose(found, fbank(waves[:1, :1760], Fbank(80))[0], atol=1e-4)
