from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from spkd.errors import SpkdError
from spkd.files import atomic


def test_exactly_one_of_several_creates(tmp_path: Path) -> None:
    assert atomic.create_bytes(tmp_path / "x", b"first")
    assert not atomic.create_bytes(tmp_path / "x", b"second")
    assert (tmp_path / "x").read_bytes() == b"first"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_creating_works_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    test_exactly_one_of_several_creates(tmp_path)


def test_writing_works_where_folders_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def refuse(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    atomic.write_bytes(tmp_path / "x", b"abc")
    assert (tmp_path / "x").read_bytes() == b"abc"


def test_a_full_disk_names_the_file_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    atomic.write_bytes(tmp_path / "x", b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        atomic.write_bytes(tmp_path / "x", b"new")
    assert caught.value.filename == str(tmp_path / "x")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_bytes() == b"old"


def test_every_process_has_a_name_of_its_own() -> None:
    script = (
        "import os\nfrom spkd.files.atomic import worker_id\nprint(worker_id(), flush=True)\n"
        "pid = os.fork()\nif pid == 0:\n    print(worker_id(), flush=True)\n    os._exit(0)\nos.waitpid(pid, 0)\n"
    )
    runs = [subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True) for _ in "ab"]
    names = [name for run in runs for name in run.stdout.split()]
    assert len(set(names)) == len(names) == 4


@pytest.mark.parametrize("data", [b"{", b"\xff\xfe", b"[" * 200_000, b"9" * 5000, b"[" * 70 + b"]" * 70], ids=range(5))
def test_json_that_cannot_be_read_is_a_line(data: bytes) -> None:
    with pytest.raises(SpkdError, match=r"^there: damaged") as caught:
        atomic.parse_json(data, "there")
    assert len(str(caught.value)) < 400
    assert atomic.parse_json(b'{"a": [1]}', "there") == {"a": [1]}


def test_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "card.json")
    with pytest.raises(SpkdError, match="not a regular file"):
        atomic.read_json(tmp_path / "card.json")
