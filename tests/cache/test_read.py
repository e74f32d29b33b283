from __future__ import annotations

import dataclasses
import itertools
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from spkd.cache import Cache, claim_units, finalize, initialise
from spkd.cache.describe import describe
from spkd.cache.layout import compress, decompress
from spkd.errors import SpkdError
from spkd.outputs.head import Head
from spkd.outputs.target import Target
from spkd.outputs.teacher_card import TeacherCard
from tests import processes

from .test_layout import make_card, make_plan, write, writer_of

EMBEDDING = Target("embedding", 4)


class Rows(Dataset):
    def __init__(self, cache: Cache) -> None:
        self.cache = cache

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, row: int) -> torch.Tensor:
        return self.cache.batch(np.array([row]), ["embedding"])["embedding"][0]


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_read_what_the_parent_reads_also_after_it_did(tmp_path: Path, context: str) -> None:
    values = write(tmp_path / "c", [4000] * 10, [EMBEDDING], unit_views=4)["embedding"]
    cache = Cache.open(tmp_path / "c")
    cache.batch(cache.usable_views, ["embedding"])
    loader = DataLoader(Rows(cache), batch_size=None, num_workers=2, multiprocessing_context=context)
    assert np.array_equal(torch.stack(list(loader)).numpy(), np.concatenate(values))


def test_rejected_views_are_never_served(tmp_path: Path) -> None:
    write(tmp_path / "c", [4000] * 5, [EMBEDDING], reject=(1, 3))
    cache = Cache.open(tmp_path / "c")
    assert list(cache.usable_views) == [0, 2, 4]
    with pytest.raises(SpkdError, match=r"view 3 was rejected \(bad\)"):
        cache.batch(np.array([0, 3]), ["embedding"])


def test_an_unknown_target_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path / "c", [4000], [EMBEDDING])
    with pytest.raises(SpkdError, match="no target 'embeding'.*did you mean 'embedding'"):
        Cache.open(tmp_path / "c").batch(np.array([0]), ["embeding"])


def test_logits_follow_from_embedding_and_head(tmp_path: Path) -> None:
    manifest, plan = make_plan([4000] * 3)
    weight = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    head = Head(weight, [str(i) for i in range(7)], 30.0)
    made = make_card([EMBEDDING], manifest, plan, head.card())
    initialise(tmp_path / "c", made, [plan], head.to_bytes())
    for unit in claim_units(tmp_path / "c", plan.units):
        writer = writer_of(tmp_path / "c", plan, unit)
        writer.put("embedding", list(plan.unit(unit)), np.arange(4.0) + np.arange(3.0)[:, None])
        writer.commit()
    finalize(tmp_path / "c", made, plan)
    cache = Cache.open(tmp_path / "c")
    assert cache.names == ["embedding", "logits"]
    assert cache.dim("logits") == 7
    e = np.arange(4.0) + np.arange(3.0)[:, None]
    w = weight.double().numpy()
    expected = 30 * (e / np.linalg.norm(e, axis=1, keepdims=True)) @ (w / np.linalg.norm(w, axis=1, keepdims=True)).T
    assert np.allclose(cache.batch(cache.usable_views, ["logits"])["logits"], expected, atol=1e-4)
    assert np.allclose(Head(weight, [], 30.0).logits(torch.from_numpy(e)), expected, atol=1e-4)


def test_a_cache_of_a_newer_spkd_or_none_at_all(tmp_path: Path) -> None:
    with pytest.raises(SpkdError, match="no teacher cache"):
        Cache.open(tmp_path)
    write(tmp_path / "c", [4000], [EMBEDDING])
    path = tmp_path / "c" / "COMPLETE.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"card": record["card"] | {"spkd_cache": 5}}))
    with pytest.raises(SpkdError, match="format 5.*update spkd"):
        Cache.open(tmp_path / "c")
    path.write_text(json.dumps(record | {"card": record["card"] | {"spkd_cache": 3}}))
    with pytest.raises(SpkdError, match="format 3.*extract it again"):
        Cache.open(tmp_path / "c")
    path.write_text(json.dumps(record | {"card": record["card"] | {"targets": []}}))
    with pytest.raises(SpkdError, match="does not match its own digest"):
        Cache.open(tmp_path / "c")
    path.write_text("{")
    with pytest.raises(SpkdError, match="not valid JSON"):
        Cache.open(tmp_path / "c")
    path.unlink()
    (tmp_path / "c" / "card.json").write_text(json.dumps(record["card"] | {"codecs": "0"}))
    with pytest.raises(SpkdError, match="does not match its identity"):
        Cache.open(tmp_path / "c")


