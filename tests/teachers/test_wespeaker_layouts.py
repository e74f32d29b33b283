"""WeSpeaker's networks as pyannote.audio and the authors of w2v-BERT 2.0 with adapters save them."""

from __future__ import annotations

import argparse
import enum
import json
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from spkd.errors import SpkdError, UsageError
from spkd.teachers import load_teacher
from spkd.teachers.base import Teacher
from spkd.teachers.settings import FrontEndSettings, ModelConfig

from .fixed import fixed_wave, fixed_weights

PYANNOTE = json.loads(Path(__file__).with_name("pyannote.json").read_text())
HPARAMS = {"sample_rate": 16_000, "num_channels": 1, "num_mel_bins": 80, "frame_length": 25, "frame_shift": 10,
           "dither": 0.0, "round_to_power_of_two": True, "snip_edges": True, "window_type": "hamming",
           "use_energy": False, "fbank_centering_span": None}  # fmt: skip


def load(path: Path) -> Teacher:
    return load_teacher(ModelConfig("wespeaker", str(path), settings=FrontEndSettings()), torch.device("cpu"))


@contextmanager
def classes_of_pyannote() -> Iterator[Any]:
    """Classes under the names of those whose objects pyannote.audio 4.0.7 pickles."""

    class Problem(enum.Enum):
        REPRESENTATION = 3

    @dataclass
    class Specifications:
        problem: Problem
        duration: float

    name = "pyannote.audio.core.task"
    module = types.ModuleType(name)
    for kind in (Problem, Specifications):
        kind.__module__, kind.__qualname__ = name, kind.__name__
        setattr(module, kind.__name__, kind)
    parts = ["pyannote", "pyannote.audio", "pyannote.audio.core"]
    before = {key: sys.modules.get(key) for key in (*parts, name)}
    sys.modules |= {part: types.ModuleType(part) for part in parts} | {name: module}
    try:
        yield Specifications(Problem.REPRESENTATION, 5.0)
    finally:
        for key, value in before.items():
            if value is None:
                del sys.modules[key]
            else:
                sys.modules[key] = value


