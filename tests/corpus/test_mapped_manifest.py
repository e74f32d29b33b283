"""Large manifests by their mapped files, against the module csv and against what is parsed."""

from __future__ import annotations

import csv
import mmap
import os
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spkd.corpus import mapped_manifest
from spkd.corpus.manifest import Manifest
from spkd.errors import SpkdError
from tests.conftest import CommandLine
from tests.processes import Running

from .test_manifest import write_audio

FIELDS = ["utt", "path", "speaker", "duration", "start", "channel", "gender"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of the mapped files, which small manifests have here, too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(mapped_manifest, "LEAST", 0)
    return tmp_path / "cache/spkd/manifests"


def rows_of(count: int) -> list[dict[str, str]]:
    random = np.random.RandomState(count)
    return [
        {
            "utt": f'ü"{n},{random.randint(10**6)}',
            "path": f"{n // 7}/a b/{n}.wav",
            "speaker": ["", "ann", "ß b", "unk"][random.randint(4)],
            "duration": ["", f"{random.rand() * 9:.4f}"][random.randint(2)],
            "start": f"{random.randint(50) / 8}",
            "channel": ["", "0", "1"][random.randint(3)],
            "gender": ["", "f", "m"][random.randint(3)],
        }
        for n in range(count)
    ]


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_files_that_nobody_uses_any_more_are_removed(tmp_path: Path, cache: Path) -> None:
    kept, left = (write(tmp_path / f"{name}.csv", rows_of(20)) for name in "ab")
    for path in (kept, left):
        Manifest.load(path)
    before = sorted(cache.iterdir())
    assert len(before) == 2
    Manifest.load(kept)
    for path in before:
        os.utime(path, (time.time() - 89 * 86_400, 0))
    (cache / "folder").mkdir()
    Manifest.load(write(tmp_path / "c.csv", rows_of(3)))
    assert len(list(cache.iterdir())) == 4
    old = before[0]
    os.utime(old, (time.time() - 91 * 86_400, 0))
    Manifest.load(write(tmp_path / "d.csv", rows_of(4)))
    assert (old.exists(), len(list(cache.iterdir()))) == (False, 4)


def expected(path: Path) -> Iterator[tuple[Any, ...]]:
    """Fields of each utterance, by the module csv."""
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            yield (
                row["utt"],
                f"{path.parent}/{row['path']}",
                row["speaker"] or None,
                float(row["duration"]) if row["duration"] else None,
                float(row["start"]),
                int(row["channel"]) if row["channel"] else None,
                row["gender"],
            )


def fields(manifest: Manifest) -> list[tuple[Any, ...]]:
    return [(u.id, u.path, u.speaker, u.duration, u.start, u.channel, u.attribute("gender")) for u in manifest]


def is_mapped(manifest: Manifest) -> bool:
    base: Any = manifest.utterances.duration
    while isinstance(base, np.ndarray):
        base = base.base
    return isinstance(base, memoryview | mmap.mmap)


def test_it_is_parsed_once(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "m.csv", rows_of(300))
    first, printed = Manifest.load(path, ["gender"]), capsys.readouterr().out
    (file,) = cache.iterdir()
    made = file.stat().st_mtime_ns
    again = Manifest.load(path, ["gender"])
    assert is_mapped(first)
    assert is_mapped(again)
    assert file.stat().st_mtime_ns == made
    assert fields(again) == fields(first) == list(expected(path))
    assert [again.index_of[u.id] for u in again] == list(range(300))
    assert "none" not in again.index_of
    assert (again.digest, again.notes) == (first.digest, first.notes)
    assert again.digest == Manifest(list(again)).digest
    assert "a speaker named 'unk'" in printed
    assert capsys.readouterr().out == printed
    # Parts of it, as commands take them.
    odd = np.arange(300) % 2 == 1
    assert fields(again.take(odd)) == fields(first)[1::2]
    picked = again.pick([first.ids[7], first.ids[3]])
    assert picked is not None
    assert fields(picked) == [fields(first)[7], fields(first)[3]]
    # Other columns, and another spelling of its path, are of files of their own.
    assert Manifest.load(path)[0].attributes == ()
    monkey = os.path.relpath(path)
    assert Manifest.load(monkey)[0].path == os.path.relpath(first[0].path)
    assert len(list(cache.iterdir())) == 3


def test_a_changed_manifest_is_read_anew(tmp_path: Path, cache: Path) -> None:
    path, rows = tmp_path / "m.csv", rows_of(50)
    Manifest.load(write(path, rows))
    before = path.stat()
    rows[3]["utt"] = rows[3]["utt"][::-1]
    write(path, rows)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # of the same size and time
    assert path.stat().st_size == before.st_size
    assert Manifest.load(path).ids[3] == rows[3]["utt"]
    assert len(list(cache.iterdir())) == 1
    rows[4]["utt"] = rows[3]["utt"]
    with pytest.raises(SpkdError, match="duplicate utterance id"):
        Manifest.load(write(path, rows))


def test_a_damaged_file_is_written_anew(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "m.csv", rows_of(40))
    good = fields(Manifest.load(path))
    (file,) = cache.iterdir()
    data = file.read_bytes()
    random = np.random.RandomState(0)
    for place in [0, 9, 4095, 4096, len(data) - 1, *random.randint(0, len(data), 20)]:
        file.write_bytes(data[:place] + bytes([data[place] ^ 1 << random.randint(8)]) + data[place + 1 :])
        assert fields(Manifest.load(path)) == good
        assert file.read_bytes() == data
    for size in (0, 100, 5000, len(data) - 1):
        file.write_bytes(data[:size])
        assert fields(Manifest.load(path)) == good
    assert file.read_bytes() == data


def test_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "m.csv", rows_of(40))
    (tmp_path / "file").write_text("")
    for base in (tmp_path / "file", tmp_path / "link"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(base))
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        if base.name == "link":
            (base / "spkd").mkdir(parents=True)
            (base / "spkd/manifests").symlink_to(tmp_path / "elsewhere")
        for _ in range(2):
            assert len(Manifest.load(path)) == 40
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_container_that_changed_since(spkd: CommandLine, tmp_path: Path, cache: Path) -> None:
    write_audio(tmp_path / "a.wav")
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        tar.add(tmp_path / "a.wav", "a.wav")
    spkd("manifest", "0.tar", "--out", "m.csv").ok()
    for _ in range(2):
        assert len(Manifest.load(tmp_path / "m.csv")) == 1
    assert len(list(cache.iterdir())) == 1
    os.utime(tmp_path / "0.tar", (1, 1))
    with pytest.raises(SpkdError, match=r"m.csv:2: .*0.tar has changed since it was indexed"):
        Manifest.load(tmp_path / "m.csv")


def load(path: Path) -> None:
    mapped_manifest.LEAST = 0
    print(Manifest.load(path).digest)


def test_processes_at_once(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "m.csv", [{**row, "speaker": "s"} for row in rows_of(3000)])
    for _ in range(2):  # to write it, and to read it
        running = [Running(load, path) for _ in range(4)]
        assert len({process.communicate() for process in running}) == 1
        assert [process.returncode for process in running] == [0] * 4
    assert len(list(cache.iterdir())) == 1
