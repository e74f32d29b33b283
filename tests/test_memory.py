from __future__ import annotations

import functools
import platform
import resource
import subprocess
import sys

import pytest

ROUNDS, SIZE = 20, 64 * 2**20
MEASURE = f"""
import resource
import sys
import torch
from spkd.memory import keep_large_buffers
for _ in range(2 * (sys.argv[1] == "kept")):  # twice is as good as once
    keep_large_buffers()
for _ in range({ROUNDS}):
    torch.ones({SIZE}, dtype=torch.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({ROUNDS}):
    torch.ones({SIZE}, dtype=torch.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@functools.cache
def page_faults(how: str, **environment: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, how], env=environment, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries decide by themselves")
def test_a_buffer_of_the_size_just_freed_costs_no_new_pages() -> None:
    pages = ROUNDS * SIZE // resource.getpagesize()
    assert page_faults("kept") < 0.01 * pages < page_faults("by default")


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries decide by themselves")
def test_what_the_user_set_stands() -> None:
    assert page_faults("kept", MALLOC_MMAP_THRESHOLD_="65536") > page_faults("kept")
