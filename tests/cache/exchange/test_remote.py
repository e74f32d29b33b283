"""Push, pull and list against a real S3 endpoint and a plain HTTP server, over sockets, by the real commands."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem

from spkd.cache import Cache
from spkd.cache.claims import changing, claim
from spkd.cache.exchange import remote
from spkd.cache.exchange.remote import pull, push
from spkd.cache.folder import CommitRecord, CompletionRecord, claim_path, commit_path, load_card
from spkd.corpus.manifest import Manifest
from spkd.errors import SpkdError
from spkd.files.atomic import machine_id, write_json
from spkd.files.remote_folder import RemoteFolder
from spkd.files.sealed import self_digest
from tests import processes

from ...conftest import Outcome, Quiet, served
from .test_exchange import make_cache

SMALL = ["student=tiny", "student.channels=8", "student.embedding=6", "steps=2", "batch_size=4", "crop=0.5"]
UNLIKE = ("pulled.json", "growth", "0.bin", "1.bin")


def same(a: Path, b: Path) -> bool:
    """Whether two caches hold the same files, but for the note of a pull, for claims and for what is mapped."""
    mine, theirs = (
        {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file() and p.name not in UNLIKE}
        for root in (a, b)
    )
    return mine == theirs


def test_through_s3_and_back(spkd: Callable, s3: str, corpus: Path) -> None:
    cache = make_cache(spkd, corpus, "c")
    done = spkd("cache", "push", "c", f"{s3}/caches/one")
    assert (done.code, "all read back" in done.out) == (0, True), done.err
    assert "all checksums match" in spkd("cache", "pull", f"{s3}/caches/one", "copy").out
    assert same(Path("c"), Path("copy"))
    assert np.array_equal(*(c.batch(c.usable_views, ["embedding"])["embedding"] for c in (cache, Cache.open("copy"))))
    listed = spkd("cache", "ls", s3).out
    assert f"{s3}/caches/one" in listed
    assert cache.fingerprint[:12] in listed
    assert "embedding:float16" in listed
    # Another cache is not pushed over it, nor pulled over the copy.
    make_cache(spkd, corpus, "d", "view.seed=1", "view=crops:1,0.7")
    assert "holds another cache" in spkd("cache", "push", "d", f"{s3}/caches/one").err
    spkd("cache", "push", "d", f"{s3}/caches/two").ok()
    assert "holds a copy of another cache" in spkd("cache", "pull", f"{s3}/caches/two", "copy").err
    assert "is not empty and was not pulled" in spkd("cache", "pull", f"{s3}/caches/one", "c").err
    assert len(spkd("cache", "ls", s3).out.splitlines()) == 2


def test_damage_on_the_way_is_found_and_mended(spkd: Callable, s3: str, corpus: Path) -> None:
    make_cache(spkd, corpus, "c")
    url, files = f"{s3}/damaged", fsspec.filesystem("s3")
    spkd("cache", "push", "c", url).ok()
    good = files.cat_file("lab/damaged/embedding/c/1/0")
    files.pipe_file("lab/damaged/embedding/c/1/0", good[:200] + bytes([good[200] ^ 1]) + good[201:])
    done = spkd("cache", "pull", url, "copy")
    assert done.code == 1
    assert f"{url}/embedding/c/1/0: changed in rows" in done.err
    assert len(done.err.splitlines()) == 1
    assert "not finished" in spkd("train", "--loss", "cosine", "cache=copy").err
    spkd("cache", "push", "c", url).ok()  # sends again what differs
    spkd("cache", "pull", url, "copy").ok()
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
    spkd("cache", direction, *arguments).ok()
    assert {p: p.stat().st_mtime_ns for p in arrived} == arrived
    assert "all checksums match" in spkd("cache", "verify", target).out


def test_a_cache_that_grew_brings_only_what_is_new(spkd: Callable, corpus: Path, tmp_path: Path) -> None:
    everything = Manifest.load(corpus / "manifest.csv").utterances
    Manifest(everything[:10]).save("few.csv")
    make_cache(spkd, corpus, "c", "manifest=few.csv")
    there = str(tmp_path / "there")
    spkd("cache", "push", "c", there).ok()
    spkd("cache", "pull", there, "copy").ok()
    make_cache(spkd, corpus, "c")
    old = {p: p.stat().st_mtime_ns for root in ("there", "copy") for p in Path(root).glob("*/c/*/0")}
    spkd("cache", "push", "c", there).ok()
    spkd("cache", "pull", there, "copy").ok()
    assert {p: p.stat().st_mtime_ns for p in old} == old
    assert len(Cache.open("copy")) == 18
    assert "all checksums match" in spkd("cache", "verify", "copy").out
    make_cache(spkd, corpus, "small", "manifest=few.csv")  # what it grew from is not pushed over it
    assert "holds another cache" in spkd("cache", "push", "small", there).err


@pytest.fixture
def shares(spkd: Callable, corpus: Path) -> None:
    """Cache `whole`, and `lesser` of the same command while the audio of two utterances was away."""
    Path("audio").mkdir()
    named = [replace(u, path=f"audio/{i}") for i, u in enumerate(Manifest.load(corpus / "manifest.csv"))]
    for utterance, copy in zip(Manifest.load(corpus / "manifest.csv"), named, strict=True):
        shutil.copy(utterance.path, copy.path)
    Manifest(tuple(named)).save("m.csv")
    command = ["extract", "teacher=none", "manifest=m.csv", "storage.unit_views=6"]
    spkd(*command, "cache=whole").ok()
    for away in ("3", "17"):
        Path("audio", away).rename(away)
    assert "16 views extracted, 2 rejected; complete" in spkd(*command, "cache=lesser").out
    for away in ("3", "17"):
        Path(away).rename(f"audio/{away}")


@pytest.mark.usefixtures("shares")
@pytest.mark.parametrize("lost", ["", "COMPLETE.json", "card.json"])
def test_rejections_are_not_copied_over_views(spkd: Callable, tmp_path: Path, lost: str) -> None:
    """Whether the copy is complete or not; the other way round, what was rejected is brought."""
    spkd("cache", "push", "whole", "there").ok()
    spkd("cache", "pull", "whole", "copy").ok()
    shutil.copytree("lesser", "source")
    Path("whole").rename("gone")
    Path("source").rename("whole")  # the source was lost and extracted again
    before = {path: path.read_bytes() for root in ("there", "copy") for path in Path(root).rglob("fbank/c/*/0")}
    for root in ("there", "copy"):
        Path(root, lost or "none").unlink(missing_ok=True)
    for command, message in {
        ("push", "lesser", "there"): "there: holds 2 views that lesser lacks, as they were rejected",
        ("pull", "whole", "copy"): "copy: holds 2 views that whole lacks, as they were rejected",
        ("repair", "copy", "--from", "lesser"): "lesser: lacks 2 views of copy, as they were rejected",
    }.items():
        done = spkd("cache", *command)
        if command[0] == "repair" and lost != "COMPLETE.json":
            message = "its fingerprint is another"
        assert (done.code, message in done.err, done.err.count("\n")) == (1, True, 1), (command, done.err)
    assert {path: path.read_bytes() for path in before} == before
    # What was pushed and pulled with rejections is completed.
    spkd("cache", "push", "lesser", "less").ok()
    spkd("cache", "pull", "lesser", "few").ok()
    spkd("cache", "push", "gone", "less").ok()
    shutil.rmtree("lesser")
    Path("gone").rename("lesser")
    spkd("cache", "pull", "lesser", "few").ok()
    assert [len(Cache.open(name).usable_views) for name in ("less", "few")] == [18, 18]


@pytest.mark.usefixtures("shares")
@pytest.mark.parametrize("names", [("whole", "lesser"), ("lesser", "whole")])
def test_a_merge_takes_the_units_with_the_fewest_rejections(spkd: Callable, names: tuple[str, str]) -> None:
    spkd("cache", "merge", *names, "merged").ok()
    assert Cache.open("merged").fingerprint == Cache.open("whole").fingerprint
    assert "all checksums match" in spkd("cache", "verify", "merged").out


def test_pull_over_plain_http(spkd: Callable, web: str, corpus: Path) -> None:
    make_cache(spkd, corpus, "lab/deep/c")
    assert "all checksums match" in spkd("cache", "pull", f"{web}/lab/deep/c", "copy").out
    assert "all checksums match" in spkd("cache", "verify", "copy").out
    assert "/lab/deep/c" in spkd("cache", "ls", f"{web}/lab").out
    assert spkd("cache", "push", "copy", f"{web}/new").code == 2
    assert "no complete teacher cache there" in spkd("cache", "pull", f"{web}/nothing", "none").err
    assert not Path("none").exists()


def test_places_that_do_not_answer_or_exist(spkd: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spkd.files.remote_folder.WAIT", 0.001)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        done = spkd("cache", "pull", f"http://127.0.0.1:{closed.getsockname()[1]}/c", "copy")
    assert (done.code, len(done.err.splitlines())) == (1, 1)
    assert spkd("cache", "pull", "nosuch://x/y", "copy").code == 2


def test_a_record_cannot_name_files_elsewhere(spkd: Callable, corpus: Path, tmp_path: Path) -> None:
    """Whoever writes the record of a cache decides nothing about where a pull writes."""
    make_cache(spkd, corpus, "c")
    record = json.loads(Path("c/COMPLETE.json").read_text())
    Path("escaped.json").write_bytes(Path("c/commits/0.json").read_bytes())
    record["sha256"]["../escaped.json"] = hashlib.sha256(Path("escaped.json").read_bytes()).hexdigest()
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
    assert not Path("tiny").exists()


def test_emptied_files_of_a_copy_are_written_again(spkd: Callable, corpus: Path, tmp_path: Path) -> None:
    """As a power cut leaves them on a file system that syncs nothing; files of another cache stay, readable or not."""
    make_cache(spkd, corpus, "c")
    make_cache(spkd, corpus, "d", "view.seed=1", "view=crops:1,0.7")
    commands = {"there": ("push", "{}", str(tmp_path / "there")), "copy": ("pull", f"{tmp_path}/{{}}", "copy")}
    for copy, command in commands.items():

        def again(cache: str, command: tuple[str, ...] = command) -> Outcome:
            return spkd("cache", *(part.format(cache) for part in command))

        assert again("c").code == 0
        for path in (
            Path(copy, name) for name in ("card.json", "COMPLETE.json", "pulled.json")[: 2 + (copy == "copy")]
        ):
            path.write_bytes(b"")
            done = again("c")
            assert done.code == 0, (path, done.err)
            assert path.stat().st_size, path
        assert same(Path("c"), Path(copy))
        Path(copy, "card.json").write_bytes(b"")
        done = again("d")
        assert (done.code, "another cache" in done.err) == (2, True), done.err
        Path(copy, "COMPLETE.json").write_bytes(b"")
    done = again("c")  # by the note of the pull
    assert done.code == 0, done.err
    done = spkd("cache", "push", "c", "there")
    assert (done.code, "remove that copy" in done.err, done.err.count("\n")) == (1, True, 1), done.err


def test_a_linked_folder_within_that_of_a_cache_is_refused(spkd: Callable, corpus: Path, tmp_path: Path) -> None:
    """Whoever writes a cache, or a copy of one, replaces nothing in the folder to which a link leads."""
    everything = Manifest.load(corpus / "manifest.csv").utterances
    Manifest(everything[:9]).save("a.csv")
    Manifest(everything[9:]).save("b.csv")
    for name in "ab":
        assert spkd("extract", "teacher=none", f"manifest={name}.csv", f"cache={name}").code == 0
    commands: dict[tuple[str, ...], tuple[str, ...]] = {
        ("extract", "teacher=none", "manifest=a.csv", "cache={}"): ("claims", "commits", "plan", "fbank", "fbank/c"),
        ("cache", "merge", "a", "b", "{}"): ("fbank",),
        ("cache", "push", "a", str(tmp_path / "{}")): ("fbank",),
        ("cache", "pull", str(tmp_path / "a"), "{}"): ("fbank/c/0",),
        ("cache", "export", "a", "{}"): ("plan",),
    }
    for number, (command, links) in enumerate(commands.items()):
        for link in links:
            out, theirs = Path(f"{number}-{link.replace('/', '-')}"), Path("theirs")
            again = [part.format(out) for part in command]
            assert spkd(*again).code == 0
            Path(out, link).rename("theirs")
            Path(out, link).symlink_to(theirs.resolve())
            Path(out, "commits", "0.json").unlink(missing_ok=True)
            for path in filter(Path.is_file, theirs.rglob("0")):
                path.unlink()
            before = sorted(theirs.rglob("*"))
            done = spkd(*again)
            message = f"{out}/{link}: a symbolic link, which is not written through; remove it"
            assert (done.code, message in done.err, done.err.count("\n")) == (1, True, 1), (again, done.err)
            assert sorted(theirs.rglob("*")) == before
            shutil.rmtree("theirs")


@pytest.fixture
def crowded(spkd: Callable, corpus: Path, tmp_path: Path) -> Callable[[], Outcome]:
    """Pull of a cache to scratch/b, for which the copy scratch/a of the cache lab/a would have to make room."""
    everything = Manifest.load(corpus / "manifest.csv").utterances
    Manifest(everything[:10]).save("few.csv")
    make_cache(spkd, corpus, "lab/a", "manifest=few.csv")
    make_cache(spkd, corpus, "lab/b", "view.seed=1", "view=crops:1,0.7")
    size = sum(path.stat().st_size for path in Path("lab/b").rglob("*") if path.is_file())
    spkd("cache", "pull", str(tmp_path / "lab/a"), "scratch/a").ok()
    return lambda: spkd("cache", "pull", str(tmp_path / "lab/b"), "scratch/b", "--limit", str(1.2e-9 * size))


def extended(spkd: Callable, corpus: Path, root: str) -> None:
    make_cache(spkd, corpus, root)


def put_aside(spkd: Callable, corpus: Path, root: str) -> None:
    Path(root, "thesis.tex").touch()


def lost_at_the_source(spkd: Callable, corpus: Path, root: str) -> None:
    Path("lab/a/frames/c/1/0").unlink()


def source_is_gone(spkd: Callable, corpus: Path, root: str) -> None:
    Path("lab/a").rename("lab/elsewhere")


def source_is_the_copy(spkd: Callable, corpus: Path, root: str) -> None:
    """As where one copy is enough, and its old name stays as a link."""
    shutil.rmtree("lab/a")
    Path("lab/a").symlink_to(Path(root).resolve())


def shards_are_links(spkd: Callable, corpus: Path, root: str) -> None:
    for path in Path("lab/a/fbank/c").glob("*/0"):
        path.unlink()
        path.symlink_to(Path(root).resolve() / path.relative_to("lab/a"))


def said_as_it_was_typed(spkd: Callable, corpus: Path, root: str) -> None:
    note = Path(root, "pulled.json")
    note.write_text(note.read_text().replace(str(Path().absolute()) + "/", ""))


def extracted_again(spkd: Callable, corpus: Path, root: str) -> None:
    commit = CommitRecord.load(Path(root), load_card(Path(root)), 1)
    write_json(commit_path(Path(root), 1), replace(commit, writer={"host": "another"}).to_json())


def emptied_at_the_source(spkd: Callable, corpus: Path, root: str) -> None:
    """As a power cut leaves files whose size alone had reached the disk."""
    shard = Path("lab/a/fbank/c/1/0")
    shard.write_bytes(bytes(shard.stat().st_size))


def torn_at_the_source(spkd: Callable, corpus: Path, root: str) -> None:
    shard = Path("lab/a/fbank/c/1/0")
    shard.write_bytes(shard.read_bytes()[:-500] + bytes(500))


def noted_at_the_source(spkd: Callable, corpus: Path, root: str) -> None:
    shard = Path("lab/a/fbank/c/1/0")
    data = bytearray(shard.read_bytes())
    data[5000] ^= 1
    shard.write_bytes(data)
    assert "fbank/c/1/0: changed in rows" in spkd("cache", "verify", "lab/a").err


@pytest.mark.parametrize("change", [emptied_at_the_source, noted_at_the_source])
def test_a_copy_from_a_web_server_stays_where_that_is_damaged(
    spkd: Callable, corpus: Path, crowded: Callable, web: str, change: Callable
) -> None:
    shutil.rmtree("scratch/a")
    spkd("cache", "pull", f"{web}/lab/a", "scratch/a").ok()
    change(spkd, corpus, "scratch/a")
    done = crowded()
    assert (done.code, "scratch/a: stays, since" in done.out) == (1, True), done.err
    assert {emptied_at_the_source: "changed in its header", noted_at_the_source: "noted as damaged"}[change] in done.out
    spkd("cache", "repair", "lab/a", "--from", "scratch/a").ok()
    spkd("cache", "verify", "lab/a").ok()
    assert "scratch/a: removed to make room" in crowded().out


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (emptied_at_the_source, "changed in its header"),
        (torn_at_the_source, "changed in its index"),
        (noted_at_the_source, "noted as damaged"),
        (extended, "it was extended here"),
        (put_aside, "thesis.tex is not at "),
        (lost_at_the_source, "frames/c/1/0 is not at "),
        (source_is_gone, "no complete teacher cache there"),
        (extracted_again, "commits/1.json is not at "),
        (source_is_the_copy, "COMPLETE.json at "),
        (shards_are_links, "fbank/c/0/0 at "),
        (said_as_it_was_typed, "does not say whence it comes"),
    ],
)
def test_what_may_be_the_only_copy_stays(
    spkd: Callable, corpus: Path, crowded: Callable, change: Callable, reason: str
) -> None:
    change(spkd, corpus, "scratch/a")
    before = {path: path.read_bytes() for path in Path("scratch/a").rglob("*") if path.is_file()}
    done = crowded()
    assert (done.code, "would exceed the limit" in done.err) == (1, True), done.err
    assert "scratch/a: stays, since it may be the only copy (" in done.out
    assert reason in done.out
    assert {path: path.read_bytes() for path in before} == before


def test_the_source_of_a_copy_is_noted_whole(spkd: Callable, corpus: Path) -> None:
    make_cache(spkd, corpus, "c")
    spkd("cache", "pull", "c", "copy").ok()
    assert json.loads(Path("copy/pulled.json").read_text())["from"] == str(Path("c").absolute())


def test_a_copy_that_is_being_changed_stays(
    spkd: Callable, corpus: Path, crowded: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever lets it grow, or fills a unit, at the moment when it would be removed."""
    copy = Path("scratch/a")
    with changing(copy):
        done = crowded()
    assert (done.code, "would exceed the limit" in done.err) == (1, True), done.err
    commit_path(copy, 1).unlink()
    assert claim(copy, 1)
    monkeypatch.setattr("spkd.files.atomic._identity.name", "another")  # another process, as far as claims go
    done = crowded()
    assert (done.code, "would exceed the limit" in done.err) == (1, True), done.err
    assert copy.is_dir()
    claim_path(copy, 1).unlink()
    assert "scratch/a: removed to make room" in crowded().out