def save_pyannote(folder: Path, **settings: Any) -> Path:
    """pytorch_model.bin as pyannote.audio leaves it, with objects of its own."""
    weights = fixed_weights((n, tuple(shape)) for n, shape in PYANNOTE["weights"].items())
    architecture = {"module": "pyannote.audio.models.embedding.wespeaker", "class": "WeSpeakerResNet34"}
    with classes_of_pyannote() as specifications:
        own = {"versions": {"torch": torch.__version__}, "architecture": architecture, "specifications": specifications}
        state = {"state_dict": weights, "pyannote.audio": own, "pytorch-lightning_version": "2.6.6"}
        torch.save(state | {"hyper_parameters": HPARAMS | settings}, folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize("name", [".", "pytorch_model.bin"])
def test_pyannotes_wrapper_gives_what_its_own_code_gives(tmp_path: Path, name: str) -> None:
    teacher = load(save_pyannote(tmp_path) / name)
    embedding = teacher.extract(torch.from_numpy(fixed_wave())[None], ["embedding"])["embedding"][0]
    expected = np.array(PYANNOTE["embedding"])
    assert np.allclose(embedding[: len(expected)], expected, rtol=0, atol=2e-4 * np.abs(expected).max())
    assert abs(np.linalg.norm(embedding.astype(float)) / PYANNOTE["norm"] - 1) < 1e-4
    assert teacher.card().details["network"] == "ResNet34"
    assert "pyannote" not in sys.modules


def test_objects_of_other_packages_are_never_made(tmp_path: Path) -> None:
    save_pyannote(tmp_path)
    state = {"state_dict": {"resnet.seg_1.weight": torch.ones(2, 2)}, "other": argparse.Namespace()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(SpkdError, match=r"it holds Python objects \(argparse.Namespace\)"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sample_rate": 8_000}, "sample_rate is 8000; spkd has 16000"),
        ({"frame_length": 32}, "frame_length is 32; spkd has 25"),
        ({"frame_shift": 12.5}, "frame_shift is 12.5; spkd has 10"),
        ({"dither": 1.0}, "dither is 1.0; spkd has 0"),
        ({"snip_edges": False}, "snip_edges is False; spkd has True"),
        ({"round_to_power_of_two": False}, "round_to_power_of_two is False"),
        ({"use_energy": True}, "use_energy is True; spkd has False"),
        ({"fbank_centering_span": 3.0}, "fbank_centering_span is 3.0; spkd has None"),
        ({"window_type": "hanning"}, "window_type is hanning; taken: hamming, povey"),
        ({"num_mel_bins": 64}, "has the shape"),
        ({"low_freq": 60}, "low_freq is not known"),
    ],
)
def test_settings_of_pyannote_are_refused_by_name(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load(save_pyannote(tmp_path, **settings))


def test_the_config_beside_a_checkpoint_of_pyannote_counts(tmp_path: Path) -> None:
    """Such as that of pyannote/wespeaker-voxceleb-resnet34-LM; what the checkpoint has comes first."""
    save_pyannote(tmp_path)
    model = {"_target_": "pyannote.audio.models.embedding.WeSpeakerResNet34", "frame_length": 25, "low_freq": 60}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": model}))
    with pytest.raises(UsageError, match="low_freq is not known"):
        load(tmp_path)


def test_povey_windows_make_another_fbank(tmp_path: Path) -> None:
    (tmp_path / "povey").mkdir()
    wave = torch.from_numpy(fixed_wave())[None]
    one, other = load(save_pyannote(tmp_path)), load(save_pyannote(tmp_path / "povey", window_type="povey"))
    assert one.card().preprocessing != other.card().preprocessing
    assert not np.allclose(*(t.extract(wave, ["embedding"])["embedding"] for t in (one, other)), rtol=1e-3)


@pytest.mark.parametrize("lora", [False, True])
def test_checkpoints_of_the_authors_of_w2v_bert_with_adapters(tmp_path: Path, lora: bool) -> None:
    """Their code drops a fbank frame without a partner; LoRA that is not merged needs train.yaml."""
    pytest.importorskip("transformers")
    from .test_wespeaker_networks import LORA, encoder_state, hidden_states, mfa, w2v_bert, with_lora

    model, head = w2v_bert(tmp_path / "w2v")
    state = with_lora(model) if lora else encoder_state(model)
    state = {n.replace("frontend.", "front."): values for n, values in (state | head).items()}
    file = tmp_path / "ckpt_0001.pth"
    torch.save({"modules": {"spk_model": state, "classifier": {"weight": torch.ones(3, 24)}}, "epoch_idx": 1}, file)
    settings = f"peft_config: !apply:deeplab.create_lora_config\n  r: 2\n  lora_alpha: {LORA['lora_alpha']}\n"
    kind = "spk_model: !new:local.spk_model.Audio2Vec_based_Adapter\n  model_name: facebook/w2v-bert-2.0\n"
    if lora:
        with pytest.raises(UsageError, match="its weights have LoRA"):
            load(file)
        (tmp_path / "train.yaml").write_text(f"{settings}{kind}  pooling_layer: ASP\n  adapter_dim: 8\n")
    wave = fixed_wave()[:16_160]
    _, expected = mfa(hidden_states(model, wave[:16_000]), head)
    teacher = load(file)
    found = teacher.extract(torch.from_numpy(wave)[None], ["embedding", "frames"])
    assert found["frames"].shape[1] == 49 == teacher.targets["frames"].num_frames(len(wave))
    even = teacher.extract(torch.from_numpy(wave[:16_000])[None], ["embedding"])["embedding"][0]
    assert np.allclose(even, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    (tmp_path / "train.yaml").write_text(f"{settings}{kind}  pooling_layer: TAP\n")
    with pytest.raises(UsageError, match="spk_model.pooling_layer is TAP; spkd has ASP"):
        load(file)
