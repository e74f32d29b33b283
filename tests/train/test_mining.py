"""Mined negatives against brute force, and in training through the real commands."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from spkd.cache import Cache, Crop, Plan, claim_units, finalize
from spkd.cache.folder import load_card
from spkd.corpus.manifest import Manifest, Utterance
from spkd.corpus.view import Views
from spkd.outputs.features import FBANK
from spkd.outputs.target import Target
from spkd.seeding import Purpose, random_state
from spkd.students import build
from spkd.train import mining
from spkd.train.batches import BatchContent, CropPlan, InputSource, StepBatches, ViewOrder
from spkd.train.labels import Groups, Labels, mean_embeddings
from spkd.train.losses.base import LossContext, LossInputs
from spkd.train.losses.contrastive import Contrastive, ContrastiveSettings
from spkd.train.samplers import shuffled_views
from spkd.train.settings import MiningConfig
from tests.conftest import CommandLine, save_teacher

from ..cache.test_layout import start, writer_of

SMALL = ["steps=6", "batch_size=6", "student.channels=8", "student.embedding=6", "crop=0.5", "--loss", "contrastive"]


@pytest.fixture
def extract(spkd: CommandLine, extraction: list[str]) -> Callable:
    def run(cache: str, *more: str) -> Cache:
        save_teacher(Path("teacher"))
        given = [*extraction, f"cache={cache}", "fbank=true", "view=crops:3,0.7", "view.speeds=[0.9,1.0]", *more]
        spkd.once(cache, *given)
        return Cache.open(cache)

    return run


def search(cache: Cache, labels: Labels, config: MiningConfig, ceiling: float) -> mining.Neighbours:
    instances = Groups.of(labels.instance, cache.usable_views)
    vectors = mean_embeddings(cache, instances.group, len(instances)).numpy()
    return mining.mine(vectors, vectors, instances, cache, labels, config, ceiling)


def brute_force(cache: Cache, labels: Labels, ceiling: float) -> dict[int, dict[int, float]]:
    """Allowed neighbours of every instance with their cosines, by their number in labels.instance: all pairs."""
    outputs = cache.batch(cache.usable_views, ["embedding"])["embedding"].double()
    unit = torch.nn.functional.normalize(outputs, dim=-1).numpy()
    rows = {
        int(v): np.flatnonzero(labels.instance[cache.usable_views] == v)
        for v in np.unique(labels.instance[cache.usable_views])
    }
    mean = {v: unit[r].sum(0) / np.linalg.norm(unit[r].sum(0)) for v, r in rows.items()}
    about = {v: cache.usable_views[r[0]] for v, r in rows.items()}
    result: dict[int, dict[int, float]] = {}
    for v in rows:
        result[v] = {}
        for w in rows:
            same = cache.plan.views.utterance[about[v]] == cache.plan.views.utterance[about[w]]
            mine, theirs = labels.label[about[v]], labels.label[about[w]]
            if not same and (mine < 0 or mine != theirs) and mean[v] @ mean[w] <= ceiling:
                result[v][w] = float(mean[v] @ mean[w])
    return result


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize(("ceiling", "k"), [(2.0, 5), (0.9999, 5), (2.0, 30)])
def test_the_nearest_that_are_allowed(extract: Callable, corpus: Path, labelled: bool, ceiling: float, k: int) -> None:
    if not labelled:
        rows = tuple(Utterance(u.id, u.path, None, u.duration) for u in Manifest.load(corpus / "manifest.csv"))
        Manifest(rows).save("unlabelled.csv")
    cache = extract("c", *([] if labelled else ["manifest=unlabelled.csv"]), "storage.codec=float32")
    labels = Labels.of(cache)
    found = search(cache, labels, MiningConfig(neighbours=k), ceiling)
    names = np.unique(labels.instance[cache.usable_views])
    expected = brute_force(cache, labels, ceiling)
    for row in cache.usable_views:
        listed = [int(names[v]) for v in found.neighbours[found.instances.group[row]] if v >= 0]
        allowed = expected[int(labels.instance[row])]
        nearest = sorted(allowed.values(), reverse=True)[:k]
        assert len(set(listed)) == len(listed)
        assert np.allclose([allowed[v] for v in listed], nearest, atol=1e-6)  # up to ties in single precision
    random = np.random.RandomState(0)
    drawn = found.draw(cache.usable_views, 4, random)
    assert drawn.views.shape == drawn.found.shape == (len(cache.usable_views), 4)
    for row, others, usable in zip(cache.usable_views, *drawn, strict=True):
        allowed = expected[int(labels.instance[row])]
        assert usable.all() == usable.any() == bool(allowed)
        assert all(int(labels.instance[o]) in allowed for o in others[usable])


def clustered(monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """(6000, 32) unit vectors around 60 centres, more than are searched exactly."""
    monkeypatch.setattr(mining, "EXACT", 1000)
    random = np.random.RandomState(0)
    centres = random.randn(60, 32)
    vectors = (centres[random.randint(60, size=6000)] + 0.3 * random.randn(6000, 32)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def nearest(vectors: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-(vectors @ vectors.T), axis=1, kind="stable")[:, :k]


@pytest.mark.slow
def test_a_large_cache_is_searched_approximately(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = clustered(monkeypatch)
    index = mining.build(vectors, 16)
    assert "IVF" in type(index).__name__
    sample = np.arange(0, 6000, 6)
    found = index.search(vectors[sample], 20)[1]
    true = nearest(vectors, 20)
    expected = np.mean([len(set(found[i]) & set(true[v])) / 20 for i, v in enumerate(sample)])
    assert expected > 0.9
    assert mining.recall(vectors, sample, found) == pytest.approx(expected, abs=1e-3)


@pytest.mark.slow
def test_the_recall_that_is_logged_is_that_of_the_searches(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not that of the wider searches of some instances that follow: brute force over what each search gave last."""
    vectors = clustered(monkeypatch)
    search = mining._Search(vectors, 1, 20)
    last = search(np.arange(6000), 40)[0][:, :20]
    search.widen()
    repeated = np.arange(0, 6000, 100)
    last[repeated] = search(repeated, 160)[0][:, :20]
    search.log_recall()
    logged = float(capsys.readouterr().out.split()[-1])
    true = nearest(vectors, 20)
    each = np.array([len(set(a) & set(b)) / 20 for a, b in zip(last, true, strict=True)])
    assert logged == pytest.approx(each.mean(), abs=0.02)  # the log measures 1,000 of the 6,000
    search.widen()
    wider = search(np.arange(600), 20)[0]
    assert logged < np.mean([len(set(a) & set(b)) / 20 for a, b in zip(wider, true[:600], strict=True)]) - 0.05


