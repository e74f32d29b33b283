"""Memory of this process, in which large buffers are used again instead of being mapped anew."""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # constants of glibc's malloc.h
KEPT = 2**31 - 1  # bytes; the largest value that mallopt takes


def keep_large_buffers() -> None:
    """Make glibc keep freed buffers for the next batch.

    By default, glibc returns large buffers to the operating system at once, and maps new ones for the next batch. The
    system has to zero and map their pages one by one, which takes 12 to 15 % of a whole command on 2 cores
    (benchmarks/buffers.py).

    Nothing is changed where the user set glibc by environment variables (MALLOC_..., GLIBC_TUNABLES), or where the C
    library has no such call.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, musl, Windows
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, KEPT)
