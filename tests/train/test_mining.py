"""Mined negatives against brute force, and in training through the real commands."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from spkd import models
from spkd.cache import FBANK, Cache, Crop, Target
from spkd.config import LossConfig, MiningConfig
from spkd.manifest import Manifest, Utterance
from spkd.models import Checkpoint
from spkd.train import mining
from spkd.train.data import Classes, Groups, Listening, mean_embeddings
from spkd.train.losses import Contrastive, Said

SMALL = ["steps=6", "batch_size=6", "student.channels=8", "student.embedding=6", "crop=0.5", "--loss", "contrastive"]


@pytest.fixture
def extract(spkd: Callable, corpus: Path) -> Callable:
    def run(cache: str, *more: str) -> Cache:
        torch.manual_seed(0)
        models.save(
            Path("teacher"), Checkpoint(models.build("xvector", channels=16, embedding=8).eval(), None, [], 1.0)
        )
        done = spkd(
            "extract",
            "teacher=checkpoint",
            "teacher.weights=teacher",
            f"manifest={corpus / 'manifest.csv'}",
            f"cache={cache}",
            "fbank=true",
            "view=crops:3,0.7",
            "view.speeds=[0.9,1.0]",
            *more,
        )
        assert done.code == 0, done.err
        return Cache.open(cache)

    return run


def search(cache: Cache, classes: Classes, config: MiningConfig, ceiling: float) -> mining.Negatives:
    voices = Groups.of(classes.voice, cache.rows)
    vectors = mean_embeddings(cache, voices.group, len(voices.first) - 1).numpy()
    return mining.mine(vectors, voices, cache, classes, config, ceiling)


def brute_force(cache: Cache, classes: Classes, ceiling: float) -> dict[int, dict[int, float]]:
    """Allowed voices of every voice with their cosines, by their number in classes.voice; all are compared with all."""
    said = cache.batch(cache.rows, ["embedding"])["embedding"].double()
    unit = torch.nn.functional.normalize(said, dim=-1).numpy()
    rows = {int(v): np.flatnonzero(classes.voice[cache.rows] == v) for v in np.unique(classes.voice[cache.rows])}
    mean = {v: unit[r].sum(0) / np.linalg.norm(unit[r].sum(0)) for v, r in rows.items()}
    about = {v: cache.rows[r[0]] for v, r in rows.items()}
    result: dict[int, dict[int, float]] = {}
    for v in rows:
        result[v] = {}
        for w in rows:
            same = cache.plan.views.utterance[about[v]] == cache.plan.views.utterance[about[w]]
            labels = classes.label[about[v]], classes.label[about[w]]
            if not same and (labels[0] < 0 or labels[0] != labels[1]) and mean[v] @ mean[w] <= ceiling:
                result[v][w] = float(mean[v] @ mean[w])
    return result


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize(("ceiling", "k"), [(2.0, 5), (0.9999, 5), (2.0, 30)])
def test_the_nearest_that_are_allowed(extract: Callable, corpus: Path, labelled: bool, ceiling: float, k: int) -> None:
    if not labelled:
        rows = tuple(Utterance(u.id, u.path, None, u.duration) for u in Manifest.load(corpus / "manifest.csv"))
        Manifest(rows).save("unlabelled.csv")
    cache = extract("c", *([] if labelled else ["manifest=unlabelled.csv"]), "storage.codec=float32")
    classes = Classes.of(cache)
    found = search(cache, classes, MiningConfig(neighbours=k), ceiling)
    names = np.unique(classes.voice[cache.rows])
    expected = brute_force(cache, classes, ceiling)
    for row in cache.rows:
        listed = [int(names[v]) for v in found.neighbours[found.voices.group[row]] if v >= 0]
        allowed = expected[int(classes.voice[row])]
        nearest = sorted(allowed.values(), reverse=True)[:k]
        assert len(set(listed)) == len(listed)
        assert np.allclose([allowed[v] for v in listed], nearest, atol=1e-6)  # up to ties in single precision
    random = np.random.RandomState(0)
    drawn = found.draw(cache.rows, 4, random)
    assert drawn.shape == (len(cache.rows), 4)
    for row, others in zip(cache.rows, drawn, strict=True):
        allowed = expected[int(classes.voice[row])]
        assert all(int(classes.voice[o]) in allowed for o in others) or not allowed
        assert all(int(classes.voice[o]) != int(classes.voice[row]) for o in others)


def test_a_large_cache_is_searched_approximately(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mining, "EXACT", 1000)
    random = np.random.RandomState(0)
    centres = random.randn(60, 32)
    vectors = (centres[random.randint(60, size=6000)] + 0.3 * random.randn(6000, 32)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index = mining.build(vectors, 16)
    assert "IVF" in type(index).__name__
    assert mining.recall(index, vectors, 20) > 0.9
    assert mining.recall(mining.build(vectors[:900], 16), vectors[:900], 20) > 0.999


def test_hard_negatives_stand_in_the_denominator() -> None:
    generator = torch.Generator().manual_seed(0)
    s, t, hard = (torch.randn(*shape, 6, generator=generator, dtype=torch.float64) for shape in ((5,), (5,), (5, 3)))
    loss = Contrastive(
        LossConfig(temperature=0.2, ceiling=2.0),
        {"embedding": Target("embedding", 6)},
        {"embedding": Target("embedding", 6)},
        1,
    )
    said = Said({"embedding": t.float()}, torch.zeros(5), torch.arange(5), negatives=hard.float())
    unit = [x / x.norm(dim=-1, keepdim=True) for x in (s, t, hard)]
    total = 0.0
    for i in range(5):
        pairs = [float(unit[0][i] @ unit[1][j]) for j in range(5)] + [float(unit[0][i] @ n) for n in unit[2][i]]
        total -= pairs[i] / 0.2 - math.log(sum(math.exp(p / 0.2) for p in pairs))
    assert loss({"embedding": s.float()}, said).item() == pytest.approx(total / 5, rel=1e-5)


def test_training_with_mined_negatives(spkd: Callable, extract: Callable) -> None:
    extract("c", "storage.codec=int8")
    assert spkd("train", "cache=c", "out=plain", *SMALL).code == 0
    for out in ("a", "b"):
        done = spkd("train", "cache=c", f"out={out}", "mining.negatives=4", *SMALL)
        assert done.code == 0, done.err
    a, b, plain = (Path(out, "model.safetensors").read_bytes() for out in ("a", "b", "plain"))
    assert a == b != plain


def test_what_cannot_be_mined(spkd: Callable, extract: Callable, corpus: Path) -> None:
    extract("c")
    train = ["train", "cache=c", "mining.negatives=4", "out=s", *SMALL[:-2]]
    assert "only contrastive takes hard negatives" in spkd(*train, "--loss", "cosine").err
    Manifest(Manifest.load(corpus / "manifest.csv").utterances[:1]).save("one.csv")
    extract("one", "manifest=one.csv")
    train[1] = "cache=one"
    assert "need at least two utterances" in spkd(*train, "--loss", "contrastive").err
    spkd("cache", "export", "c", "tars")
    train[1] = "cache=tars"
    assert "a stream cannot be searched" in spkd(*train, "--loss", "contrastive").err


def test_mining_over_the_student_is_refreshed_at_fixed_steps(extract: Callable, spkd: Callable) -> None:
    cache = extract("c")
    classes = Classes.of(cache)
    listening = Listening(FBANK, None, (0.5,))
    config = MiningConfig(negatives=2, neighbours=3, over="student", refresh=4)
    miner = mining.Miner(cache, classes, listening, config, 2.0)
    torch.manual_seed(3)
    network = models.build("xvector", channels=8, embedding=6).train()
    first = miner.table.neighbours.copy()
    for step in range(7):
        miner.after(step, network)
        assert np.array_equal(miner.table.neighbours, first)
    miner.after(7, network)  # what was begun behind the fourth step takes over
    voices = Groups.of(classes.voice, cache.rows)
    lead = voices.views[voices.first[:-1]]
    room = (cache.plan.views.samples[lead] - 8000) // 2 // 160 * 160
    heard = cache.batch(lead, ["fbank"], Crop(np.maximum(room, 0), 8000))["fbank"].float()
    with torch.inference_mode():
        said = torch.nn.functional.normalize(network.eval()(heard)["embedding"], dim=-1).double().numpy()
    utterance, label = cache.plan.views.utterance[lead], classes.label[lead]
    for v, found in enumerate(miner.table.neighbours):
        allowed = np.flatnonzero((utterance != utterance[v]) & (label != label[v]))
        nearest = np.sort(said[allowed] @ said[v])[::-1][:3]
        assert np.allclose(said[found] @ said[v], nearest, atol=1e-5)
    again = mining.Miner(cache, classes, listening, config, 2.0)
    again.load_state(miner.state())
    assert np.array_equal(again.table.neighbours, miner.table.neighbours)
    for m in (miner, again):
        m.after(11, network)
        m.close()
    assert np.array_equal(again.table.neighbours, miner.table.neighbours)
    chosen = ["mining.negatives=2", "mining.over=student", "mining.refresh=2", "cache=c", *SMALL]
    assert spkd("train", *chosen, "out=a").code == 0
    assert spkd("train", *chosen, "out=b", "save_every=3").code == 0
    a, b = (load_file(f"{name}/model.safetensors") for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)
