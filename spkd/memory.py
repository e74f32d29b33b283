"""The memory of this process: large buffers are used again instead of being mapped anew."""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
KEPT = 2**31 - 1  # bytes; the largest that mallopt takes


def keep_large_buffers() -> None:
    """Have glibc keep freed buffers for the next batch.

    By itself glibc returns large ones to the operating system at once and maps new ones for the next batch, whose
    pages the system has to zero and to map one by one: 12 to 15 % of a whole command on 2 cores
    (benchmarks/buffers.py). Settings that the user gave glibc by environment variables (MALLOC_..., GLIBC_TUNABLES) are
    left alone. Other C libraries have no such call, and nothing happens.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, musl, Windows
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, KEPT)
