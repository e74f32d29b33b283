"""Locks on pulled copies of caches, so that no pull evicts a copy that is being read."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO

from spkd.cache.folder import PULLED


def hold(root: Path, alone: bool = False) -> IO[bytes] | None:
    """Lock a pulled copy while it is read, and record the time of its use.

    Args:
        root: folder of the copy.
        alone: lock it against readers too, to remove it.
    Returns:
        The lock, held until it is closed. None for caches that were not pulled, which are never evicted; and where
        `alone` is asked for and another process reads the copy.
    """
    try:
        file = open(root / PULLED, "rb")
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, (fcntl.LOCK_EX | fcntl.LOCK_NB) if alone else fcntl.LOCK_SH)
        if not alone:
            os.utime(root / PULLED)
    except OSError:
        if alone:
            file.close()
            return None
    return file
