"""Copies of shards elsewhere below a total size."""

# ruff: noqa: F811  # fixtures of another file

from __future__ import annotations

import multiprocessing
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from spkd.corpus import fetched, remote, rows, stored
from spkd.corpus.fetched import Copies
from spkd.corpus.kept import Kept
from spkd.corpus.local import Opened
from spkd.files.vectors import read_vectors
from spkd.students import Checkpoint, build, save_student
from tests.corpus.test_remote import Ranges, shard, web  # noqa: F401

Web = tuple[str, type[Ranges]]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is copied before or after a test, and no copy stays open."""
    monkeypatch.setattr(fetched, "_open", Kept(0, lambda _: 1))
    fetched.use(None)
    yield
    fetched.use(None)


def contents(folder: Path, count: int, size: int = 10_000) -> list[bytes]:
    made = [random.Random(number).randbytes(size) for number in range(count)]
    for number, content in enumerate(made):
        (folder / f"{number}.bin").write_bytes(content)
    return made


def copied(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.copy"))


def test_copies_stay_below_the_limit_and_the_last_ones_stay(web: Web, tmp_path: Path) -> None:
    made, folder = contents(tmp_path / "web", 5), tmp_path / "copies"
    folder.mkdir()
    (folder / "mine.copy").write_bytes(bytes(50_000))
    fetched.use(Copies(folder, 30_500))
    for number in (0, 1, 2, 0, 3):
        os.utime(folder, (0, 0))
        file = fetched.opened_or_copied(f"{web[0]}/{number}.bin")
        assert isinstance(file, Opened)
        assert file.read(0, file.size) == made[number]
        del file
        fetched._open = Kept(0, lambda _: 1)
        assert copied(folder) - 50_000 <= 30_500
    web[1].asked.clear()
    for number, requests in ((0, 0), (2, 0), (3, 0), (1, 1)):  # 1 was used longest ago
        assert fetched.opened_or_copied(f"{web[0]}/{number}.bin").read(7, 9) == made[number][7:16]
        assert len(web[1].asked) == requests
    assert (folder / "mine.copy").stat().st_size == 50_000  # what others put there stays


def test_what_is_read_is_not_removed(web: Web, tmp_path: Path) -> None:
    made = contents(tmp_path / "web", 3)
    fetched.use(Copies(tmp_path, 15_000))
    first = fetched.opened_or_copied(f"{web[0]}/0.bin")
    second = fetched.opened_or_copied(f"{web[0]}/1.bin")
    assert isinstance(first, Opened)
    assert isinstance(second, remote.Remote)  # there is no room while the first is read
    assert second.read(0, 100) == made[1][:100]
    assert first.read(0, 10_000) == made[0]
    fetched.use(Copies(tmp_path, 9_000))
    assert isinstance(fetched.opened_or_copied(f"{web[0]}/2.bin"), remote.Remote)  # larger than the limit


def test_a_file_that_changed_is_fetched_again(web: Web, tmp_path: Path) -> None:
    fetched.use(Copies(tmp_path, 100_000))
    for seed in (1, 2):
        content = random.Random(seed).randbytes(10_000)
        (tmp_path / "web" / "0.bin").write_bytes(content)
        remote._opened.cache_clear()
        assert fetched.opened_or_copied(f"{web[0]}/0.bin").read(0, 10_000) == content


def test_what_was_cut_off_is_no_copy(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = contents(tmp_path / "web", 1)
    monkeypatch.setattr("spkd.files.remote_folder.WAIT", 0.0)
    fetched.use(Copies(tmp_path, 100_000))
    url = f"{web[0]}/0.bin"
    remote.opened(url)
    web[1].cut = True
    with pytest.raises(OSError, match="0.bin|bytes came|closed|payload|not complete"):
        fetched.opened_or_copied(url)
    assert not list(tmp_path.glob("*.copy*"))
    web[1].cut = False
    assert fetched.opened_or_copied(url).read(0, 10_000) == made[0]


READER = """
import sys
from pathlib import Path
from spkd.corpus import fetched
fetched.use(fetched.Copies(Path(sys.argv[1]), 25_000))
total = 0
for turn in range(2):
    for url in sys.argv[2:]:
        file = fetched.opened_or_copied(url)
        total += sum(file.read(0, file.size))
