"""Claims: which worker fills which unit, so that any number of workers, anywhere, share one cache.

A claim is a file that names its owner: host, process, and a random identity, because host names and process numbers
repeat among containers. Its owner touches it while it works.
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
    """Units that are not committed, each claimed for this process before it is yielded, until `release`."""
    for unit in range(units):
        if claim(root, unit):
            yield unit


def claim(root: Path, unit: int) -> bool:
    """Claim a unit for this process, until `release`. Returns whether it is now this one's to fill."""
    if commit_path(root, unit).is_file() or not _claim(claim_path(root, unit)):
        return False
    if commit_path(root, unit).is_file():
        release(root, unit)
        return False
    return True


def owns(root: Path, unit: int) -> bool:
    """Whether this process holds the claim: one that was stopped for long may have lost it."""
    owner = _owner(claim_path(root, unit))
    return owner is not None and owner.get("worker") == worker_id()


def release(root: Path, unit: int) -> None:
    """Give a claim back, where it is this process's own."""
    if owns(root, unit):
        claim_path(root, unit).unlink(missing_ok=True)


def heartbeat(root: Path, unit: int) -> None:
    """Show that the claim's owner is alive."""
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
    """Take a claim away whose owner is gone. Returns whether the way is free now."""
    if not _dead(path):
        return False
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            if not _locked(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB):
                return False  # its owner commits just now, or another worker takes it away
            # Looked at again under the lock: it may be a new claim by now.
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
        Whether this process still holds it: one that was stopped for long may have lost it, and must touch nothing.
    """
    try:
        with open(claim_path(root, unit), "rb") as file:
            _locked(file.fileno(), fcntl.LOCK_EX)
            yield owns(root, unit)
    except FileNotFoundError:
        yield False


def _without_waiting(path: str, flags: int) -> int:
    """A pipe in the place of a file would be waited for."""
    return os.open(path, flags | os.O_NONBLOCK)


def _locked(descriptor: int, operation: int) -> bool:
    """Lock a file. On file systems without locks the claim's own rules have to do."""
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
    """When a process of this machine was started, as the system counts; None where there is no such process. It tells a
    process from a later one of the same number."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19].decode()
    except (OSError, IndexError):
        return None


def _namespace() -> str:
    """What tells process numbers apart: the boot of the machine and the namespace of its processes. Two containers of
    one host name have another one each; where the system does not say, heartbeats alone decide."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return worker_id()
