"""Locks on copies that were pulled, so that no other pull evicts one that is being read."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO

from spkd.cache.folder import PULLED


def hold(root: Path, alone: bool = False) -> IO[bytes] | None:
    """Lock a pulled copy while it is read, and note the time.

    Args:
        alone: lock it against readers too, to remove it.
    Returns:
        The lock, held until it is closed; None for caches that were not pulled (those nobody evicts), and where `alone`
        is asked for and others read it.
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