print(total)
"""


def test_processes_and_threads_share_the_copies(web: Web, tmp_path: Path) -> None:
    made = contents(tmp_path / "web", 2)
    urls = [f"{web[0]}/{number}.bin" for number in range(2)]
    command = [sys.executable, "-c", READER, str(tmp_path), *urls]
    with ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(lambda _: subprocess.check_output(command, text=True), range(2)))
    assert [int(printed) for printed in outputs] == [2 * sum(map(sum, made))] * 2
    whole = [asked for asked in web[1].asked if asked[1] > 1]
    assert len(whole) == 2  # each file was fetched by one of them
    fetched.use(Copies(tmp_path, 25_000))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: fetched.opened_or_copied(urls[n % 2]).read(5, 50), range(40)))
    assert found == [made[n % 2][5:55] for n in range(40)]
    assert len([asked for asked in web[1].asked if asked[1] > 1]) == 2


def test_room_that_others_are_filling_is_taken(web: Web, tmp_path: Path) -> None:
    contents(tmp_path / "web", 1)
    copies = Copies(tmp_path, 15_000)
    part = copies._room(tmp_path / f"{'0' * 32}.copy", 10_000)
    assert part is not None
    fetched.use(copies)
    assert isinstance(fetched.opened_or_copied(f"{web[0]}/0.bin"), remote.Remote)
    part.abandon()
    fetched._open = Kept(0, lambda _: 1)
    assert isinstance(fetched.opened_or_copied(f"{web[0]}/0.bin"), Opened)


@pytest.mark.parametrize("place", ["web", "s3"])
def test_embeddings_are_those_without_copies(
    web: Web,
    spkd: Callable,
    tmp_path: Path,
    s3: str,
    place: str,
) -> None:
    import fsspec

    places, base = shard(tmp_path / "web" / "s.tar"), web[0]
    if place == "s3":
        base = f"{s3}/{tmp_path.name}"
        fsspec.filesystem("s3").put(str(tmp_path / "web" / "s.tar"), f"{base}/s.tar")
    rows = [f"{n},{base}/s.tar#{offset}+{length}.flac\n" for n, (offset, length, _) in enumerate(places)]
    Path("m.csv").write_text("utt,path\n" + "".join(rows))
    save_student("student", Checkpoint(build("tiny", channels=8, embedding=4)))
    vectors = []
    for out, keys in {"a.npy": [], "b.npy": ["fetch.cache=copies"], "c.npy": ["fetch.cache=copies"]}.items():
        web[1].asked.clear()
        spkd("embed", "m.csv", "model=student", f"out={out}", *keys).ok()
        fetched.use(None)
        vectors.append(np.stack([vector for _, vector in read_vectors(Path(out))]).tobytes())
    assert len(set(vectors)) == 1
    assert copied(Path("copies")) == (tmp_path / "web" / "s.tar").stat().st_size
    assert all(count == 1 for _, count in web[1].asked)  # but for the state, nothing is asked for again
    Path("here.csv").write_text("utt,path\na,0.wav\n")
    for name, key, expected in (
        ("here.csv", "fetch.cache=copies", "no path in here.csv is a URL, or in a table"),
        ("m.csv", "fetch.limit=3", "no fetch.cache is set"),
        ("m.csv", "fetch.cache=s3://a/b", "an address"),
    ):
        done = spkd("embed", name, "model=student", "out=d.npy", key)
        assert (done.code, expected in done.err) == (2, True), done.err


def test_copies_are_read_where_a_cache_is_compared_or_exported_with_its_audio(
    web: tuple[str, type[Ranges]], tmp_path: Path, spkd: Callable
) -> None:
    places = shard(tmp_path / "web" / "s.tar")
    rows = [f"{n},{web[0]}/s.tar#{offset}+{length}.flac\n" for n, (offset, length, _) in enumerate(places)]
    Path("m.csv").write_text("utt,path\n" + "".join(rows))
    keys = ["manifest=m.csv", "fetch.cache=copies"]
    spkd("extract", "teacher=none", "fbank=true", "cache=c", *keys).ok()
    fetched.use(None)
    for words in (["verify", "c", "--live", "4", "teacher=none"], ["export", "c", "tars", "--audio"]):
        remote._opened.cache_clear()
        web[1].asked.clear()
        spkd("cache", *words, *keys).ok()
        fetched.use(None)
        assert all(count == 1 for _, count in web[1].asked)  # but for the state, nothing is asked for again
        assert "fetch.limit" in spkd("cache", *words, "manifest=m.csv", "fetch.limit=3").err
    assert copied(Path("copies")) == (tmp_path / "web" / "s.tar").stat().st_size


def test_tables_are_decompressed_once_in_any_order(
    tmp_path: Path, spkd: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    cells = [content for _, _, content in shard(tmp_path / "s.tar", 6)]
    table = pyarrow.table({"audio": [*({"bytes": content, "path": "a.flac"} for content in cells), None]})
    parquet.write_table(table, "a.parquet", row_group_size=2)
    read, original = list[int](), rows.Table.read
    monkeypatch.setattr(rows.Table, "read", lambda s, group, columns: read.append(group) or original(s, group, columns))
    monkeypatch.setattr(rows, "_groups", Kept(1, lambda values: values.nbytes))  # room for one
    monkeypatch.setattr(rows, "_copied", Kept(1, lambda _: 1))
    fetched.use(Copies(tmp_path, 10**9))
    for place in [0, 2, 4, 1, 3, 5] * 2:
        assert stored.content(f"a.parquet#{place}+0.flac.row") == cells[place]
    assert sorted(read) == [0, 1, 2]
    with pytest.raises(ValueError, match="no audio in this row"):
        stored.content("a.parquet#6+0.flac.row")
    (tmp_path / "none").mkdir()
    fetched.use(Copies(tmp_path / "none", 100))  # no room: as without copies
    assert stored.content("a.parquet#3+0.flac.row") == cells[3]
    table = pyarrow.table({"audio": [{"bytes": content, "path": "a.flac"} for content in cells[::-1]]})
    parquet.write_table(table, "a.parquet", row_group_size=2)
    fetched.use(Copies(tmp_path, 10**9))
    assert stored.content("a.parquet#0+0.flac.row") == cells[5]  # of the file as it is now
    spkd("manifest", "a.parquet", "--out", "m.csv").ok()
    save_student("student", Checkpoint(build("tiny", channels=8, embedding=4)))
    for out, keys in {"a.npy": [], "b.npy": ["fetch.cache=copies"]}.items():
        spkd("embed", "m.csv", "model=student", f"out={out}", *keys).ok()
        fetched.use(None)
    assert Path("a.npy").read_bytes() == Path("b.npy").read_bytes()
    assert len(list(Path("copies").glob("*.copy"))) == 3


def test_spawned_loaders_have_the_folder(tmp_path: Path) -> None:
    from spkd.corpus.loader import ViewLoader
    from spkd.corpus.manifest import Manifest
    from spkd.corpus.settings import ViewConfig
    from spkd.corpus.view import ViewPlan

    fetched.use(Copies(tmp_path, 5))
    plan = ViewPlan.parse(ViewConfig())
    loader = ViewLoader(Manifest(()), plan.views(Manifest(())), plan)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_copies_with, (loader,)) == Copies(tmp_path, 5)


def _copies_with(_: object) -> Copies | None:
    return fetched.copies()
