"""Owners of claims and locks: processes on any machine, each known by a file that it keeps alive.

The file names host, process, and a random identity, because host names and process numbers repeat among containers. The
owner updates the file's time while it works. Ages are differences between times that the file system gave: the clocks
of the machines may be anything.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from spkd.errors import SpkdError
from spkd.files.atomic import part_path, without_links, worker_id
from spkd.files.reading import read_json
from spkd.files.text import utc

HEARTBEAT = 30.0  # s between two signs that an owner is alive
STALE = 300.0  # s without a heartbeat after which an owner is taken for gone
PROCESSES = Path("/proc")  # folder in which the system lists the processes
TORN = 5.0  # s after which a file without an owner's name is taken for one that a kill left


def this_process() -> dict[str, Any]:
    """This process, as the owner that a file names."""
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}
    since = utc()
    return owner | {"namespace": _namespace(), "worker": worker_id(), "since": since}


def owner_of(path: Path) -> dict[str, Any] | None:
    """The owner that a file names; None where it is missing or torn."""
    try:
        owner = read_json(path)
    except (OSError, SpkdError):
        return None
    return owner if isinstance(owner, dict) else None


def in_words(owner: dict[str, Any]) -> str:
    """Phrase that names an owner: process, machine and time (UTC, by that machine's clock)."""
    return f"process {owner.get('pid')} on {owner.get('host')} ({owner.get('since')})"


def is_owned(path: Path) -> bool:
    """Whether this process owns a file; a process that was stopped for long may have lost it."""
    owner = owner_of(path)
    return owner is not None and owner.get("worker") == worker_id()


def heartbeat(path: Path) -> None:
    """Update the time of a file, to show that its owner is alive.

    It is written to, since some file systems take the time of `utime` from this machine.
    """
    try:
        with open(path, "r+b", opener=without_links) as file:
            first = file.read(1)
            file.seek(0)
            file.write(first)
    except FileNotFoundError:  # taken over meanwhile: its owner will find out
        return


@contextlib.contextmanager
def kept_alive(paths: Callable[[], Iterable[Path]], longest: float = math.inf) -> Iterator[Callable[[], None]]:
    """Keep files of this process alive while the block runs, whatever it waits for or computes.

    Args:
        paths: function that gives the files, asked at every heartbeat; those that others own by now are left alone.
        longest: time without progress (s) after which the process is taken for stuck, and its files for others to take.
    Yields:
        Function to call at every progress.
    """
    progress, ended = [time.monotonic()], threading.Event()

    def beat() -> None:
        while not ended.wait(HEARTBEAT):
            for path in paths() if time.monotonic() - progress[0] < longest else ():
                with contextlib.suppress(OSError):
                    if is_owned(path):
                        heartbeat(path)

    threading.Thread(target=beat, daemon=True).start()
    try:
        yield lambda: progress.__setitem__(0, time.monotonic())
    finally:
        ended.set()


def is_gone(path: Path) -> bool:
    """Whether a file's owner is gone: its process on this host, or its heartbeat on another."""
    try:
        silent = silence(path)
    except FileNotFoundError:
        return True
    if abs(silent) > STALE:  # a time far ahead was not given by this file system
        return True
    if _is_hidden(path):  # its heartbeat alone decides
        return False
    owner = owner_of(path)
    if owner is None:  # torn by a kill or a power cut; a live owner would have filled it by now
        return silent > TORN
    if owner.get("worker") == worker_id():
        return True  # left by an earlier run in this very process
    if (owner.get("host"), owner.get("namespace")) != (socket.gethostname(), _namespace()):
        return False
    try:
        return not _is_running(int(owner["pid"]), owner.get("started"))
    except (KeyError, TypeError, ValueError, OverflowError):
        return True


def _is_hidden(path: Path) -> bool:
    """Whether a file is of another user, whose files nobody else can read (umask 077)."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
    except OSError as error:
        return isinstance(error, PermissionError)
    return False


def silence(path: Path) -> float:
    """Time since the last change of a file (s), by the clock of its file system, which a new file next to it shows.

    Raises:
        FileNotFoundError: there is no such file.
    """
    probe = part_path(path)
    with open(probe, "xb") as file:
        probe.unlink(missing_ok=True)
        return os.fstat(file.fileno()).st_mtime - path.stat().st_mtime


def _is_running(pid: int, started: Any) -> bool:
    """Whether a process of this machine runs, or may run, where the system hides when a living one was started."""
    try:
        os.kill(pid, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        pass
    return _started(pid) in (started, None)


def _started(pid: int) -> str | None:
    """Start time of a process of this machine, in the system's clock ticks.

    It distinguishes a process from a later one with the same number. None where there is no such process, or it is of
    another user and hidden (hidepid of proc(5), as on login nodes).
    """
    try:
        return (PROCESSES / str(pid) / "stat").read_bytes().rpartition(b")")[2].split()[19].decode()
    except (OSError, IndexError):
        return None


def _namespace() -> str:
    """Identity of the space in which process numbers are unique: boot of the machine and namespace of its processes.

    Two containers with the same host name have different ones. Where the system gives none, heartbeats alone decide.
    """
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return worker_id()
