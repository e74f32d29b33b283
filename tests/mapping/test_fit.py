"""Maps between spaces that are known, by the real command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from scipy.linalg import orthogonal_procrustes

import spkd as interface
from spkd.corpus.manifest import Manifest
from spkd.corpus.people import People
from spkd.files.vectors import read_vectors
from spkd.mapping.fit import fit, linear, speakers_aside
from spkd.mapping.pairs import Pairs
from spkd.mapping.settings import MapConfig
from tests.eval.students import save_untrained
from tests.mapping.spaces import DIM, extract, make_spaces
from tests.mapping.test_embedding_map import made


def units(vectors: np.ndarray) -> np.ndarray:
    values = vectors.astype(np.float64)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


@pytest.mark.parametrize("ridge", [0.01, 3.0])
def test_the_linear_part_has_the_least_squares(ridge: float) -> None:
    random = np.random.RandomState(0)
    x, y = random.standard_normal((40, 5)), random.standard_normal((40, 3))
    # Ridge regression is least squares with a row of sqrt(ridge) for each weight, whose value is to be 0.
    a = np.concatenate([np.c_[units(x), np.ones(40)], np.sqrt(ridge) * np.eye(6)])
    expected = np.linalg.lstsq(a, np.concatenate([units(y), np.zeros((6, 3))]), rcond=None)[0]
    found = linear(torch.from_numpy(x).float(), torch.from_numpy(y).float(), ridge)
    assert np.abs(found.numpy() - expected).max() < 1e-6


def pairs_of(x: np.ndarray, y: np.ndarray, speakers: int) -> Pairs:
    who = np.arange(len(x)) % speakers
    return Pairs(x.astype(np.float32), y.astype(np.float32), who, True, People(), (len(x), len(x), len(x)))


@pytest.mark.parametrize("hidden", [0, 32])
def test_a_hidden_layer_learns_what_no_line_can(hidden: int) -> None:
    random = np.random.RandomState(0)
    x = units(random.standard_normal((600, 4)))
    y = np.c_[x[:, 0] ** 2 - x[:, 1] ** 2, x[:, 0] * x[:, 1], x[:, 2]]
    pairs, config = pairs_of(x, y, 20), MapConfig(hidden=hidden, steps=400)
    aside = speakers_aside(pairs, 0.2, 0)
    assert (aside.sum(), len(np.unique(pairs.speaker[aside]))) == (120, 4)
    old, new = (made(4, 3).old, made(4, 3).new)
    the_map = fit(old, new, pairs, aside, config, ["a", "b"])
    cosine = (units(the_map.map(x[aside])) * units(y[aside])).sum(1).mean()
    assert the_map.trained_on.after == pytest.approx(cosine, abs=1e-5)
    assert the_map.trained_on.before is None
    assert (cosine > 0.95, cosine < 0.8) == ((True, False) if hidden else (False, True)), cosine
    # The same settings give the same map; another seed another one.
    assert fit(old, new, pairs, aside, config, ["a", "b"]).fingerprint == the_map.fingerprint
    if hidden:
        other = fit(old, new, pairs, aside, MapConfig(hidden=hidden, steps=400, seed=1), ["a", "b"])
        assert other.fingerprint != the_map.fingerprint


def test_training_ends_where_speakers_kept_aside_gain_no_more() -> None:
    random = np.random.RandomState(0)
    x = random.standard_normal((200, 5))
    noise = random.standard_normal((200, 3))  # nothing to learn
    pairs = pairs_of(x, noise, 20)
    aside = speakers_aside(pairs, 0.1, 0)
    the_map = fit(made().old, made().new, pairs, aside, MapConfig(hidden=64, steps=100_000), ["a", "b"])
    assert the_map.trained_on.steps < 5000


def test_a_rotation_is_found_and_scores_are_restored(spkd: Callable, corpus: Path) -> None:
    turn = make_spaces(spkd, corpus)
    for name in ("old", "new"):
        spkd("embed", corpus / "manifest.csv", f"model={name}", f"out={name}.npy").ok()
    old, new = (dict(read_vectors(Path(f"{name}.npy"))) for name in ("old", "new"))
    x, y = (np.stack([side[name] for name in sorted(old)]) for side in (old, new))
    assert np.abs(units(x) @ orthogonal_procrustes(units(x), units(y))[0] - units(x @ turn)).max() < 1e-3
    the_map = interface.load_map("map")
    assert (the_map.map(x) * units(x @ turn)).sum(1).min() > 0.999
    assert (the_map.trained_on.views, the_map.trained_on.speakers, the_map.trained_on.kept_aside) == (18, 6, 1)
    # Scores by the map are those by the new model alone; without it they are not.
    given = (corpus / "trials.txt", f"manifest={corpus / 'manifest.csv'}", "model=new", "bootstrap=0")
    for out, more in (("anew", []), ("bare", ["enrol.model=old"]), ("mapped", ["enrol.model=old", "enrol.map_by=map"])):
        spkd("eval", *given, f"out={out}", *more).ok()
    scores = {
        out: np.array([float(line.split()[2]) for line in Path(out, "scores.txt").read_text().splitlines()])
        for out in ("anew", "bare", "mapped")
    }
    assert np.abs(scores["mapped"] - scores["anew"]).max() < 0.02
    assert np.abs(scores["bare"] - scores["anew"]).max() > 0.2


def test_the_command_says_what_it_did(spkd: Callable, corpus: Path) -> None:
    make_spaces(spkd, corpus)
    shown = spkd("map", "other-cache", "new-cache", "out=m", "steps=60", "hidden=8", "views=15").ok().out.splitlines()
    assert shown[0] == "18 views in both caches, 15 of them drawn (views=15)"
    assert (
        shown[1] == "left out, as they are not in both or the same as another view: 0 of other-cache and 0 of new-cache"
    )
    record = json.loads(Path("m/map.json").read_text())
    trained = record["trained_on"]
    assert trained["before"] is None
    assert shown[2].startswith("cosine of the old with the new embedding of a view, 1 speaker kept aside of 6: ")
    assert f"{DIM + 2} and {DIM} numbers before, {trained['after']:.3f} mapped (step {trained['steps']})" in shown[2]
    assert shown[3].startswith("m/: map.json, map.safetensors; maps from checkpoint other (")
    # The caches' fingerprints are recorded; the same command gives the same map.
    fingerprints = [interface_cache(name) for name in ("other-cache", "new-cache")]
    assert [trained["old"], trained["new"]] == fingerprints
    before = {path.name: path.read_bytes() for path in Path("m").iterdir()}
    spkd("map", "other-cache", "new-cache", "out=m", "steps=60", "hidden=8", "views=15").ok()
    assert {path.name: path.read_bytes() for path in Path("m").iterdir()} == before


def test_other_recordings_of_equal_names_are_noticed(spkd: Callable, corpus: Path) -> None:
    """The views are crops of one length, so that nothing but the sound differs."""
    make_spaces(spkd, corpus)
    random, changed = np.random.RandomState(0), []
    Path("sounds").mkdir()
    for number, one in enumerate(Manifest.load(corpus / "manifest.csv")):
        length = round((one.duration or 0) * 16_000)
        soundfile.write(f"sounds/{number}.wav", 0.1 * random.randn(length), 16_000)
        changed.append(replace(one, path=f"sounds/{number}.wav", start=0.0))
    Manifest(tuple(changed[1:])).save(Path("other.csv"))
    for student, manifest, cache in (("old", "", "a"), ("new", "", "b"), ("new", "manifest=other.csv", "c")):
        extract(spkd, corpus, student, cache, "view=crops:4,0.5", *filter(None, [manifest]))
    sound = spkd("map", "a", "b", "out=sound", "steps=60").ok().out
    assert ("note: " in sound, "warning: " in sound) == (False, False)
    wrong = spkd("map", "a", "c", "out=wrong", "steps=60").ok().out
    assert "note: a and c were extracted from manifests that differ" in wrong
    assert "warning: the map does not tell speakers apart" in wrong


def interface_cache(name: str) -> str:
    return str(json.loads(Path(name, "COMPLETE.json").read_text())["fingerprint"])


def test_what_cannot_be_mapped_between_is_a_line(spkd: Callable, corpus: Path) -> None:
    make_spaces(spkd, corpus)
    extract(spkd, corpus, "old", "again-cache", "view.speeds=[0.9]")
    one = [line for line in Path(corpus, "manifest.csv").read_text().splitlines() if "spk0" in line or "path" in line]
    Path("one.csv").write_text("\n".join(one).replace(",audio/", f",{corpus}/audio/"))
    for name in ("old", "new"):
        given = (f"teacher.weights={name}", "manifest=one.csv", f"cache={name}-one")
        spkd("extract", "teacher=checkpoint", *given).ok()
    Path("mine").mkdir()
    Path("mine/map.json").write_text("{}")
    for words, message in (
        (
            ("old-cache", "again-cache"),
            "both of checkpoint old (",
        ),
        (("old-cache", "nosuch"), "nosuch: no teacher cache"),
        (("old-one", "new-one"), "the views in both caches are of one speaker"),
        (("again-cache", "new-cache"), "no view is in both"),
        (("old-cache", "new-cache", "out=old"), "old: holds a student (model.json); choose another folder for a map"),
        (("old-cache", "new-cache", "out=mine"), "mine/map.json: would be replaced"),
        (("new-cache", "old-cache"), "map: holds a map from checkpoint old ("),
        (("old-cache", "new-cache", "hidden=-1"), "hidden must be at least 0"),
        (("old-cache",), "Missing argument"),
    ):
        done = spkd("map", *words)
        assert (done.code, message in done.err, done.err.count("\n")) == (2, True, 1), done.err
    assert Path("mine/map.json").read_text() == "{}"


def test_without_labels_utterances_are_kept_aside(spkd: Callable, corpus: Path) -> None:
    lines = Path(corpus, "manifest.csv").read_text().replace(",audio/", f",{corpus}/audio/").splitlines()
    place = lines[0].split(",").index("speaker")
    rows = [",".join(f for i, f in enumerate(line.split(",")) if i != place) for line in lines]
    Path("unlabelled.csv").write_text("\n".join(rows))
    for name, seed in (("old", 0), ("new", 1)):
        save_untrained(Path(name), corpus, seed=seed, embedding=DIM)
        given = (f"teacher.weights={name}", "manifest=unlabelled.csv", f"cache={name}-cache")
        spkd("extract", "teacher=checkpoint", *given, "view.speeds=[1.0,0.9]").ok()
    out = spkd("map", "old-cache", "new-cache", "steps=1", "held_out=0.2").ok().out
    assert "36 views in both caches" in out
    assert "4 speakers kept aside of 18 (an utterance without a label counts as one): " in out, out
    people = interface.load_map("map").people
    assert (people.speakers.count, people.utterances.count) == (0, 18)
