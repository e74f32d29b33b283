"""Checkpoints of the authors of ReDimNet: what their own code gives is in redimnet.json (see record_redimnet.py)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spkd.errors import SpkdError, UsageError
from spkd.teachers import load_teacher
from spkd.teachers.base import Teacher
from spkd.teachers.settings import ModelConfig

from .fixed import fixed_wave, fixed_weights
from .test_wespeaker import check

ORACLES = json.loads(Path(__file__).with_name("redimnet.json").read_text())
SECOND = "ReDimNet2 with a layer for each band"


def save(folder: Path, name: str, tensors: dict[str, Any] | None = None, **changed: Any) -> Path:
    """A checkpoint as the authors publish it."""
    weights = fixed_weights((n, tuple(shape)) for n, shape in ORACLES[name]["weights"].items())
    content = {"model_config": ORACLES[name]["config"] | changed, "state_dict": weights | (tensors or {})}
    torch.save(content, folder / "b0-vox2-lm.pt")
    return folder / "b0-vox2-lm.pt"


def load(file: Path) -> Teacher:
    return load_teacher(ModelConfig("redimnet", str(file)), torch.device("cpu"))


@pytest.mark.parametrize("name", ORACLES)
def test_the_authors_models_give_what_their_own_code_gives(tmp_path: Path, name: str) -> None:
    check(load(save(tmp_path, name)), ORACLES[name])


def test_the_card_names_the_file_and_the_features(tmp_path: Path) -> None:
    card = load(save(tmp_path, SECOND)).card()
    assert card.source == "b0-vox2-lm.pt"
    assert card.details["network"] == "ReDimNet2"
    assert "24-mel log energies of ReDimNet (20 to 7600 Hz" in card.preprocessing


def test_frames_are_where_their_audio_is(tmp_path: Path) -> None:
    """A click between silences changes the frames around it most: their times are those of the declared target."""
    teacher = load(save(tmp_path, SECOND, block_1d_type="conv+att"))
    target = teacher.targets["frames"]
    assert target.num_frames(16_000 - 1) == 50  # 100 frames of 10 ms, in steps of two
    waves = torch.from_numpy(fixed_wave(2.0))[None] * 0.02
    clicked = waves.clone()
    clicked[0, 16_000] += 0.5
    before, after = (torch.from_numpy(teacher.extract(w, ["frames"])["frames"][0]).double() for w in (waves, clicked))
    change = (after - before).square().sum(1)
    centres = target.middle + target.hop * torch.arange(len(change))
    assert abs(float((change**2 * centres).sum() / (change**2).sum()) - 16_000) < target.hop


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"causal": "full"}, "model_config.causal is full: spkd takes none"),
        ({"spec_in_channels": 2}, "spec_in_channels is 2"),
        ({"use_freq_pos_enc": True}, "use_freq_pos_enc is True"),
        ({"fm_weigthing_type": "N"}, "fm_weigthing_type is N: spkd takes NC"),
        ({"block_1d_type": "lstm"}, "block_1d_type is lstm: spkd takes fc, conv, att, conv"),
        ({"block_2d_type": []}, "block_2d_type is []"),
        ({"group_divisor": 100}, "24 channels cannot be divided into groups of 100"),
        ({"stages_setup": [[[7, 1], 1, 1, [[3, 3]], None]]}, "24 bands cannot be divided by 7"),
        ({"stages_setup": [[[1, 1], 1, 1, [[3, 3]]]]}, "stages of stride, blocks, expansion, kernels, reduction"),
        ({"stages_setup": []}, "1 to 64 stages"),
        ({"stages_setup": [[[1, 1], 1, 1, [[3, 3]], 100]]}, "no multiple of 4 heads"),
        ({"C": 10**9}, "model_config.C is 1000000000: spkd takes 1 to 4096"),
        ({"F": True}, "model_config.F is True"),
        ({"pooling_func": "TMAP"}, "pooling_func is TMAP"),
        ({"pad_right_samples": 80}, "pad_right_samples is 80"),
        ({"before_pool_offset": 1}, "before_pool_offset is 1"),
        ({"feat_type": "pt_stft"}, "feat_type is pt_stft"),
        ({"hop_length": 240}, "hop_length is 240: spkd takes 160"),
        ({"spec_params": {"spec_norm": "bn"}}, "spec_params.spec_norm is bn: spkd takes mn, mvn"),
        ({"spec_params": {"n_fft": 256}}, "windows of 400 samples, n_fft 256"),
        ({"spec_params": {"f_mim": 3}}, "spec_params.f_mim is not known here"),
        ({"poling_func": "ASTP"}, "model_config.poling_func is not known here"),
        ({"embed_dim": 7}, "linear.weight has the shape (192, 240), expected (7, 240)"),
        ({"F": 2304, "C": 2304}, "weights, more than the file has"),
    ],
)
def test_settings_that_change_an_embedding_are_honoured_or_refused(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        load(save(tmp_path, SECOND, **changed))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_of_training_are_left_out(tmp_path: Path) -> None:
    aside = {
        "num_classes": 5994,
        "feat_agg_dropout": 0.1,
        "spec_params": {"do_spec_aug": True, "freq_mask_width": [0, 6]},
    }
    check(load(save(tmp_path, SECOND, **aside)), ORACLES[SECOND])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda f: save(f, SECOND, {"spec.torchfbank.2.mel_scale.fb": torch.zeros(257, 24)}),
            "its mel filters are not",
        ),
        (
            lambda f: save(f, SECOND, {"spec.spec_norm.weight": torch.ones(24)}),
            "weights 'spec.spec_norm.weight' are not",
        ),
        (lambda f: save(f, "ReDimNet", num_classes=10), "num_classes is 10"),
        (lambda f: save(f, "ReDimNet", tf_optimized_arch=True), "tf_optimized_arch is True"),
    ],
)
def test_files_that_are_not_whole_are_refused(tmp_path: Path, make: Callable, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(make(tmp_path))
    assert message in str(caught.value)


def test_other_files_are_refused_with_what_is_expected(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(3)}, tmp_path / "w.pt")
    with pytest.raises(UsageError, match="expected model_config and state_dict"):
        load(tmp_path / "w.pt")
    torch.save({"model_config": {}, "state_dict": 3}, tmp_path / "w.pt")
    with pytest.raises(SpkdError, match="holds a int"):
        load(tmp_path / "w.pt")
    with pytest.raises(UsageError, match="name the checkpoint"):
        load_teacher(ModelConfig("redimnet"), torch.device("cpu"))