def test_the_description_says_what_is_there(tmp_path: Path) -> None:
    from spkd.corpus.settings import ViewConfig
    from spkd.corpus.view import ViewPlan

    manifest, plan = make_plan([16_000] * 3)
    teacher = TeacherCard("t", "f" * 64, "MIT", "src", "p")
    views = ViewPlan.parse(ViewConfig(speeds=[0.9, 1.0], noise="synthetic")).card()
    made = dataclasses.replace(make_card([EMBEDDING], manifest, plan), teacher=teacher, views=views)
    plan = dataclasses.replace(plan, views=dataclasses.replace(plan.views, speed=np.full(3, 0.9, np.float32)))
    initialise(tmp_path / "c", made, [plan])
    text = describe(tmp_path / "c")
    for expected in (
        "t (src)",
        "MIT",
        "3 utterances, 2 speakers",
        "speeds 0.9, 1",
        "noise",
        "0 of 1 committed",
        "4 x float16",
    ):
        assert expected in text


def test_mapped_shards_hold_no_descriptors(tmp_path: Path) -> None:
    write(tmp_path / "c", [4000] * 60, [EMBEDDING], unit_views=1)
    cache = Cache.open(tmp_path / "c")
    before = len(os.listdir("/proc/self/fd"))
    cache.batch(cache.usable_views, ["embedding"])
    assert len(cache._shards["embedding"]) == 60
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_number_of_maps_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = write(tmp_path / "c", [4000] * 40, [EMBEDDING], unit_views=1)["embedding"]
    monkeypatch.setattr("spkd.cache.read.MOST_MAPPED", 8)
    cache = Cache.open(tmp_path / "c")
    for first in (0, 10, 3, 30, 0):
        views = np.arange(first, first + 5)
        found = cache.batch(views, ["embedding"])["embedding"].numpy()
        assert np.array_equal(found, np.concatenate([values[v] for v in views]))
        assert len(cache._shards["embedding"]) <= 8
    assert len(cache.batch(cache.usable_views, ["embedding"])["embedding"]) == 40


CHANGES = {
    "truncate": lambda shard: os.truncate(shard, 130),
    "empty": lambda shard: os.truncate(shard, 0),
    "remove": Path.unlink,
    "grow": lambda shard: os.truncate(shard, shard.stat().st_size + 1),
}


def read_while_shards_change(root: Path) -> None:
    """Print what a reader gives as the error after each change, some time later."""
    clock = itertools.count(time.monotonic(), 1000.0)
    time.monotonic = lambda: next(clock)  # type: ignore[assignment]
    for name, change in CHANGES.items():
        cache = Cache.open(root / name)
        cache.batch(np.arange(200), ["embedding"])
        change(root / name / "embedding/c/0/0")
        try:
            cache.batch(np.arange(200), ["embedding"])
        except SpkdError as error:
            print(error)


def test_a_shard_that_changes_under_a_reader_is_an_error_not_a_crash(tmp_path: Path) -> None:
    for name in CHANGES:
        write(tmp_path / name, [4000] * 200, [EMBEDDING], unit_views=100)
    reading = processes.Running(read_while_shards_change, tmp_path)
    out, error = reading.communicate()
    assert reading.returncode == 0, error
    for name, line in zip(CHANGES, out.splitlines(), strict=True):
        assert f"{name}/embedding/c/0/0: " in line
        assert "while it was being read" in line


def test_a_compressed_chunk_that_claims_more_than_it_may_hold_is_refused() -> None:
    whole = compress(b"\0" * 1000)
    assert decompress(whole, 1000) == b"\0" * 1000
    bomb = compress(b"\0" * (1 << 24))
    for bad in (bomb, whole[:-1], b"", b"\x28\xb5\x2f\xfd\xa0" + b"\xff" * 20, whole[:4] + b"\0" + whole[5:]):
        with pytest.raises(ValueError, match=r"."):
            decompress(bad, 1000)


def test_large_batches_are_whole_in_several_threads_and_with_two_threads_each(tmp_path: Path) -> None:
    """Half of a batch above 1 MB is copied by a second thread, which the callers of one reader share."""
    frames = Target("frames", 256, 160, 0)
    values = write(tmp_path / "c", [160 * 99] * 64, [frames], unit_views=16)["frames"]
    whole = np.concatenate(values).reshape(64, 100, 256)
    cache, before = Cache.open(tmp_path / "c"), torch.get_num_threads()

    def read(seed: int) -> bool:
        views = np.random.RandomState(seed).randint(0, 64, 48)
        return bool(np.array_equal(cache.batch(views, ["frames"])["frames"].numpy(), whole[views]))

    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(read, range(40)))
        out = torch.zeros(64, 99, 256, dtype=torch.float16)  # a row too few
        for _ in range(3):
            with pytest.raises((ValueError, RuntimeError)):
                cache.batch(np.arange(64), ["frames"], None, {"frames": out})
            assert read(1)
    finally:
        torch.set_num_threads(before)
