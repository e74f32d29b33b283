from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from spkd import models
from spkd.errors import SpkdError, UsageError
from spkd.models import Checkpoint


@pytest.mark.parametrize("name", models.NETWORKS)
def test_what_is_saved_is_loaded(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    network = models.build(name, channels=16, embedding=8).eval()
    models.save(tmp_path, Checkpoint(network, torch.randn(3, 8), ["a", "b", "c"], 30.0, {"steps": 5}))
    loaded = models.load(tmp_path)
    features = torch.randn(2, 30, network.hears.dim)
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
        models.load(tmp_path)
    models.save(tmp_path, Checkpoint(models.build("xvector", channels=16, embedding=8)))
    card, weights = tmp_path / "model.json", tmp_path / "model.safetensors"
    good = json.loads(card.read_text())
    for change, expected in (
        ({"spkd_model": 2}, "update spkd"),
        ({"network": "vgg"}, "unknown network 'vgg'"),
        ({"settings": {"channels": 8, "embedding": 8}}, "of another network"),
    ):
        card.write_text(json.dumps(good | change))
        with pytest.raises(SpkdError, match=expected):
            models.load(tmp_path)
    card.write_text(json.dumps(good))
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(SpkdError, match="damaged"):
        models.load(tmp_path)
