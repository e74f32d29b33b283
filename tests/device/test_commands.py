"""Whole commands on a pretended GPU that computes: nothing mixes devices, and they give what they give on the CPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import spkd as interface
from spkd.cache import Cache
from spkd.students import Checkpoint, build, save_student
from tests.conftest import save_teacher
from tests.device.valued import GPU, gpu_with_values

SPEAKERS = [f"s{i}" for i in range(5)]


def test_a_mix_of_devices_is_found() -> None:
    with gpu_with_values():
        values = torch.ones(3).to(GPU)
        assert (2 * values).sum().item() == 6
        with pytest.raises(RuntimeError, match="same device"):
            values + torch.ones(3)


@pytest.fixture
def cached(spkd: Callable, extraction: list[str]) -> list[str]:
    """Folder `cpu`: a cache that was made on the CPU. Returns the teacher's settings."""
    save_teacher(Path("teacher"), speakers=SPEAKERS)
    given = [*extraction, "teacher.targets=[embedding,logits,frames]", "fbank=true"]
    spkd(*given, "cache=cpu", "device=cpu").ok()
    return given


def test_extraction_and_its_check_on_the_device(spkd: Callable, cached: list[str]) -> None:
    with gpu_with_values():
        spkd(*cached, "cache=gpu", "device=cuda").ok()
        checked = spkd("cache", "verify", "cpu", "--live", "3", *cached[1:4], "device=cuda").ok()
    assert "live: embedding (float16): cosine at least 1.000000" in checked.out
    one, other = Cache.open("cpu"), Cache.open("gpu")
    for view in range(0, 18, 5):
        values, again = (cache.batch(np.array([view]), list(one.targets)) for cache in (one, other))
        assert all(torch.equal(values[name], again[name]) for name in one.targets)


@pytest.mark.slow
def test_embedding_and_calibration_on_the_device(spkd: Callable, corpus: Path, tmp_path: Path) -> None:
    save_teacher(tmp_path / "student")
    trials, given = corpus / "trials.txt", [f"manifest={corpus / 'manifest.csv'}", "model=student", "force=true"]
    audio = str(corpus / "audio/spk0/u2.wav")
    spkd("calibrate", trials, *given, "out=cpu.json", "device=cpu").ok()
    expected = interface.load("student", device="cpu").embed([audio])
    with gpu_with_values():
        spkd("calibrate", trials, *given, "out=gpu.json", "device=cuda").ok()
        found = interface.load("student", device="cuda").embed([audio])
    one, other = (json.loads((tmp_path / name).read_text()) for name in ("cpu.json", "gpu.json"))
    assert one["weights"] == other["weights"]
    assert np.array_equal(found, expected)


TRAIN = [
    *("cache=cpu", "steps=6", "batch_size=8", "crop=0.6", "student=tiny", "student.channels=8", "student.embedding=8"),
    *("save_every=2", "optim.warmup=2", "optim.swa_fraction=0.5", "class_means=true", "sampler=hard", "loggers=[]"),
    *("mining.negatives=2", "mining.embeddings=student", "mining.refresh=2"),
    *("loss=[contrastive,kld]", "loss.kld.logits=prototypes"),
]


@pytest.mark.slow
@pytest.mark.usefixtures("cached")
def test_training_with_mining_on_the_device_gives_the_student_of_the_cpu(spkd: Callable, tmp_path: Path) -> None:
    spkd("train", *TRAIN, "out=a", "device=cpu").ok()
    with gpu_with_values():
        spkd("train", *TRAIN, "out=b", "device=cuda").ok()
    one, other = (load_file(tmp_path / out / "model.safetensors") for out in "ab")
    assert one.keys() == other.keys()
    assert all(torch.allclose(values, other[name], atol=1e-5) for name, values in one.items())


def test_a_student_is_saved_from_the_device(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = build("tiny", channels=8, embedding=8).eval()
    save_student(tmp_path / "a", Checkpoint(network))
    with gpu_with_values():
        save_student(tmp_path / "b", Checkpoint(network.to(GPU)))
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
