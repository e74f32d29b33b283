"""The map, against its formula in float64, and its files, damaged in every way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.special import erf

import spkd as interface
from spkd.corpus.people import People
from spkd.errors import SpkdError, UsageError
from spkd.files import digest
from spkd.mapping.embedding_map import FORMAT, EmbeddingMap, MapNetwork, Model, TrainedOn, load_map
from spkd.outputs.teacher_card import TeacherCard
from spkd.voiceprint import Voiceprint


@pytest.fixture(autouse=True)
def current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def made(old: int = 5, new: int = 3, hidden: int = 4) -> EmbeddingMap:
    torch.manual_seed(0)
    models = [
        Model(TeacherCard("checkpoint", name * 64, "MIT", name, "none", details={"layer": 1}), None, width)
        for name, width in (("a", old), ("b", new))
    ]
    trained_on = TrainedOn("c", "d", 10, 4, 1, None, 0.5, 0.1, 20, 0)
    return EmbeddingMap.of(*models, hidden, trained_on, People(), MapNetwork(old, new, hidden))


def formula(network: MapNetwork, x: np.ndarray) -> np.ndarray:
    """What the map gives, in float64."""
    w = {name: value.double().numpy() for name, value in network.state_dict().items()}
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    y = x @ w["linear.weight"].T + w["linear.bias"]
    if "inner.weight" in w:
        h = x @ w["inner.weight"].T + w["inner.bias"]
        y += (h * 0.5 * (1 + erf(h / np.sqrt(2)))) @ w["outer.weight"].T + w["outer.bias"]
    return y / np.linalg.norm(y, axis=1, keepdims=True)


@pytest.mark.parametrize("hidden", [0, 4])
def test_a_map_is_its_formula_also_after_it_was_kept(hidden: int) -> None:
    the_map, x = made(hidden=hidden), np.random.RandomState(0).standard_normal((7, 5))
    the_map.save(Path("map"))
    assert sorted(path.name for path in Path("map").iterdir()) == ["map.json", "map.safetensors"]
    kept = interface.load_map("map")
    assert kept.fingerprint == the_map.fingerprint
    assert (kept.old, kept.new, kept.trained_on) == (the_map.old, the_map.new, the_map.trained_on)
    for each in (the_map, kept):
        assert np.abs(each.map(x) - formula(the_map.network, x)).max() < 1e-6
        for scale in (9, 1e-20, 1e20):  # squares of the last two are beyond float32
            assert np.abs(each.map(scale * x[2]) - formula(the_map.network, x)[2]).max() < 1e-6
    assert kept.map(x).dtype == np.float32
    assert kept.map(np.empty((0, 5))).shape == (0, 3)


@pytest.mark.parametrize("given", [np.ones((2, 4)), np.zeros((1, 5)), np.full(5, np.nan), np.ones((1, 1, 5))])
def test_what_cannot_be_mapped_is_refused(given: np.ndarray) -> None:
    with pytest.raises(UsageError, match="the map .*: (takes embeddings .N, 5., got|an embedding of zeros)"):
        made().map(given)


def test_a_voiceprint_is_mapped_and_marked() -> None:
    the_map = made()
    mean = np.array([0.3, -0.4, 0.1, 0.2, 0.0], np.float32)
    voice = Voiceprint(mean, the_map.old.digest, 3, 12.5, "2026-12-01", ("recording 1: its samples are clipped",))
    mapped = the_map.map_voiceprint(voice)
    length = np.sqrt((mean.astype(np.float64) ** 2).sum())
    assert np.abs(mapped.embedding - length * formula(the_map.network, mean[None].astype(np.float64))[0]).max() < 1e-6
    assert (mapped.model, mapped.mapped_by) == (the_map.new.digest, the_map.fingerprint)
    assert (mapped.recordings, mapped.seconds, mapped.enrolled, mapped.remarks) == (
        3,
        12.5,
        "2026-12-01",
        voice.remarks,
    )
    assert Voiceprint.from_bytes(mapped.to_bytes()) == mapped
    with pytest.raises(UsageError, match="takes voiceprints of checkpoint a .*, got one of another model"):
        the_map.map_voiceprint(mapped)
    again = Voiceprint(mean, the_map.old.digest, 1, 1.0, "2026-12-01", (), "f" * 64)
    with pytest.raises(UsageError, match="got one that was mapped"):
        the_map.map_voiceprint(again)


def test_a_fingerprint_changes_with_models_and_weights_alone() -> None:
    the_map = made()
    assert made().fingerprint == the_map.fingerprint
    with torch.no_grad():
        the_map.network.linear.bias[0] += 1e-6
    changed = EmbeddingMap.of(the_map.old, the_map.new, 4, the_map.trained_on, People(), the_map.network)
    assert changed.fingerprint != the_map.fingerprint
    other = Model(the_map.new.card, "silero 6.2", 3)
    assert EmbeddingMap.of(the_map.old, other, 4, the_map.trained_on, People(), made().network).fingerprint not in (
        the_map.fingerprint,
        changed.fingerprint,
    )


def reseal(change: Callable[[dict], None]) -> None:
    """Change map.json, with a digest that fits."""
    tree = json.loads(Path("map/map.json").read_text())
    content = {name: value for name, value in tree.items() if name not in ("spkd_map", "digest")}
    change(content)
    Path("map/map.json").write_text(json.dumps(FORMAT.seal(content)))


def with_weights(change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the weights, with a digest of theirs that fits."""
    path = Path("map/map.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    reseal(lambda content: content.update(weights_sha256=digest.of_file(path)))


def flip(name: str, place: int) -> None:
    data = bytearray(Path("map", name).read_bytes())
    data[place] ^= 1
    Path("map", name).write_bytes(bytes(data))


def pickled() -> None:
    torch.save({"linear.weight": torch.zeros(3, 5)}, "map/map.safetensors")
    reseal(lambda content: content.update(weights_sha256=digest.of_file(Path("map/map.safetensors"))))


DAMAGE: dict[str, tuple[Callable[[], object], str]] = {
    "a bit of the weights": (lambda: flip("map.safetensors", -3), "it is not the file that map.json describes"),
    "a bit of the description": (lambda: flip("map.json", 250), "map.json: "),
    "a value of the description": (
        lambda: Path("map/map.json").write_text(Path("map/map.json").read_text().replace("0.5", "0.9")),
        "its values are not those of its digest",
    ),
    "no weights": (lambda: Path("map/map.safetensors").unlink(), "map.safetensors: missing"),
    "a folder for weights": (
        lambda: (Path("map/map.safetensors").unlink(), Path("map/map.safetensors").mkdir()),
        "not a regular file",
    ),
    "another width": (lambda: reseal(lambda c: c["old"].update(width=4)), "its tensors are not those of"),
    "an endless width": (lambda: reseal(lambda c: c["old"].update(width=10**9)), "width must be at most 65536"),
    "a vast width": (lambda: reseal(lambda c: c["old"].update(width=65_536)), "its tensors are not those of"),
    "a vast hidden layer": (lambda: reseal(lambda c: c.update(hidden=65_536)), "its tensors are not those of"),
    "a negative hidden layer": (lambda: reseal(lambda c: c.update(hidden=-1)), "hidden must be at least 0"),
    "no model": (lambda: reseal(lambda c: c.pop("new")), "new is missing"),
    "a model of nothing": (lambda: reseal(lambda c: c["new"].update(model={})), "map.json: new: damaged"),
    "a cosine of 2": (lambda: reseal(lambda c: c["trained_on"].update(after=2.0)), "after must be at most 1.001"),
    "an unknown name": (lambda: reseal(lambda c: c.update(code="import os")), "unknown name 'code'"),
    "people of nothing": (lambda: reseal(lambda c: c["people"]["speakers"].update(count=3)), "people: damaged"),
    "another model": (
        lambda: reseal(lambda c: c["new"]["model"].update(weights_sha256="0" * 64)),
        "its fingerprint is not that of its models and weights",
    ),
    "infinite weights": (lambda: with_weights(lambda t: t["linear.bias"].fill_(torch.inf)), "are not finite"),
    "half weights": (
        lambda: with_weights(lambda t: t.update({name: v.half() for name, v in t.items()})),
        "its tensors are not those of",
    ),
    "a further tensor": (lambda: with_weights(lambda t: t.update(more=torch.zeros(2))), "its tensors are not those of"),
    "another format": (
        lambda: Path("map/map.json").write_text(
            Path("map/map.json").read_text().replace('"spkd_map": 1', '"spkd_map": 9')
        ),
        "not a map of format 1; make one with `spkd map OLD_CACHE NEW_CACHE`",
    ),
    "a pickle": (pickled, "map.safetensors: damaged"),
    "larger than it says": (
        lambda: Path("map/map.safetensors").write_bytes(bytes(1 << 20)),
        "larger than the",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_map_is_a_line(kind: str) -> None:
    made().save(Path("map"))
    load_map("map")
    damage, message = DAMAGE[kind]
    damage()
    with pytest.raises(SpkdError) as found:
        load_map("map")
    assert message in str(found.value)
    assert "\n" not in str(found.value)


def test_a_folder_without_a_map_names_the_way_to_one() -> None:
    with pytest.raises(UsageError, match=r"nosuch: no map .map.json, map.safetensors.; make one with `spkd map "):
        load_map("nosuch")
