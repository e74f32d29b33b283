"""Locks on files, against all other processes on any machine, on any file system.

A lock consists of flock and of an exclusive file PATH.lock that names its owner (see owner.py). Neither is enough:

- Some file systems have no flock. Some keep it to one machine (NFS with local_lock, Lustre with localflock) and say
  nothing of it.
- An exclusive file outlives its owner. Two processes that remove it at the same moment need flock to take turns.

On NFS, flock needs a file that is open for writing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from spkd.cache.folder import PULLED
from spkd.cache.owner import in_words, is_gone, is_owned, kept_alive, owner_of, this_process
from spkd.errors import SpkdError
from spkd.files.atomic import appending, create_json, make_folder, part_path, without_links, without_waiting
from spkd.files.reading import is_irregular

PAUSES = (0.1, 2.0)  # s between two attempts to lock a file: first, and at most after doubling
WITHOUT_LOCKS = (errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of flock, by file system


@contextlib.contextmanager
def exclusive(path: Path, wait: bool = True, on_wait: Callable[[str], None] | None = None) -> Iterator[bool]:
    """Lock a file while the block runs.

    Args:
        on_wait: function of a phrase that names the other process, called once.
    Yields:
        Whether it is locked; always, where `wait` is asked for.
    Raises:
        FileNotFoundError: there is no such file, or another process removed it before it was locked.
        OSError: it cannot be written, or its file system fails.
        SpkdError: it is not a regular file.
    """
    if is_irregular(path):
        raise SpkdError(f"{path}: not a regular file")
    own = path.with_name(f"{path.name}.lock")
    with open(path, "r+b", opener=without_links) as file:
        pause, longest = PAUSES
        while not (locked := _take(file, own)) and wait:
            if on_wait is not None and (owner := owner_of(own)) is not None:
                on_wait(in_words(owner))
                on_wait = None
            time.sleep(pause)
            pause = min(2 * pause, longest)
        if not locked:
            yield False
            return
        try:
            if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
            with kept_alive(lambda: [own]):
                yield True
        finally:
            if is_owned(own):
                own.unlink(missing_ok=True)
            _unlock(file)


@contextlib.contextmanager
def made_exclusive(path: Path, wait: bool = True, on_wait: Callable[[str], None] | None = None) -> Iterator[bool]:
    """`exclusive`, of a file that is made, with its folder, if need be: also where it goes while it is waited for.

    Raises:
        SpkdError: the file is a symbolic link, or not a regular file.
    """
    with contextlib.ExitStack() as lock:
        while True:
            with contextlib.suppress(FileNotFoundError):
                make_folder(path.parent)
                appending(path).close()
                locked = lock.enter_context(exclusive(path, wait, on_wait))
                break
        yield locked


def _take(file: IO[bytes], own: Path) -> bool:
    """Lock a file if no other process holds it. Returns whether it is locked."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
    try:
        taken = create_json(own, this_process()) or (_remove_gone(own) and create_json(own, this_process()))
    except BaseException:
        _unlock(file)
        raise
    if not taken:
        _unlock(file)
    return taken


def _remove_gone(own: Path) -> bool:
    """Remove an exclusive file whose owner is gone. Returns whether another attempt to make one is worth it."""
    if not is_gone(own):
        return False
    aside = part_path(own)
    try:
        own.rename(aside)  # of several processes, one succeeds
    except FileNotFoundError:
        return True
    if not is_gone(aside):  # meanwhile another process had removed the old file and made its own
        aside.rename(own)
        return False
    aside.unlink(missing_ok=True)
    return True


def _unlock(file: IO[bytes]) -> None:
    """End flock now; closing alone leaves it to forked processes, which hold the file open."""
    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_UN)


def hold(root: Path, alone: bool = False, wait: bool = True) -> IO[bytes] | None:
    """Lock a pulled copy while it is read, so that no pull evicts it, and record the time of its use.

    Args:
        alone: lock it against readers too, to remove it.
        wait: where it is being removed, wait for the end, unless `alone` is asked for.
    Returns:
        The lock, held until it is closed. None for caches that were not pulled, which are never evicted; where it is
        not waited for and another process removes the copy; and where `alone` is asked for and another process reads
        it, or it cannot be locked.
    """
    try:
        file = open(root / PULLED, "r+b" if alone else "rb", opener=without_waiting)
    except FileNotFoundError:
        return None
    except OSError:
        if alone:
            return None
        raise
    try:
        fcntl.flock(file, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | (fcntl.LOCK_NB if alone or not wait else 0))
        if not alone:
            os.utime(root / PULLED)
    except OSError as error:
        if alone or (isinstance(error, BlockingIOError) and not wait):
            file.close()
            return None
    return file