@pytest.mark.parametrize(
    "address",
    ["reference::{web}/x", "zip://x::{web}/x", "ftp://{host}/x", "jupyter://{host}/x", "nosuch://x"],
)
def test_a_note_that_names_another_protocol_keeps_its_copy_alone(
    spkd: Callable, crowded: Callable, tmp_path: Path, address: str
) -> None:
    """Nothing is asked for, and the other copies make room."""
    Path("scratch/strange").mkdir()
    Busy.asked.clear()
    with served(tmp_path, Busy) as web:
        note = {"from": address.format(web=web, host=web.removeprefix("http://")), "fingerprint": "x"}
        Path("scratch/strange/pulled.json").write_text(json.dumps(note))
        os.utime("scratch/strange/pulled.json", (1, 1))
        done = crowded()
    assert done.code == 0, done.err
    assert "scratch/strange: stays, since it may be the only copy (pulled.json names an address of another" in done.out
    assert "scratch/a: removed to make room" in done.out
    assert not Busy.asked


def test_a_copy_whose_source_grew_makes_room(spkd: Callable, corpus: Path, crowded: Callable) -> None:
    make_cache(spkd, corpus, "lab/a")
    done = crowded()
    assert done.code == 0, done.err
    assert "scratch/a: removed to make room" in done.out
    assert not Path("scratch/a").exists()