def test_hard_negatives_are_in_the_denominator() -> None:
    generator = torch.Generator().manual_seed(0)
    s, t, hard = (torch.randn(*shape, 6, generator=generator, dtype=torch.float64) for shape in ((5,), (5,), (5, 3)))
    one = {"embedding": Target("embedding", 6)}
    loss = Contrastive(ContrastiveSettings(temperature=0.2, ceiling=2.0), LossContext(one, one, 1))
    inputs = LossInputs({"embedding": t.float()}, torch.zeros(5), torch.arange(5), negatives=hard.float())
    unit = [x / x.norm(dim=-1, keepdim=True) for x in (s, t, hard)]
    total = 0.0
    for i in range(5):
        pairs = [float(unit[0][i] @ unit[1][j]) for j in range(5)] + [float(unit[0][i] @ n) for n in unit[2][i]]
        total -= pairs[i] / 0.2 - math.log(sum(math.exp(p / 0.2) for p in pairs))
    assert loss({"embedding": s.float()}, inputs).item() == pytest.approx(total / 5, rel=1e-5)


def test_training_with_mined_negatives(spkd: Callable, extract: Callable) -> None:
    extract("c", "storage.codec=int8")
    spkd("train", "cache=c", "out=plain", *SMALL).ok()
    for out in ("a", "b"):
        spkd("train", "cache=c", f"out={out}", "mining.negatives=4", *SMALL).ok()
    a, b, plain = (Path(out, "model.safetensors").read_bytes() for out in ("a", "b", "plain"))
    assert a == b != plain


def test_what_cannot_be_mined(spkd: Callable, extract: Callable, corpus: Path) -> None:
    extract("c")
    train = ["train", "cache=c", "mining.negatives=4", "out=s", *SMALL[:-2]]
    assert "only contrastive takes hard negatives" in spkd(*train, "--loss", "cosine").err
    Manifest(Manifest.load(corpus / "manifest.csv").utterances[:1]).save("one.csv")
    extract("one", "manifest=one.csv")
    train[1] = "cache=one"
    train = [key.replace("batch_size=6", "batch_size=3") for key in train]
    assert "need at least two utterances" in spkd(*train, "--loss", "contrastive").err
    spkd("cache", "export", "c", "tars")
    train[1] = "cache=tars"
    assert "a stream cannot be searched" in spkd(*train, "--loss", "contrastive").err


