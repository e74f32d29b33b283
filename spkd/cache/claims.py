"""Claims of workers on units, by which any number of workers on any machines fill one cache.

A claim is a file that names its owner: host, process, and a random identity, because host names and process numbers
repeat among containers. The owner updates the file's time while it works.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spkd.cache.folder import claim_path, commit_path
from spkd.errors import SpkdError
from spkd.files.atomic import create_json, read_bytes, worker_id

STALE = 300.0  # s without a heartbeat after which a claim is taken over
AHEAD = 60.0  # s by which another machine's clock may run ahead


def claim_units(root: Path, units: int) -> Iterator[int]:
    """Units that are not committed. Each is claimed for this process before it is yielded, until `release`."""
    for unit in range(units):
        if claim(root, unit):
            yield unit


def claim(root: Path, unit: int) -> bool:
    """Claim a unit for this process, until `release`.

    Returns:
        Whether this process is to fill the unit.
    """
    if commit_path(root, unit).is_file() or not _claim(claim_path(root, unit)):
        return False
    if commit_path(root, unit).is_file():
        release(root, unit)
        return False
    return True


def owns(root: Path, unit: int) -> bool:
    """Whether this process holds the claim; a process that was stopped for long may have lost it."""
    owner = _owner(claim_path(root, unit))
    return owner is not None and owner.get("worker") == worker_id()


def release(root: Path, unit: int) -> None:
    """Remove a claim, if this process holds it."""
    if owns(root, unit):
        claim_path(root, unit).unlink(missing_ok=True)


def heartbeat(root: Path, unit: int) -> None:
    """Update the time of a claim, to show that its owner is alive."""
    try:
        os.utime(claim_path(root, unit))
    except FileNotFoundError:  # taken over meanwhile: `commit` will find out
        return


def _claim(path: Path) -> bool:
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}
    owner |= {"namespace": _namespace(), "worker": worker_id()}
    for _ in range(2):
        if create_json(path, owner):
            return True
        if not _remove_dead(path):
            return False
    return False


def _remove_dead(path: Path) -> bool:
    """Remove a claim whose owner is gone.

    Returns:
        Whether the unit can be claimed now.
    """
    if not _dead(path):
        return False
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            if not _locked(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB):
                return False  # its owner is committing, or another worker is removing the claim
            # Checked again under the lock: another worker may have made a new claim meanwhile.
            if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return False
            if not _dead(path):
                return False
            path.unlink(missing_ok=True)
    except FileNotFoundError:
        pass
    return True


@contextlib.contextmanager
def committing(root: Path, unit: int) -> Iterator[bool]:
    """Hold the claim while its unit is committed, so that nobody takes it over in between.

    Yields:
        Whether this process still holds it. A process that was stopped for long may have lost it, and must write
        nothing.
    """
    try:
        with open(claim_path(root, unit), "rb") as file:
            _locked(file.fileno(), fcntl.LOCK_EX)
            yield owns(root, unit)
    except FileNotFoundError:
        yield False


def _without_waiting(path: str, flags: int) -> int:
    """Opener of a file that does not wait, even where the path names a pipe instead of a file."""
    return os.open(path, flags | os.O_NONBLOCK)


def _locked(descriptor: int, operation: int) -> bool:
    """Lock a file.

    Returns:
        Whether it is locked now. True also on file systems without locks, where the rules of claims have to suffice.
    """
    try:
        fcntl.flock(descriptor, operation)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _dead(path: Path) -> bool:
    """Whether a claim's owner is gone: its process on this host, or its heartbeat on another."""
    try:
        age = time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return True
    if not -AHEAD <= age <= STALE:
        return True
    owner = _owner(path)
    if owner is None:  # torn, by a kill on a file system without links; a live owner would have filled it by now
        return age > 5.0
    if owner.get("worker") == worker_id():
        return True  # left by an earlier run in this very process
    if (owner.get("host"), owner.get("namespace")) != (socket.gethostname(), _namespace()):
        return False
    try:
        return _started(int(owner["pid"])) != owner.get("started")
    except (KeyError, TypeError, ValueError, OverflowError):
        return True


def _owner(path: Path) -> dict[str, Any] | None:
    try:
        owner = json.loads(read_bytes(path))
    except (OSError, SpkdError, ValueError, RecursionError):
        return None
    return owner if isinstance(owner, dict) else None


def _started(pid: int) -> str | None:
    """Start time of a process of this machine, in the system's clock ticks; None where there is no such process.

    It distinguishes a process from a later one with the same number.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19].decode()
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