def test_no_copy_goes_in_vain(spkd: Callable, corpus: Path, crowded: Callable, tmp_path: Path) -> None:
    """Not where one that stays keeps too much of the room, and not where none at all would suffice."""
    pull(str(tmp_path / "lab/a"), Path("scratch/stays"))
    reader = Cache.open("scratch/stays")
    done = crowded()
    assert (done.code, "removed" in done.out) == (1, False), done.err
    del reader
    done = spkd("cache", "pull", str(tmp_path / "lab/b"), "scratch/b", "--limit", "0.00001")
    assert (done.code, "removed" in done.out) == (1, False), done.err
    assert sorted(path.name for path in Path("scratch").iterdir()) == ["a", "stays"]
    done = crowded()
    assert (done.code, done.out.count("removed to make room")) == (0, 2), done.err
    assert [path.name for path in Path("scratch").iterdir()] == ["b"]


def test_two_pulls_do_not_remove_copies_of_each_other(
    spkd: Callable, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each copy is the source of the other, and the first one is removed while a slow server looks at the second."""
    make_cache(spkd, corpus, "lab/a")
    for source, copy in (("lab/a", "one/a"), ("one/a", "two/a"), ("lab/a", "two/b")):
        spkd("cache", "pull", source, copy).ok()
    Path("one/a/pulled.json").write_text(Path("two/a/pulled.json").read_text().replace("/one/a", "/two/a"))
    shutil.rmtree("lab")
    asked = []
    real = remote.completion_at

    def slow(place: RemoteFolder) -> tuple[CompletionRecord, bytes]:
        if not asked:
            asked.append(place.path)
            with pytest.raises(SpkdError, match="would exceed the limit"):
                remote.make_room(Path("two/b"), 1, 1)
        return real(place)

    monkeypatch.setattr(remote, "completion_at", slow)
    with contextlib.suppress(SpkdError):
        remote.make_room(Path("one/b"), 1, 1)
    assert asked == [str(tmp_path / "two/a")]
    assert sorted(str(path.parent) for path in Path().glob("*/a/COMPLETE.json")) == ["two/a"]


def test_what_a_kill_leaves_of_a_copy_that_is_being_removed_goes(
    spkd: Callable, crowded: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as killed:
        killed.setattr(shutil, "rmtree", lambda path, **_: Path(path, "pulled.json").unlink())
        crowded().ok()
    assert not Path("scratch/a").exists()
    assert len(list(Path("scratch").iterdir())) == 2
    spkd("cache", "pull", str(tmp_path / "lab/a"), "scratch/a").ok()
    assert sorted(path.name for path in Path("scratch").iterdir()) == ["a", "b"]


def test_room_is_counted_while_another_pull_removes_a_copy(tmp_path: Path) -> None:
    (tmp_path / "a/deep").mkdir(parents=True)
    for number in range(50):
        (tmp_path / f"a/deep/{number}").write_bytes(bytes(100))
    assert remote._bytes_under(tmp_path / "a") == 5000
    listed = list(os.walk(tmp_path / "a"))
    shutil.rmtree(tmp_path / "a/deep")
    with pytest.MonkeyPatch.context() as meanwhile:
        meanwhile.setattr(os, "walk", lambda _: listed)
        assert remote._bytes_under(tmp_path / "a") == 0


def test_a_pull_does_not_undo_what_was_extended_here(
    spkd: Callable, corpus: Path, crowded: Callable, tmp_path: Path
) -> None:
    again = ["cache", "pull", str(tmp_path / "lab/a"), "scratch/a"]
    spkd(*again).ok()
    make_cache(spkd, corpus, "scratch/a")
    done = spkd(*again)
    assert (done.code, "scratch/a: was extended here, which a pull would undo" in done.err) == (1, True), done.err
    assert len(Cache.open("scratch/a")) == 18
    spkd("cache", "push", "scratch/a", "lab/a").ok()
    spkd(*again).ok()


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


@pytest.mark.parametrize("name", ["COMPLETE.json", "plan/0.npz", "embedding/c/1/0"])
def test_a_file_that_never_ends_is_given_up(
    spkd: Callable, odd_web: str, corpus: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    make_cache(spkd, corpus, "c")
    monkeypatch.setattr(Odd, "endless", (name,))
    monkeypatch.setattr("spkd.files.remote_folder.LARGEST_RECORD", 1 << 20)
    done = spkd("cache", "pull", f"{odd_web}/c", "copy")
    assert (done.code, len(done.err.splitlines())) == (1, 1)
    assert "larger than" in done.err
    assert name in done.err
    assert sum(p.stat().st_size for p in Path("copy").rglob("*") if p.is_file()) < 1 << 22


@pytest.mark.slow
def test_a_slow_but_steady_server_is_not_cut_off(
    spkd: Callable, odd_web: str, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_cache(spkd, corpus, "c")
    monkeypatch.setattr(Odd, "slow", ("embedding/c/1/0", "plan/0.npz"))
    monkeypatch.setattr("spkd.files.remote_folder.SILENCE", 1.0)  # five pauses of 0.3 s are longer
    assert "all checksums match" in spkd("cache", "pull", f"{odd_web}/c", "copy").out


class Trickle(Quiet):
    """A server that gives single bytes without end, never silent for long: of the head of its answers, or of files."""

    within: ClassVar[bytes] = b""

    def do_GET(self) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.wfile.write(self.within)
            while True:
                self.wfile.write(b"x")
                time.sleep(0.05)


@pytest.mark.parametrize("within", [b"HTTP/1.0 200 OK\r\nX-A: ", b"HTTP/1.0 200 OK\r\n\r\n"], ids=["head", "file"])
def test_a_server_that_gives_a_byte_now_and_then_is_given_up(
    spkd: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, within: bytes
) -> None:
    monkeypatch.setattr(Trickle, "within", within)
    monkeypatch.setattr("spkd.files.remote_folder.WAIT", 0.001)
    monkeypatch.setattr("spkd.files.remote_folder.SILENCE", 0.2)
    with served(tmp_path, Trickle) as url:
        for command in (("pull", f"{url}/c", "copy"), ("ls", f"{url}/c")):
            done = spkd("cache", *command)
            assert (done.code, done.err.count("\n")) == (1, 1), done.err
            assert ("no answer within 0.2 s" if b"X-A" in within else "given up, since") in done.err
    assert not Path("copy").exists()


class Busy(Quiet):
    """A server that answers the first requests of every file with another status, and counts requests."""

    status: ClassVar[int] = 503
    times: ClassVar[int] = 2
    asked: ClassVar[Counter[str]] = Counter()

    def do_GET(self) -> None:
        self.asked[self.path] += 1
        if self.asked[self.path] <= self.times:
            return self.send_error(self.status)
        return super().do_GET()


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_busy_server_is_asked_again(
    spkd: Callable, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    make_cache(spkd, corpus, "c")
    monkeypatch.setattr(Busy, "status", status)
    monkeypatch.setattr(Busy, "asked", Counter())
    monkeypatch.setattr("spkd.files.remote_folder.WAIT", 0.001)
    with served(tmp_path, Busy) as url:
        done = spkd("cache", "pull", f"{url}/c", "copy")
    assert (done.code, "all checksums match" in done.out) == (0, True), done.err
    assert Busy.asked["/c/COMPLETE.json"] == 3


@pytest.mark.parametrize(("status", "tries"), [(503, 4), (403, 1), (401, 1), (451, 1)])
def test_the_status_of_a_server_is_said(
    spkd: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, tries: int
) -> None:
    monkeypatch.setattr(Busy, "status", status)
    monkeypatch.setattr(Busy, "times", 99)
    monkeypatch.setattr(Busy, "asked", Counter())
    monkeypatch.setattr("spkd.files.remote_folder.WAIT", 0.001)
    with served(tmp_path, Busy) as url:
        for command in (("pull", f"{url}/c", "copy"), ("ls", f"{url}/c"), ("import", f"{url}/c", "copy")):
            Busy.asked.clear()
            done = spkd("cache", *command)
            assert (done.code, done.err.count("\n")) == (1, 1)
            assert f"the server answers {status} {HTTPStatus(status).phrase}" in done.err
            assert set(Busy.asked.values()) == {tries}
    assert not Path("copy").exists()


class Circle(Quiet):
    """A server that sends every request elsewhere."""

    def do_GET(self) -> None:
        self.send_response(302)
        self.send_header("Location", f"{self.path}x")
        self.end_headers()


def test_redirections_without_end_are_named(spkd: Callable, tmp_path: Path) -> None:
    with served(tmp_path, Circle) as url:
        done = spkd("cache", "pull", f"{url}/c", "copy")
    assert (done.code, done.err) == (1, f"error: {url}/c/COMPLETE.json: too many redirects\n")


class Closed(Quiet):
    """A server that wants a token or a password with every request."""

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        passwords = ["Basic " + base64.b64encode(b"anna:" + word).decode() for word in (b"s3cret", b"s3 'cret\"s3cret")]
        if query != "token=s3cret&x=1" and self.headers["Authorization"] not in passwords:
            return self.send_error(403)
        self.path = path
        return super().do_GET()


@pytest.mark.parametrize(
    "way",
    [
        *("http://anna:s3cret@{host}/{path}", "http://anna:s3 'cret\"s3cret@{host}/{path}"),
        "http://{host}/{path}?token=s3cret&x=1",
    ],
)
def test_credentials_are_used_and_never_written(spkd: Callable, corpus: Path, tmp_path: Path, way: str) -> None:
    make_cache(spkd, corpus, "anna's lab/deep/c", "fbank=true")
    spkd("cache", "export", "anna's lab/deep/c", "tars").ok()
    said = []
    with served(tmp_path, Closed) as url:

        def address(path: str) -> str:
            return way.format(host=url.removeprefix("http://"), path=path)

        for command in (
            ("cache", "ls", address("anna's lab")),
            ("cache", "pull", address("anna's lab/deep/c"), "copy"),
            ("cache", "catalogue", address("anna's lab"), "--out", "page.html"),
            ("cache", "import", address("tars"), "imported"),
            ("cache", "repair", "copy", "--from", address("anna's lab/deep/c")),
            ("train", "--loss", "cosine", f"cache={address('tars')}", *SMALL, "out=run"),
        ):
            if "repair" in command:
                Path("copy/commits/0.json").unlink()
            done = spkd(*command).ok()
            said.append(done.out + done.err)
        assert "deep/c" in said[0]
        assert "1 cache" in said[2]
        for command in (
            ("cache", "pull", address("anna's lab/deep/none"), "none"),
            ("cache", "pull", address("anna's lab/deep/c").replace("s3cret", "s3cret2"), "none"),
            ("train", "--loss", "cosine", "cache=" + address("anna's lab/deep/c"), *SMALL, "out=none"),
            ("train", "--loss", "cosine", f"cache={address('tars')}", *SMALL, "out=run", "steps=none"),
            ("eval", f"calibration={address('x')}", "none.txt"),
        ):
            done = spkd(*command)
            assert done.code in (1, 2), done.out
            said.append(done.out + done.err)
    assert [text for text in said if "s3cret" in text] == []
    assert [path for path in tmp_path.rglob("*") if path.is_file() and b"s3cret" in path.read_bytes()] == []


class Endless(Quiet):
    """A server whose folders hold ever more folders, in pages that may have no end."""

    page: ClassVar[bytes] = b""

    def do_GET(self) -> None:
        if not self.path.endswith("/"):
            return self.send_error(404)
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.wfile.write(b"".join(b'<a href="%d/">' % number for number in range(10)))
            while self.page:
                self.wfile.write(self.page)
        return None


@pytest.mark.parametrize(("page", "reason"), [(b"", "more than 25 folders"), (b"<a " * 4096, "larger than the")])
def test_a_listing_without_end_is_given_up(
    spkd: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page: bytes, reason: str
) -> None:
    monkeypatch.setattr(Endless, "page", page)
    monkeypatch.setattr("spkd.cache.exchange.remote.MOST_FOLDERS", 25)
    with served(tmp_path, Endless) as url:
        for command in (("ls", f"{url}/lab"), ("catalogue", f"{url}/lab", "--out", "page.html")):
            done = spkd("cache", *command)
            assert (done.code, reason in done.err, done.err.count("\n")) == (1, True, 1), done.err


class Bucket(Quiet):
    """An endpoint for S3 that lists folders without end, or gives a byte of every file now and then."""

    protocol_version = "HTTP/1.1"
    token: ClassVar[str] = ""
    pages: ClassVar[int] = 0

    def do_HEAD(self) -> None:
        self.send_response(200)
        for name, value in (("Content-Length", "2000"), ("ETag", '"0"'), ("Last-Modified", self.date_time_string(0))):
            self.send_header(name, value)
        self.end_headers()

    def do_GET(self) -> None:
        if "list-type" not in self.path:
            self.do_HEAD()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                for _ in range(2000):
                    self.wfile.write(b"{")
                    self.wfile.flush()
                    time.sleep(0.1)
            return
        Bucket.pages += 1
        folders = "".join(
            f"<CommonPrefixes><Prefix>x/{self.pages}-{number}/</Prefix></CommonPrefixes>" for number in range(1000)
        )
        token = self.token.format(self.pages)
        page = (
            '<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>b</Name>'
            f"<IsTruncated>true</IsTruncated>{folders}<NextContinuationToken>{token}</NextContinuationToken>"
            "</ListBucketResult>"
        ).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)


@pytest.mark.parametrize(("token", "reason", "pages"), [("t{}", "more than 2,500 entries", 3), ("t", "without end", 2)])
def test_a_listing_of_a_bucket_without_end_is_given_up(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str, reason: str, pages: int
) -> None:
    monkeypatch.setattr(Bucket, "token", token)
    monkeypatch.setattr(Bucket, "pages", 0)
    monkeypatch.setattr("spkd.files.remote_folder.MOST_ENTRIES", 2500)
    with served(tmp_path, Bucket) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        files = fsspec.filesystem("s3", endpoint_url=url, skip_instance_cache=True)
        with pytest.raises(SpkdError, match=f"s3://b/x: .*{reason}"):
            RemoteFolder("s3://b/x", files, "b/x").entries()
    assert Bucket.pages == pages


def test_a_bucket_that_gives_a_byte_now_and_then_is_given_up(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spkd.files.remote_folder.SILENCE", 0.5)
    monkeypatch.setattr("spkd.files.remote_folder.SLOWEST", 4000.0)
    with served(tmp_path, Bucket) as url:
        files = fsspec.filesystem("s3", endpoint_url=url, skip_instance_cache=True)
        with pytest.raises(SpkdError, match=r"s3://b/x/COMPLETE.json: given up, since there was no whole answer"):
            RemoteFolder("s3://b/x", files, "b/x").read("COMPLETE.json", 1 << 20)


@pytest.mark.slow
def test_two_pushes_into_one_bucket_never_say_that_a_mixture_is_whole(
    spkd: Callable, s3: str, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_cache(spkd, corpus, "c")
    make_cache(spkd, corpus, "d", "view.seed=1", "view=crops:1,0.7")
    files, url = fsspec.filesystem("s3"), f"{s3}/both"
    put, begun = files.put_file, list[str]()

    def meanwhile(source: str, path: str) -> None:
        """As if another command had looked at the place before, and sent its files now."""
        if not begun:
            begun.append(path)
            push(Path("d"), url)
        put(source, path)
        if path.endswith("late/COMPLETE.json"):
            put("d/plan/0.npz", "lab/late/plan/0.npz")

    monkeypatch.setattr(files, "put_file", meanwhile)
    first = spkd("cache", "push", "c", url)
    assert (first.code, "would be replaced" in first.err, begun) == (2, True, ["lab/both/card.json"]), first.err
    spkd("cache", "pull", url, "copy").ok()
    assert same(Path("d"), Path("copy"))
    last = spkd("cache", "push", "c", f"{s3}/late")
    message = "another push at the same time replaced 1 file (the first: plan/0.npz); the record there is that of this"
    assert (last.code, message in last.err) == (1, True), last.err
    monkeypatch.undo()


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


@pytest.mark.parametrize("command", [["pull", "c", "{}"], ["push", "c", "{}"], ["import", "c.h5", "{}"]])
@pytest.mark.parametrize("kilobytes", [32, pytest.param(128, marks=pytest.mark.slow)])
def test_a_full_disk_is_named(spkd: Callable, corpus: Path, command: list[str], kilobytes: int) -> None:
    make_cache(spkd, corpus, "c")
    spkd("cache", "export", "c", "c.h5").ok()
    Path("small").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", "small"]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        before = time.monotonic()
        done = spkd("cache", *(part.format("small/copy") for part in command))
        assert time.monotonic() - before < 30  # without the pauses after which another attempt would fail too
        assert (done.code, len(done.err.splitlines())) == (1, 1), done.err
        assert re.match(r"error: (\S*/)?small/copy\S*: the disk is full; everything committed stays", done.err), (
            done.err
        )
        subprocess.run(["mount", "-o", "remount,size=8m", "small"], check=True)
        spkd("cache", *(part.format("small/copy") for part in command)).ok()
        assert "all checksums match" in spkd("cache", "verify", "small/copy").out
        assert not list(Path("small").rglob("*.part"))
    finally:
        subprocess.run(["umount", "small"], check=True)


@pytest.mark.parametrize("name", ["a::b", "memory::x", "~", "data:,x"])
def test_a_folder_here_has_any_name(spkd: Callable, corpus: Path, name: str) -> None:
    make_cache(spkd, corpus, "c")
    spkd("cache", "push", "c", f"r/{name}").ok()
    assert sorted(path.name for path in Path("r").iterdir()) == [name]
    Path("r", name).rename(name)
    spkd("cache", "pull", name, "copy").ok()
    assert "all checksums match" in spkd("cache", "verify", "copy").out


@pytest.mark.parametrize("url", ["x::file:///tmp/x", "memory://x", "memory::s3://b/x", "nosuch://x", "s3:/b/x"])
def test_what_is_no_place_is_refused(spkd: Callable, corpus: Path, url: str) -> None:
    make_cache(spkd, corpus, "c")
    before = sorted(Path().iterdir())
    done = spkd("cache", "push", "c", url)
    assert (done.code, len(done.err.splitlines())) == (2, 1), done.err
    assert sorted(Path().iterdir()) == before


def test_a_pull_removes_what_kills_left_of_it(spkd: Callable, corpus: Path) -> None:
    make_cache(spkd, corpus, "c")
    spkd("cache", "pull", "c", "copy").ok()
    shard = Path("copy/embedding/c/1/0")
    shard.unlink()
    names = ("COMPLETE.json", "zarr.json", "commits/0.json", "plan/0.npz", "embedding/zarr.json")
    ours = [*(Path("copy", name) for name in names), shard]
    left = [path.with_name(f"{path.name}.{machine_id()}0123456789.part") for path in ours]
    for path in (*left, Path("copy/notes.part")):
        path.write_text("half")
    spkd("cache", "pull", "c", "copy").ok()
    assert [path for path in left if path.exists()] == []
    assert Path("copy/notes.part").exists()
    assert "all checksums match" in spkd("cache", "verify", "copy").out