def test_groups_are_of_the_teachers_neighbours(spkd: Callable, extract: Callable, corpus: Path) -> None:
    """The order of an epoch is known before the student is."""
    extract("c")
    train = ["train", "out=s", "batch_size=6", "sampler=hard", "sampler.hard.group=2", "mining.embeddings=student"]
    done = spkd(*train, "--loss", "contrastive", "cache=c")
    reason = "mining.embeddings=student has no effect: sampler=hard takes the teacher's neighbours throughout"
    assert (done.code, reason in done.err) == (2, True), done.err
    spkd("extract", "teacher=none", f"manifest={corpus / 'manifest.csv'}", "cache=none").ok()
    done = spkd(*train[:-1], "--loss", "ntxent", "cache=none")
    assert (done.code, "mining: needs one teacher's embeddings" in done.err) == (2, True), done.err


def test_mining_over_the_student_is_refreshed_at_fixed_steps(extract: Callable, spkd: Callable) -> None:
    cache = extract("c")
    labels = Labels.of(cache)
    content = BatchContent(cache, labels, InputSource(FBANK))
    config = MiningConfig(negatives=2, neighbours=3, embeddings="student", refresh=4)
    miner = mining.Miner(content, config, 2.0, 0.5)
    torch.manual_seed(3)
    network = build("xvector", channels=8, embedding=6).train()
    first = miner.tables["negatives"].neighbours.copy()
    for step in range(7):
        miner.after_step(step, network)
        assert np.array_equal(miner.tables["negatives"].neighbours, first)
    miner.after_step(7, network)  # what was begun after the fourth step takes over
    instances = Groups.of(labels.instance, cache.usable_views)
    lead = instances.first_views
    room = (cache.plan.views.samples[lead] - 8000) // 2 // 160 * 160
    features = cache.batch(lead, ["fbank"], Crop(np.maximum(room, 0), 8000))["fbank"].float()
    with torch.inference_mode():
        outputs = torch.nn.functional.normalize(network.eval()(features)["embedding"], dim=-1).double().numpy()
    utterance, label = cache.plan.views.utterance[lead], labels.label[lead]
    for v, found in enumerate(miner.tables["negatives"].neighbours):
        allowed = np.flatnonzero((utterance != utterance[v]) & (label != label[v]))
        nearest = np.sort(outputs[allowed] @ outputs[v])[::-1][:3]
        assert np.allclose(outputs[found] @ outputs[v], nearest, atol=1e-5)
    again = mining.Miner(content, config, 2.0, 0.5)
    again.load_state(miner.state())
    assert np.array_equal(again.tables["negatives"].neighbours, miner.tables["negatives"].neighbours)
    for m in (miner, again):
        m.after_step(11, network)
        m.close()
    assert np.array_equal(again.tables["negatives"].neighbours, miner.tables["negatives"].neighbours)
    chosen = ["mining.negatives=2", "mining.embeddings=student", "mining.refresh=2", "cache=c", *SMALL]
    spkd("train", *chosen, "out=a").ok()
    spkd("train", *chosen, "out=b", "save_every=3").ok()
    a, b = (load_file(f"{name}/model.safetensors") for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def many_of_a_speaker(tmp_path: Path, speakers: int, each: int) -> tuple[Cache, np.ndarray, np.ndarray]:
    """A cache of embeddings alone, its vectors and the speaker of each."""
    random = np.random.RandomState(0)
    speaker = random.permutation(np.repeat(np.arange(speakers), each))
    vectors = (random.randn(speakers, 24)[speaker] + 0.5 * random.randn(len(speaker), 24)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    target, count = Target("embedding", 24, codec="float32"), len(speaker)
    manifest = Manifest(tuple(Utterance(f"u{i}", f"{i}.wav", f"s{s}", 0.25) for i, s in enumerate(speaker)))
    columns = (np.arange(count, dtype=np.int32), np.zeros(count, np.int64), np.full(count, 4000, np.int32))
    ones = np.ones(count, np.float32)
    views = Views(*columns, ones, np.zeros(count, np.uint32), ones)
    plan = Plan.make(manifest, views, 1024, 1280.0)
    start(tmp_path / "c", [target], manifest, plan)
    for unit in claim_units(tmp_path / "c", plan.units):
        writer = writer_of(tmp_path / "c", plan, unit)
        writer.put("embedding", list(plan.unit(unit)), vectors[list(plan.unit(unit))])
        writer.commit()
    assert finalize(tmp_path / "c", load_card(tmp_path / "c"), plan)
    return Cache.open(tmp_path / "c"), vectors, speaker


@pytest.mark.parametrize("each", [20, 182, 220])
@pytest.mark.parametrize("ceiling", [2.0, 0.3])
def test_speakers_of_many_utterances_have_hard_negatives_in_large_caches_too(
    tmp_path: Path, each: int, ceiling: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More utterances of a speaker than twice the neighbours, searched approximately: against all pairs."""
    monkeypatch.setattr(mining, "EXACT", 1000)
    cache, vectors, speaker = many_of_a_speaker(tmp_path, 2640 // each, each)
    config = MiningConfig(negatives=8, neighbours=32, nprobe=16)
    found = search(cache, Labels.of(cache), config, ceiling)
    assert "IVF" in type(mining.build(vectors, 16)).__name__
    pairs = vectors @ vectors.T
    pairs[speaker[:, None] == speaker] = -2
    pairs[pairs > ceiling] = -2
    hardest = np.sort(pairs, 1)[:, -32:].mean()
    drawn = found.draw(np.arange(len(speaker)), 8, np.random.RandomState(0))
    assert drawn.found.all()
    assert (speaker[drawn.views] != speaker[:, None]).all()
    cosines = np.einsum("bd,bnd->bn", vectors, vectors[drawn.views])
    assert cosines.max() <= ceiling + 1e-5
    assert cosines.mean() > 0.95 * hardest


def test_a_search_on_gpus_visits_as_many_lists_as_they_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On GPUs, FAISS refuses more than 2,048: `nprobe <= getMaxKSelection()` of GpuIndexIVF::search."""
    visited: list[int] = []
    monkeypatch.setattr(mining, "EXACT", 1000)
    monkeypatch.setattr(mining, "GPU_WIDEST", 64)
    monkeypatch.setattr(mining, "gpus", lambda: 1)
    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", lambda index: index, raising=False)
    monkeypatch.setattr(mining, "set_nprobe", lambda _, lists: visited.append(lists))
    cache, vectors, _ = many_of_a_speaker(tmp_path, 12, 220)
    assert mining.lists_of(len(vectors)) == 128
    assert mining.build(vectors, 100).nprobe == 64
    search(cache, Labels.of(cache), MiningConfig(negatives=8, neighbours=32, nprobe=16), 2.0)
    assert visited
    assert max(visited) == 64
    assert "not mining.nprobe" not in capsys.readouterr().out
    search(cache, Labels.of(cache), MiningConfig(negatives=8, neighbours=32, nprobe=100), 2.0)
    assert "FAISS visits at most 64 lists on a GPU, and not mining.nprobe=100" in capsys.readouterr().out


def test_the_ceiling_is_the_teachers_where_the_students_embeddings_are_searched(tmp_path: Path) -> None:
    cache, vectors, _ = many_of_a_speaker(tmp_path, 12, 10)
    instances = Groups.of(Labels.of(cache).instance, cache.usable_views)
    student = np.random.RandomState(1).randn(len(vectors), 6).astype(np.float32)
    student /= np.linalg.norm(student, axis=1, keepdims=True)
    found = mining.mine(student, vectors, instances, cache, Labels.of(cache), MiningConfig(neighbours=8), 0.2)
    kept = found.neighbours >= 0
    teacher = np.einsum("bd,bnd->bn", vectors, vectors[np.maximum(found.neighbours, 0)])
    assert kept.any()
    assert teacher[kept].max() <= 0.2


def test_an_instance_without_allowed_neighbours_has_no_negatives_and_no_part_in_the_loss(tmp_path: Path) -> None:
    cache, _, _ = many_of_a_speaker(tmp_path, 12, 10)
    found = search(cache, Labels.of(cache), MiningConfig(neighbours=8), -0.99)
    drawn = found.draw(np.arange(20), 4, np.random.RandomState(0))
    assert (found.neighbours == mining.NONE).all()
    assert not drawn.found.any()


@pytest.mark.parametrize("floor", [-1.0, 0.5])
def test_positives_are_the_nearest_of_other_utterances(extract: Callable, floor: float) -> None:
    cache = extract("c", "storage.codec=float32")
    labels = Labels.of(cache)
    instances = Groups.of(labels.instance, cache.usable_views)
    vectors = mean_embeddings(cache, instances.group, len(instances)).numpy()
    found = mining.find_positives(vectors, instances, cache, MiningConfig(positives=3, floor=floor))
    utterance = cache.plan.views.utterance[instances.first_views]
    cosine = vectors.astype(np.float64) @ vectors.T
    for v, listed in enumerate(found.neighbours):
        kept = listed[listed != mining.NONE]
        allowed = np.flatnonzero((utterance != utterance[v]) & (cosine[v] >= floor + 1e-6))
        nearest = np.sort(cosine[v, allowed])[::-1][:3]
        assert (utterance[kept] != utterance[v]).all()
        assert np.allclose(cosine[v, kept], nearest, atol=1e-6)
    views = cache.usable_views
    drawn = found.draw(views, 1, np.random.RandomState(0))
    same = labels.instance[drawn.views[:, 0]] == labels.instance[views]
    assert same.tolist() == (~drawn.found[:, 0]).tolist()


def test_further_crops_are_cut_from_positives(extract: Callable, spkd: Callable) -> None:
    cache = extract("c")
    labels = Labels.of(cache)
    content = BatchContent(cache, labels, InputSource(FBANK))
    miner = mining.Miner(content, MiningConfig(positives=2, floor=-1.0), 2.0, 0.5, (mining.POSITIVES,))
    order = ViewOrder(shuffled_views(cache, 0), 6)
    batches = StepBatches(content, order, CropPlan((0.5, 0.5), positives=miner.positives), 0)
    plain = StepBatches(content, order, CropPlan((0.5, 0.5)), 0)
    utterance = cache.plan.views.utterance
    for step in range(4):
        views = order.views(step)
        others = miner.positives(views, random_state(Purpose.CROP_VIEW, 0, step, 1))
        assert (utterance[others] != utterance[views]).all()
        found, same = batches[step].crops, plain[step].crops
        assert torch.equal(found[0]["fbank"], same[0]["fbank"])
        assert batches[step].other_instance[0].tolist() == labels.instance[others].tolist()
        assert torch.equal(found[1]["fbank"], cache.stored(others, ["fbank"], batches.crop(step, others, 1))["fbank"])
    # A loader's process that is not forked gets the batches by pickle.
    there = pickle.loads(pickle.dumps(batches))
    assert torch.equal(there[2].crops[1]["fbank"], batches[2].crops[1]["fbank"])
    miner.close()


def test_positives_in_training(extract: Callable, spkd: Callable, corpus: Path) -> None:
    """By the teacher, by the student beside a teacher, and by the student alone."""
    extract("c")
    done = spkd("train", "cache=c", "mining.positives=2", "out=z", *SMALL)
    assert "only ntxent and memo take further crops" in done.err
    small = ["steps=7", *SMALL[1:5], "--loss", "ntxent", "mining.floor=-1"]
    for name, more in {"a": [], "b": ["mining.embeddings=student", "mining.refresh=2"]}.items():
        done = spkd("train", "cache=c", "mining.positives=2", f"out={name}", *small, *more).ok()
        assert "positives in other utterances" in done.out
    manifest = f"manifest={corpus / 'manifest.csv'}"
    spkd("extract", "teacher=none", manifest, "cache=none", "fbank=true")
    assert "needs one teacher's embeddings" in spkd("train", "cache=none", "mining.positives=2", "out=n", *small).err
    alone = ["train", "cache=none", "mining.positives=2", "mining.embeddings=student", "mining.refresh=2", *small]
    for name, more in {"c1": [], "c2": ["save_every=3"]}.items():
        done = spkd(*alone, f"out={name}", *more).ok()
        assert "100% of the instances have positives" in done.out
    a, b, c, again = (load_file(f"{name}/model.safetensors") for name in ("a", "b", "c1", "c2"))
    assert not all(torch.equal(a[name], b[name]) for name in a)
    assert all(torch.equal(c[name], again[name]) for name in c)
