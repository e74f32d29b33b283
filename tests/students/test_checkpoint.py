from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from spkd.errors import SpkdError, UsageError
from spkd.registry import STUDENTS
from spkd.students import Checkpoint, build, load_student, save_student


@pytest.mark.parametrize("name", STUDENTS)
def test_what_is_saved_is_loaded(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    network = build(name, channels=16, embedding=8).eval()
    save_student(tmp_path, Checkpoint(network, torch.randn(3, 8), ["a", "b", "c"], 30.0, {"steps": 5}))
    loaded = load_student(tmp_path)
    features = torch.randn(2, 30, network.input_kind.dim)
    assert torch.equal(loaded.network(features)["embedding"], network(features)["embedding"])
    assert loaded.head is not None
    assert (loaded.head.shape, loaded.classes, loaded.scale, loaded.training) == (
        (3, 8),
        ["a", "b", "c"],
        30.0,
        {"steps": 5},
    )


def test_bad_checkpoints_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no spkd checkpoint"):
        load_student(tmp_path)
    save_student(tmp_path, Checkpoint(build("xvector", channels=16, embedding=8)))
    card, weights = tmp_path / "model.json", tmp_path / "model.safetensors"
    good = json.loads(card.read_text())
    for change, expected in (
        ({"spkd_model": 2}, "update spkd"),
        ({"network": "vgg"}, "unknown network 'vgg'"),
        ({"settings": {"channels": 8, "embedding": 8}}, "of another network"),
    ):
        card.write_text(json.dumps(good | change))
        with pytest.raises(SpkdError, match=expected):
            load_student(tmp_path)
    card.write_text(json.dumps(good))
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(SpkdError, match="damaged"):
        load_student(tmp_path)
