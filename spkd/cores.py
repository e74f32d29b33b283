"""Cores that this process may use, and threads that leave them to others while they wait.

torch starts a thread for every core of the machine. In a container that may use two of 64 cores, and beside other
work, these threads wait for each other: they must be as many as the cores that are given, and sleep while they wait.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

GROUPS = Path("/sys/fs/cgroup")
CORES = Path("/sys/devices/system/cpu")
OWN_GROUPS = Path("/proc/self/cgroup")
NO_QUOTA = 1 << 16
OF_TASK = "SLURM_CPUS_PER_TASK"  # variable with the cores of a task of Slurm, which not every cluster binds to them
# Turns of the loop in which a thread of GNU's OpenMP waits before it sleeps: some tens of microseconds, as long as it
# takes to wake it. By default they are 300,000, milliseconds that other processes need. benchmarks/busy.py compares:
# with more turns a training beside others loses more of its share, with fewer it is slower alone.
SPINS = "10000"


def usable() -> int:
    """Number of cores that this process may use at once: by its affinity, its share of a job of Slurm, and the quotas
    of its control groups.

    A quota of part of a core counts as one.
    """
    return min(_by_affinity(), _by_share())


def limit_threads() -> None:
    """Set the number of threads of OpenMP and how they wait, before a library that uses it is loaded.

    What the user set by environment variables is kept. Processes that this one starts inherit both. torch follows
    affinity by itself, with a thread for all cores that share one in hardware, but no share or quota.
    """
    share = _by_share()
    if share < _by_affinity() and share < _of_hardware():  # the second reads a file of each core
        os.environ.setdefault("OMP_NUM_THREADS", str(share))
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def _by_affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _of_hardware() -> int:
    """Number of cores of the hardware in the affinity, each of which may run several threads."""
    if not hasattr(os, "sched_getaffinity"):
        return _by_affinity()
    return len({_sharing(core) for core in os.sched_getaffinity(0)})


def _sharing(core: int) -> str:
    """The cores that share one in hardware with this one, as the kernel lists them."""
    try:
        return (CORES / f"cpu{core}/topology/thread_siblings_list").read_text().strip()
    except OSError:  # not in every virtual machine
        return str(core)


def _by_share() -> int:
    of_task = os.environ.get(OF_TASK, "")
    return min(_by_quota(), int(of_task) if of_task.isdecimal() and int(of_task) else NO_QUOTA)


def _by_quota() -> int:
    quota = min(_quotas(), default=math.inf)
    return NO_QUOTA if quota == math.inf else max(math.ceil(quota), 1)


def group_folders(controller: str) -> Iterator[tuple[Path, bool]]:
    """Folders of the control groups that this process is in, and whether each is of version 1.

    Args:
        controller: what the groups limit, of version 1: cpu or memory.
    """
    try:
        lines = OWN_GROUPS.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = GROUPS / controllers if controllers else GROUPS
        # In a container, the path may be one of the host; the own group is then the root.
        for place in (PurePosixPath(group), *PurePosixPath(group).parents):
            yield root / place.relative_to("/"), bool(controllers)


def _quotas() -> Iterator[float]:
    """Quotas (cores) of the control groups that this process is in, of version 2 and of version 1."""
    for folder, is_first in group_folders("cpu"):
        yield from _quota(folder, "cpu.cfs_quota_us" if is_first else "cpu.max")


def _quota(folder: Path, name: str) -> Iterator[float]:
    try:
        words = (folder / name).read_text().split()
        period = words[1] if name == "cpu.max" else (folder / "cpu.cfs_period_us").read_text()
        if words[0] not in ("max", "-1"):
            yield int(words[0]) / int(period)
    except (OSError, ValueError, IndexError, ZeroDivisionError):
        return
