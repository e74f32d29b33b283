"""Repair of damaged caches from another copy, by the real command line."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from spkd.corpus.manifest import Manifest, Utterance
from spkd.files.atomic import machine_id
from tests import processes

from .test_exchange import make_cache
from .test_remote import same, slow_copy


@pytest.fixture
def cache(spkd: Callable, corpus: Path) -> Path:
    """A cache with four units, codec tables, a head and a list of rejections; `there` is a copy of it."""
    everything = Manifest.load(corpus / "manifest.csv").utterances
    Manifest((*everything, Utterance("gone", "gone.wav", "spk0", 1.0))).save("m.csv")
    make_cache(spkd, corpus, "c", "manifest=m.csv", "storage.codec=int8")
    spkd("cache", "push", "c", "there").ok()
    return Path("c")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


SHARDS: dict[str, Callable[[Path], None]] = {
    "embedding/c/0/0": Path.unlink,
    "frames/c/1/0": lambda path: os.truncate(path, 700),
    "fbank/c/2/0": flip,
}
OTHERS = ("card.json", "plan/0.npz", "rejected.csv", "codec.safetensors", "head.safetensors", "commits/3.json")


def times(root: Path) -> dict[str, int]:
    return {str(path.relative_to(root)): path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("source", ["there", "{web}/there"])
def test_only_what_is_damaged_is_fetched(spkd: Callable, cache: Path, web: str, source: str) -> None:
    url = source.format(web=web)
    before = times(cache)
    for name, damage in SHARDS.items():
        damage(cache / name)
    done = spkd("cache", "repair", "c", "--from", url)
    assert (done.code, "c: 3 shards (" in done.out, "0 other files" in done.out) == (0, True, True), done.err
    changed = {name for name, at in times(cache).items() if before.get(name) != at}
    assert changed - {"verified.log", "verified.json"} == SHARDS.keys()
    assert "all checksums match" in spkd("cache", "verify", "c").out
    assert "nothing is damaged" in spkd("cache", "repair", "c", "--from", url).out
    # Files beside the shards, and all of them at once.
    for name in OTHERS:
        flip(cache / name)
    Path("c/COMPLETE.json").unlink()
    for name, damage in SHARDS.items():
        damage(cache / name)
    done = spkd("cache", "repair", "c", "--from", url)
    assert done.code == 1, done.out  # nothing is left that says which cache it was
    assert "c/card.json: " in done.err
    shutil.copy("there/card.json", "c/card.json")
    done = spkd("cache", "repair", "c", "--from", url).ok()
    assert "c: 3 shards" in done.out
    assert f"and {len(OTHERS)} other files fetched" in done.out
    assert "all checksums match" in spkd("cache", "verify", "c").out
    for note in ("verified.log", "verified.json"):
        Path("c", note).unlink()
    for root in (cache, Path("there")):
        shutil.rmtree(root / "claims")
    assert same(cache, Path("there"))


def test_another_cache_is_refused(spkd: Callable, cache: Path, corpus: Path) -> None:
    make_cache(spkd, corpus, "other", "view=crops:1,0.7")
    (cache / "fbank/c/2/0").unlink()
    for damaged in ("fbank/c/2/0", "COMPLETE.json"):
        (cache / damaged).unlink(missing_ok=True)
        done = spkd("cache", "repair", "c", "--from", "other")
        assert (done.code, "other: not a copy of c" in done.err) == (1, True), done.err
    assert "no complete teacher cache there" in spkd("cache", "repair", "c", "--from", "nowhere").err
    assert spkd("cache", "repair", "c").code == 2
    assert not (cache / "fbank/c/2/0").exists()


def test_what_the_copy_lacks_remains_damaged_and_is_named(spkd: Callable, cache: Path) -> None:
    for name, damage in SHARDS.items():
        damage(cache / name)
    good = Path("there/fbank/c/2/0").read_bytes()
    flip(Path("there/fbank/c/2/0"))
    kept = (cache / "fbank/c/2/0").read_bytes()
    Path("there/embedding/c/0/0").unlink()
    done = spkd("cache", "repair", "c", "--from", "there")
    assert (done.code, "c: units that remain damaged: 0, 2; there lacks" in done.err) == (1, True), done.err
    assert "there/fbank/c/2/0: changed in" in done.err
    assert "there/embedding/c/0/0: " in done.err
    assert (cache / "fbank/c/2/0").read_bytes() == kept  # a damaged file replaces nothing
    assert "frames/c/1" not in spkd("cache", "verify", "c").err  # what it had was fetched
    Path("there/fbank/c/2/0").write_bytes(good)
    assert "units that remain damaged: 0;" in spkd("cache", "repair", "c", "--from", "there").err


def test_a_killed_repair_continues(spkd: Callable, cache: Path, tmp_path: Path) -> None:
    shards = sorted(cache.glob("*/c/*/0"))
    for shard in shards:
        shard.unlink()
    process = processes.Running(slow_copy, "cache", "repair", "c", "--from", str(tmp_path / "there"), cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not list(cache.glob("*/c/*/0")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    arrived = {path: path.stat().st_mtime_ns for path in cache.glob("*/c/*/0")}
    assert 0 < len(arrived) < len(shards)
    done = spkd("cache", "repair", "c", "--from", "there")
    assert f"{len(shards) - len(arrived)} shards" in done.out, done.err
    assert {path: path.stat().st_mtime_ns for path in arrived} == arrived
    assert "all checksums match" in spkd("cache", "verify", "c").out


def test_what_kills_left_goes_where_nothing_is_damaged_any_more(spkd: Callable, cache: Path) -> None:
    for name in ("claims/growth.lock", "commits/0.json", "card.json"):
        (cache / f"{name}.{machine_id()}0123456789.part").write_bytes(b"half")
    spkd("cache", "repair", "c", "--from", "there").ok()
    assert not list(cache.rglob("*.part"))


def test_a_lost_or_changed_head_is_written_again(spkd: Callable, corpus: Path) -> None:
    make_cache(spkd, corpus, "c")
    before = Path("c/head.safetensors").read_bytes()
    for damage in (Path.unlink, flip):
        damage(Path("c/head.safetensors"))
        make_cache(spkd, corpus, "c")
        assert Path("c/head.safetensors").read_bytes() == before
