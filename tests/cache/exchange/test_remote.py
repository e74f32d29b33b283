"""Push, pull and list against a real S3 endpoint and a plain HTTP server, over sockets, by the real commands."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem

from spkd.cache import Cache
from spkd.cache.exchange.remote import pull, push
from spkd.cache.folder import self_digest
from spkd.corpus.manifest import Manifest
from spkd.errors import SpkdError
from tests import processes

from ...conftest import Quiet, served
from .test_exchange import make_cache


def same(a: Path, b: Path) -> bool:
    """Whether two caches hold the same files, but for the note of a pull."""
    mine, theirs = (
        {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file() and p.name != "pulled.json"}
        for root in (a, b)
    )
    return mine == theirs


def test_through_s3_and_back(spkd: Callable, s3: str, corpus: Path) -> None:
    cache = make_cache(spkd, corpus, "c")
    done = spkd("cache", "push", "c", f"{s3}/caches/one")
    assert (done.code, "all read back" in done.out) == (0, True), done.err
    assert "all checksums match" in spkd("cache", "pull", f"{s3}/caches/one", "copy").out
    shutil.rmtree("c/claims", ignore_errors=True)
    assert same(Path("c"), Path("copy"))
    assert np.array_equal(*(c.batch(c.usable_views, ["embedding"])["embedding"] for c in (cache, Cache.open("copy"))))
    listed = spkd("cache", "ls", s3).out
    assert f"{s3}/caches/one" in listed
    assert cache.card.fingerprint[:12] in listed
    assert "embedding:float16" in listed
    # Another cache is not pushed over it, nor pulled over the copy.
    make_cache(spkd, corpus, "d", "view.seed=1", "view=crops:1,0.7")
    assert "holds another cache" in spkd("cache", "push", "d", f"{s3}/caches/one").err
    assert spkd("cache", "push", "d", f"{s3}/caches/two").code == 0
    assert "holds a copy of another cache" in spkd("cache", "pull", f"{s3}/caches/two", "copy").err
    assert "is not empty and was not pulled" in spkd("cache", "pull", f"{s3}/caches/one", "c").err
    assert len(spkd("cache", "ls", s3).out.splitlines()) == 2


def test_damage_on_the_way_is_found_and_mended(spkd: Callable, s3: str, corpus: Path) -> None:
    make_cache(spkd, corpus, "c")
    url, files = f"{s3}/damaged", fsspec.filesystem("s3")
    assert spkd("cache", "push", "c", url).code == 0
    good = files.cat_file("lab/damaged/embedding/c/1/0")
    files.pipe_file("lab/damaged/embedding/c/1/0", good[:200] + bytes([good[200] ^ 1]) + good[201:])
    done = spkd("cache", "pull", url, "copy")
    assert done.code == 1
    assert f"{url}/embedding/c/1/0: changed in rows" in done.err
    assert len(done.err.splitlines()) == 1
    assert "not finished" in spkd("train", "--loss", "cosine", "cache=copy").err
    assert spkd("cache", "push", "c", url).code == 0  # sends again what differs
    assert spkd("cache", "pull", url, "copy").code == 0
    assert "all checksums match" in spkd("cache", "verify", "copy").out
    files.rm_file("lab/damaged/commits/0.json")
    assert f"{url}/commits/0.json: missing" in spkd("cache", "pull", url, "copy2").err
    # A damaged cache is not given away.
    shard = Path("c/embedding/c/0/0")
    shard.write_bytes(shard.read_bytes()[:-1])
    assert "c/embedding/c/0/0: " in spkd("cache", "push", "c", f"{s3}/new").err


def slow_copy(*arguments: str) -> None:
    """The command line on a slow disk."""

    def slow(call: Callable) -> Callable:
        def wait(*given: Any, **more: Any) -> Any:
            time.sleep(0.1)
            return call(*given, **more)

        return wait

    for name in ("put_file", "open"):
        setattr(LocalFileSystem, name, slow(getattr(LocalFileSystem, name)))
    processes.command(*arguments)


@pytest.mark.parametrize("direction", ["push", "pull"])
def test_a_copy_cut_in_the_middle_continues(spkd: Callable, corpus: Path, tmp_path: Path, direction: str) -> None:
    """Killed when half of the shards have arrived, the same command brings the other half, and the first no more."""
    make_cache(spkd, corpus, "c", "storage.unit_views=1")
    assert push(Path("c"), "file://" + str(tmp_path / "there")) > 0
    target = "again" if direction == "push" else "copy"
    arguments = ["c", str(tmp_path / "again")] if direction == "push" else [str(tmp_path / "there"), "copy"]
    process = processes.Running(slow_copy, "cache", direction, *arguments, cwd=tmp_path)
    wanted = len(list(Path("c").glob("*/c/*/0"))) // 2
    deadline = time.monotonic() + 60
    while len(list(Path(target).glob("*/c/*/0"))) < wanted and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    arrived = {p: p.stat().st_mtime_ns for p in Path(target).glob("*/c/*/0")}
    assert wanted <= len(arrived)
    assert not (Path(target) / "COMPLETE.json").exists()
    assert spkd("cache", direction, *arguments).code == 0
    assert {p: p.stat().st_mtime_ns for p in arrived} == arrived
    assert "all checksums match" in spkd("cache", "verify", target).out


def test_a_cache_that_grew_brings_only_what_is_new(spkd: Callable, corpus: Path, tmp_path: Path) -> None:
    everything = Manifest.load(corpus / "manifest.csv").utterances
    Manifest(everything[:10]).save("few.csv")
    make_cache(spkd, corpus, "c", "manifest=few.csv")
    there = str(tmp_path / "there")
    assert spkd("cache", "push", "c", there).code == 0
    assert spkd("cache", "pull", there, "copy").code == 0
    make_cache(spkd, corpus, "c")
    old = {p: p.stat().st_mtime_ns for root in ("there", "copy") for p in Path(root).glob("*/c/*/0")}
    assert spkd("cache", "push", "c", there).code == 0
    assert spkd("cache", "pull", there, "copy").code == 0
    assert {p: p.stat().st_mtime_ns for p in old} == old
    assert len(Cache.open("copy")) == 18
    assert "all checksums match" in spkd("cache", "verify", "copy").out
    make_cache(spkd, corpus, "small", "manifest=few.csv")  # what it grew from is not pushed over it
    assert "holds another cache" in spkd("cache", "push", "small", there).err


def test_pull_over_plain_http(spkd: Callable, web: str, corpus: Path) -> None:
    make_cache(spkd, corpus, "lab/deep/c")
    assert "all checksums match" in spkd("cache", "pull", f"{web}/lab/deep/c", "copy").out
    assert "all checksums match" in spkd("cache", "verify", "copy").out
    assert "/lab/deep/c" in spkd("cache", "ls", f"{web}/lab").out
    assert spkd("cache", "push", "copy", f"{web}/new").code == 2
    assert "no complete teacher cache there" in spkd("cache", "pull", f"{web}/nothing", "none").err
    assert not Path("none").exists()


def test_places_that_do_not_answer_or_exist(spkd: Callable, corpus: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        done = spkd("cache", "pull", f"http://127.0.0.1:{closed.getsockname()[1]}/c", "copy")
    assert (done.code, len(done.err.splitlines())) == (1, 1)
    assert spkd("cache", "pull", "nosuch://x/y", "copy").code == 2


def test_a_record_cannot_name_files_elsewhere(spkd: Callable, corpus: Path, tmp_path: Path) -> None:
    """Whoever writes the record of a cache decides nothing about where a pull writes."""
    make_cache(spkd, corpus, "c")
    record = json.loads(Path("c/COMPLETE.json").read_text())
    record["sha256"]["../escaped.json"] = record["sha256"]["card.json"]
    Path("escaped.json").write_bytes(Path("c/card.json").read_bytes())
    Path("c/COMPLETE.json").write_text(json.dumps(record | {"check": self_digest(record)}))
    assert "its files are not those of its card" in spkd("cache", "pull", str(tmp_path / "c"), "x/y/copy").err
    assert not Path("x").exists()
    del record["sha256"]["../escaped.json"]
    record["card"]["targets"][0]["name"] = "../../escaped"
    Path("c/COMPLETE.json").write_text(json.dumps(record | {"check": self_digest(record)}))
    assert "is not the name of a folder" in spkd("cache", "pull", str(tmp_path / "c"), "x/y/copy2").err


def test_copies_stay_under_the_limit(spkd: Callable, corpus: Path, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        make_cache(spkd, corpus, f"lab/{name}", f"view.seed={ord(name)}", "view=crops:1,0.7")
    size = sum(p.stat().st_size for p in Path("lab/a").rglob("*") if p.is_file())
    limit = int(2.5 * size)
    own = make_cache(spkd, corpus, "scratch/own")  # not pulled: never touched
    for name in ("a", "b"):
        pull(str(tmp_path / "lab" / name), Path("scratch") / name, limit)
        time.sleep(0.01)
    Cache.open("scratch/a")  # so that b was used longer ago
    pull(str(tmp_path / "lab/c"), Path("scratch/c"), limit)
    assert sorted(p.name for p in Path("scratch").iterdir()) == ["a", "c", "own"]
    reader = Cache.open("scratch/a")
    other = Cache.open("scratch/c")
    with pytest.raises(SpkdError, match="would exceed the limit"):  # both are being read
        pull(str(tmp_path / "lab/b"), Path("scratch/b"), limit)
    assert len(reader.batch(reader.usable_views, ["embedding"])["embedding"]) == len(reader.usable_views)
    del reader, other
    pull(str(tmp_path / "lab/b"), Path("scratch/b"), limit)
    assert "b" in [p.name for p in Path("scratch").iterdir()]
    assert len(own.usable_views) == len(Cache.open("scratch/own").usable_views)
    done = spkd("cache", "pull", str(tmp_path / "lab/c"), "tiny/c", "--limit", "0.000001")
    assert "would exceed the limit" in done.err


class Odd(Quiet):
    """A server that never ends a file, or sends it slowly."""

    endless: ClassVar[tuple[str, ...]] = ()
    slow: ClassVar[tuple[str, ...]] = ()

    def do_GET(self) -> None:
        if not self.path.endswith(self.endless + self.slow):
            return super().do_GET()
        file = Path(self.translate_path(self.path))
        data = file.read_bytes()
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if self.path.endswith(self.slow):
                for part in (data[i : i + 1 + len(data) // 5] for i in range(0, len(data), 1 + len(data) // 5)):
                    self.wfile.write(part)
                    self.wfile.flush()
                    time.sleep(0.3)
                return None
            self.wfile.write(data)
            while True:
                self.wfile.write(b" " * 65_536)


@pytest.fixture
def odd_web(tmp_path: Path) -> Iterator[str]:
    with served(tmp_path, Odd) as url:
        yield url


@pytest.mark.parametrize("name", ["COMPLETE.json", "card.json", "embedding/c/1/0"])
def test_a_file_that_never_ends_is_given_up(
    spkd: Callable, odd_web: str, corpus: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    make_cache(spkd, corpus, "c")
    monkeypatch.setattr(Odd, "endless", (name,))
    monkeypatch.setattr("spkd.cache.exchange.remote_folder.LARGEST_RECORD", 1 << 20)
    done = spkd("cache", "pull", f"{odd_web}/c", "copy")
    assert (done.code, len(done.err.splitlines())) == (1, 1)
    assert "larger than" in done.err
    assert name in done.err
    assert sum(p.stat().st_size for p in Path("copy").rglob("*") if p.is_file()) < 1 << 22


def test_a_slow_but_steady_server_is_not_cut_off(
    spkd: Callable, odd_web: str, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_cache(spkd, corpus, "c")
    monkeypatch.setattr(Odd, "slow", ("embedding/c/1/0", "card.json"))
    monkeypatch.setattr("spkd.cache.exchange.remote_folder.SILENCE", 1.0)  # five pauses of 0.3 s are longer
    assert "all checksums match" in spkd("cache", "pull", f"{odd_web}/c", "copy").out


@pytest.mark.parametrize("units", [10**9, 10**18, "x", -1, None])
def test_a_record_of_absurd_size_is_refused_at_once(
    spkd: Callable, corpus: Path, tmp_path: Path, units: object
) -> None:
    make_cache(spkd, corpus, "c")
    record = json.loads(Path("c/COMPLETE.json").read_text())
    record["card"]["parts"][0]["units"] = units
    Path("c/COMPLETE.json").write_text(json.dumps(record | {"check": self_digest(record)}))
    done = spkd("cache", "pull", str(tmp_path / "c"), "copy")
    assert (done.code, len(done.err.splitlines())) == (1, 1)
    assert "damaged" in done.err


@pytest.mark.parametrize("command", [["push", "c", "there"], ["pull", "{c}", "copy"]])
def test_two_copies_into_one_place(spkd: Callable, corpus: Path, tmp_path: Path, command: list[str]) -> None:
    make_cache(spkd, corpus, "c")
    arguments = [part.format(c=tmp_path / "c") for part in command]
    both = [processes.spkd("cache", *arguments) for _ in range(3)]
    errors = [process.communicate()[1] for process in both]
    assert 0 in [process.returncode for process in both], errors
    assert not [error for error in errors if ".part" in error or "Traceback" in error]
    assert "all checksums match" in spkd("cache", "verify", arguments[-1]).out
