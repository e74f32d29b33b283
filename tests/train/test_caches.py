"""Growth, merging, and several caches in one training, through the real commands."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from safetensors.torch import load_file
from torch.nn.functional import normalize

from spkd.cache import Cache, CacheSource, Crop
from spkd.corpus.manifest import Manifest
from spkd.train.caches import open_caches
from tests.conftest import save_teacher


@pytest.fixture
def teachers(tmp_path: Path) -> list[str]:
    """Two checkpoints of other widths."""
    for number, width in enumerate((8, 6)):
        save_teacher(tmp_path / f"teacher{number}", width, "abcde", seed=number)
    return [str(tmp_path / "teacher0"), str(tmp_path / "teacher1")]


@pytest.fixture
def shares(corpus: Path, tmp_path: Path) -> list[str]:
    """Manifests: the first five utterances, the other thirteen, all of them in another order."""
    everything = Manifest.load(corpus / "manifest.csv").utterances
    picked = {"few": everything[:5], "rest": everything[5:], "all": (*everything[9:], *everything[:9])}
    for name, utterances in picked.items():
        Manifest(utterances).save(tmp_path / f"{name}.csv")
    return ["few.csv", "rest.csv", "all.csv"]


def extract(spkd: Callable, manifest: str, cache: str, weights: str, *more: str):  # type: ignore[no-untyped-def]
    return spkd(
        "extract",
        "teacher=checkpoint",
        f"teacher.weights={weights}",
        "teacher.targets=[embedding,frames]",
        f"manifest={manifest}",
        f"cache={cache}",
        "view=crops:2,0.7",
        "view.noise=synthetic",
        "fbank=true",
        "storage.unit_views=4",
        *more,
    )


def by_view(cache: CacheSource, name: str = "embedding") -> dict[tuple[str, int], np.ndarray]:
    """What is served, by utterance and start: independent of the order of units."""
    stored = cache.decode(cache.stored(cache.usable_views, [name], None), [name])[name]
    views = cache.plan.views
    keys = [(cache.plan.utterances[u], int(s)) for u, s in zip(views.utterance, views.start, strict=True)]
    return {keys[row]: values.numpy() for row, values in zip(cache.usable_views, stored, strict=True)}


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[key], b[key]) for key in a)


def test_a_longer_manifest_adds_units(spkd: Callable, shares: list[str], teachers: list[str]) -> None:
    assert extract(spkd, "few.csv", "grown", teachers[0]).code == 0
    before = {p: p.read_bytes() for p in Path("grown").glob("*/c/*/0")}
    old = by_view(Cache.open("grown"))
    done = extract(spkd, "all.csv", "grown", teachers[0])
    assert "26 views extracted" in done.out, done.err
    assert {p: p.read_bytes() for p in before} == before
    assert "0 views extracted" in extract(spkd, "all.csv", "grown", teachers[0]).out
    assert extract(spkd, "all.csv", "whole", teachers[0]).code == 0
    grown = Cache.open("grown")
    for name in ("embedding", "frames", "fbank"):
        assert_same(by_view(grown, name), by_view(Cache.open("whole"), name))
    assert all(np.array_equal(by_view(grown)[key], values) for key, values in old.items())
    assert grown.fingerprint != Cache.open("whole").fingerprint
    assert "all checksums match" in spkd("cache", "verify", "grown").out
    info = spkd("cache", "info", "grown").out
    assert "5 utterances" in info
    assert "18 utterances, 6 speakers" in info
    oracle = zarr.open_group("grown", mode="r")["embedding"]
    assert isinstance(oracle, zarr.Array)
    assert np.isfinite(np.asarray(oracle[:])).all(1).sum() == 36
    # The manifest of before is complete in it; one of other utterances is another.
    assert "has grown since by 13 utterances" in extract(spkd, "few.csv", "grown", teachers[0]).out
    assert "another manifest" in extract(spkd, "rest.csv", "grown", teachers[0]).err


def test_a_run_whose_cache_has_grown_says_so(spkd: Callable, shares: list[str], teachers: list[str]) -> None:
    small = ["student=tiny", "student.channels=8", "batch_size=4", "crop=0.5"]
    assert extract(spkd, "few.csv", "c", teachers[0]).code == 0
    spkd("train", "--loss", "cosine", *small, "steps=2", "cache=c", "out=a").ok()
    assert extract(spkd, "all.csv", "c", teachers[0]).code == 0
    done = spkd("train", "--loss", "cosine", *small, "steps=2", "cache=c", "out=a")
    grown = "c has grown since (5 -> 18 utterances)"
    assert (done.code, done.err) == (
        2,
        f"error: a: holds a student with other settings ({grown}); choose another folder with out=FOLDER\n",
    )
    done = spkd("train", "--loss", "cosine", *small, "steps=3", "cache=c", "out=a")
    assert f"({grown}; steps: 2 there, 3 now)" in done.err
    done = spkd("train", "--from", "a", "out=b")
    assert (done.code, f"note: {grown}; this run takes them all\n" in done.out) == (0, True), done.err
    assert "has grown" not in spkd("train", "--from", "b", "out=d").out


def test_what_was_complete_stays_readable_while_it_grows(
    spkd: Callable, shares: list[str], teachers: list[str]
) -> None:
    assert extract(spkd, "few.csv", "c", teachers[0]).code == 0
    old = by_view(Cache.open("c"))
    done = extract(spkd, "all.csv", "c", "nowhere")
    assert done.code == 2
    # A second worker holds every new unit, so that this run can only announce them.
    Path("c/claims").mkdir(exist_ok=True)
    for unit in range(3, 10):
        Path(f"c/claims/{unit}").write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    done = extract(spkd, "all.csv", "c", teachers[0])
    assert "0 views extracted" in done.out
    assert "still busy" in done.out
    assert "3 of 10 committed" in spkd("cache", "info", "c").out
    assert_same(by_view(Cache.open("c")), old)
    assert "all checksums match" in spkd("cache", "verify", "c").out
    for claim in Path("c/claims").iterdir():
        claim.unlink()
    assert "complete" in extract(spkd, "all.csv", "c", teachers[0]).out
    assert len(Cache.open("c").usable_views) == 36


def test_an_utterance_that_changed_is_refused(spkd: Callable, shares: list[str], teachers: list[str]) -> None:
    assert extract(spkd, "few.csv", "c", teachers[0]).code == 0
    changed = list(Manifest.load("all.csv").utterances)
    first = Manifest.load("few.csv")[0].id
    changed = [dataclasses.replace(u, speaker="other") if u.id == first else u for u in changed]
    Manifest(tuple(changed)).save("changed.csv")
    done = extract(spkd, "changed.csv", "c", teachers[0])
    assert (done.code, "another manifest" in done.err) == (2, True)


def test_merged_utterances_are_those_of_one_extraction(spkd: Callable, shares: list[str], teachers: list[str]) -> None:
    for name in ("few", "rest", "all"):
        assert extract(spkd, f"{name}.csv", name, teachers[0]).code == 0
    done = spkd("cache", "merge", "few", "rest", "both")
    assert "complete" in done.out, done.err
    assert_same(by_view(Cache.open("both"), "frames"), by_view(Cache.open("all"), "frames"))
    assert "all checksums match" in spkd("cache", "verify", "both").out
    # It can still grow, and be merged again only with other utterances.
    assert "0 views extracted" in extract(spkd, "all.csv", "both", teachers[0]).out
    assert "holds the utterance" in spkd("cache", "merge", "both", "few", "again").err
    assert not Path("again").exists()


def test_shares_of_one_extraction_complete_each_other(spkd: Callable, shares: list[str], teachers: list[str]) -> None:
    for name in ("a", "b"):
        assert extract(spkd, "all.csv", name, teachers[0]).code == 0
    for name, gone in (("a", (0, 1, 2, 3)), ("b", (6, 7, 8))):
        Path(name, "COMPLETE.json").unlink()
        for unit in gone:
            Path(name, "commits", f"{unit}.json").unlink()
            Path(name, "embedding", "c", str(unit), "0").unlink()
    assert "complete" in spkd("cache", "merge", "a", "b", "whole").out
    assert "all checksums match" in spkd("cache", "verify", "whole").out
    Path("a/commits/5.json").unlink()
    Path("b/commits/5.json").unlink()
    assert "units are still missing" in spkd("cache", "merge", "a", "b", "part").out


def test_what_does_not_go_together_is_not_merged(spkd: Callable, shares: list[str], teachers: list[str]) -> None:
    assert extract(spkd, "few.csv", "a", teachers[0]).code == 0
    assert extract(spkd, "rest.csv", "b", teachers[1]).code == 0
    done = spkd("cache", "merge", "a", "b", "out")
    assert (done.code, "another teacher" in done.err) == (1, True)
    assert spkd("cache", "merge", "a", "out").code == 2


def test_corpora_follow_one_another(spkd: Callable, shares: list[str], teachers: list[str]) -> None:
    # Codecs that learn have a codebook of their own in each corpus.
    for name in ("few", "rest"):
        assert extract(spkd, f"{name}.csv", name, teachers[0], "storage.codec=int8").code == 0
    both, few, rest = open_caches(["few", "rest"]), Cache.open("few"), Cache.open("rest")
    assert len(both) == 36
    assert both.plan.speakers == sorted({*few.plan.speakers, *rest.plan.speakers})
    rows = np.array([30, 2, 11, 0, 35])
    crop = Crop(np.array([0, 160, 320, 480, 640]), 4800)
    batch = both.decode(both.stored(rows, ["embedding", "frames", "fbank"], crop), ["frames", "fbank", "embedding"])
    for i, row in enumerate(rows):
        cache, local = (few, row) if row < 10 else (rest, row - 10)
        alone = cache.batch(np.array([local]), list(batch), Crop(crop.start[i : i + 1], crop.samples))
        for name, values in batch.items():
            assert torch.equal(values[i], alone[name][0]), name
        assert both.plan.speakers[both.speaker(rows)[i]] == cache.plan.speakers[cache.speaker(np.array([local]))[0]]


@pytest.mark.parametrize("how", ["concatenate", "average", "separate"])
def test_teachers_are_combined(spkd: Callable, shares: list[str], teachers: list[str], how: str) -> None:
    # The second has grown, so its views are elsewhere; only the first has fbank.
    other = teachers[0] if how == "average" else teachers[1]
    if how == "average":
        save_teacher(Path("teacher2"), seed=9)
        other = "teacher2"
    assert extract(spkd, "all.csv", "one", teachers[0]).code == 0
    for manifest in ("few.csv", "all.csv"):
        assert extract(spkd, manifest, "two", other, "fbank=false").code == 0
    both, one, two = open_caches(["one", "two"], how), by_view(Cache.open("one")), by_view(Cache.open("two"))
    assert "fbank" in both.names
    views = both.plan.views
    keys = [(both.plan.utterances[u], int(s)) for u, s in zip(views.utterance, views.start, strict=True)]
    a, b = (torch.from_numpy(np.stack([outputs[key] for key in keys])).float() for outputs in (one, two))
    names = ["embedding@0", "embedding@1"] if how == "separate" else ["embedding"]
    outputs = both.decode(both.stored(both.usable_views, [*names, "fbank"]), [*names, "fbank"])
    assert torch.equal(outputs["fbank"], Cache.open("one").batch(both.usable_views, ["fbank"])["fbank"])
    if how == "separate":
        assert torch.equal(outputs["embedding@0"].float(), a)
        assert torch.equal(outputs["embedding@1"].float(), b)
        assert both.dim("embedding@1") == 6
    elif how == "average":
        assert torch.allclose(outputs["embedding"], (normalize(a) + normalize(b)) / 2)
    else:
        both_cosine = outputs["embedding"] @ outputs["embedding"].T
        mean = (normalize(a) @ normalize(a).T + normalize(b) @ normalize(b).T) / 2
        assert torch.allclose(both_cosine, mean, atol=1e-5)


def test_caches_that_do_not_go_together_are_refused(
    spkd: Callable, shares: list[str], teachers: list[str], corpus: Path
) -> None:
    for name in ("few", "rest", "all"):
        assert extract(spkd, f"{name}.csv", name, teachers[0]).code == 0
    assert extract(spkd, "rest.csv", "other-teacher", teachers[1]).code == 0
    assert extract(spkd, "few.csv", "other-views", teachers[1], "view.seed=1").code == 0
    train = ["train", "--loss", "cosine", "steps=2", "batch_size=4", "student.channels=8"]
    for caches, expected in (
        ("[few,all]", "have 5 utterances in common"),
        ("[few,other-views]", "other views of the same utterances"),
        ("[few,other-teacher]", "every corpus needs the same teachers"),
        ("[few,./few]", "few: named twice among the caches; name each once"),
        ("[few,nowhere]", "no teacher cache"),
    ):
        done = spkd(*train, f"cache={caches}")
        assert (done.code, expected in done.err) == (2 if "nowhere" in caches or "./" in caches else 1, True), done.err


@pytest.mark.parametrize("how", ["concatenate", "separate"])
def test_a_student_learns_from_two_corpora_and_two_teachers(
    spkd: Callable, shares: list[str], teachers: list[str], how: str
) -> None:
    for name in ("few", "rest"):
        for k in (0, 1):
            assert extract(spkd, f"{name}.csv", f"{name}{k}", teachers[k]).code == 0
    train = ["train", "--loss", "cosine", "--loss", "aam", "steps=6", "batch_size=6", "student.channels=8", "crop=0.5"]
    done = spkd(*train, "cache=[few0,rest0,rest1,few1]", f"teachers={how}", "out=s").ok()
    terms = ["cosine@0", "cosine@1", "aam"] if how == "separate" else ["cosine", "aam"]
    assert all(f"{term} " in done.out for term in terms)
    assert (
        done.out.count("note: 1 speaker of one cache with the name of a speaker of another (spk1), taken for the same")
        == 1
    )
    done = spkd(*train, "cache=few0", "out=s")
    assert "holds a student with other settings" in done.err


def test_corpora_without_features_are_loaded_from_audio(
    spkd: Callable, shares: list[str], teachers: list[str], corpus: Path
) -> None:
    for name in ("few", "rest"):
        for suffix, features in (("", "true"), ("-bare", "false")):
            more = (f"fbank={features}", "storage.codec=float32")
            assert extract(spkd, f"{name}.csv", name + suffix, teachers[0], *more).code == 0
    train = ["train", "--loss", "cosine", "steps=4", "batch_size=6", "student.channels=8", "crop=0.5"]
    spkd(*train, "cache=[few,rest]", "out=cached").ok()
    spkd(*train, "cache=[few-bare,rest-bare]", "out=audio", "manifest=all.csv", "workers=0").ok()
    a, b = (load_file(f"{out}/model.safetensors") for out in ("cached", "audio"))
    assert all(torch.allclose(a[name], b[name], atol=1e-4) for name in a)
    done = spkd(*train, "cache=[few-bare,rest-bare]", "out=x", "manifest=few.csv")
    assert "another manifest" in done.err
