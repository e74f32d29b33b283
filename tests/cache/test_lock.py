"""Locks of real processes against one another, where flock works, needs a file open for writing, or is missing."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from spkd.cache import lock
from spkd.cache.lock import exclusive
from spkd.errors import SpkdError
from tests import processes

local = fcntl.flock


def nfs(file, operation: int) -> None:  # type: ignore[no-untyped-def]
    """flock as on NFS, which locks a file against others only where it is open for writing."""
    mode = fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE
    if operation & fcntl.LOCK_EX and mode == os.O_RDONLY:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    local(file, operation)


def missing(file, operation: int) -> None:  # type: ignore[no-untyped-def]
    """flock as on NFS without its lock service."""
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def on_one_machine(file, operation: int) -> None:  # type: ignore[no-untyped-def]
    """flock as between machines that mount with local_lock or localflock."""


FLOCK = {"local": local, "nfs": nfs, "missing": missing, "on_one_machine": on_one_machine}


def count(path: Path, file_system: str, times: int) -> None:
    """Add to the number in a file, slowly."""
    fcntl.flock = FLOCK[file_system]
    for _ in range(times):
        with exclusive(path):
            number = int(path.read_text())
            time.sleep(0.002)
            path.write_text(str(number + 1))


def hold(path: Path, file_system: str) -> None:
    """Hold a lock until the process is killed."""
    fcntl.flock = FLOCK[file_system]
    with exclusive(path):
        print("held", flush=True)
        time.sleep(60)


@pytest.mark.parametrize("file_system", FLOCK)
def test_one_process_at_a_time_holds_a_lock(tmp_path: Path, file_system: str) -> None:
    path = tmp_path / "number"
    path.write_text("0")
    counting = [processes.Running(count, path, file_system, 5) for _ in range(3)]
    errors = [process.communicate()[1] for process in counting]
    assert path.read_text() == "15", errors
    assert [p.name for p in tmp_path.iterdir()] == ["number"]


@pytest.mark.parametrize("file_system", FLOCK)
def test_the_lock_of_a_killed_process_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_system: str
) -> None:
    path = tmp_path / "file"
    path.touch()
    holding = processes.Running(hold, path, file_system)
    while not holding.printed():
        time.sleep(0.001)
    monkeypatch.setattr(fcntl, "flock", FLOCK[file_system])
    with exclusive(path, wait=False) as locked:
        assert not locked
    holding.kill()
    with exclusive(path, wait=False) as locked:
        assert locked
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_link_in_the_place_of_the_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    (tmp_path / "file").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic links"), exclusive(tmp_path / "file"):
        pass
    assert (tmp_path / "precious").read_text() == "x"


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_regular_file_is_named(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "growth")
    with pytest.raises(SpkdError, match="/growth: not a regular file"), exclusive(tmp_path / "growth"):
        pass


def test_a_pipe_in_the_place_of_the_note_of_a_pull_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pulled.json")
    running = processes.Running(lock.hold, tmp_path)
    _, err = running.communicate(60)
    assert running.returncode == 0, err
