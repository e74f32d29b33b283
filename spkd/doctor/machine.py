"""The machine as spkd sees it: system, cores, memory, and the variables that decide over threads and devices."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

from spkd.cores import group_folders, usable

VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "CUDA_VISIBLE_DEVICES", "SLURM_CPUS_PER_TASK")
DRIVER = Path("/proc/driver/nvidia/version")


def describe() -> dict[str, object]:
    """Python, system, cores and memory of this machine, by their names in the report."""
    kind = "virtual environment" if sys.prefix != sys.base_prefix else "conda" if "CONDA_PREFIX" in os.environ else ""
    python = f"{platform.python_implementation()} {platform.python_version()}"
    physical = _physical()
    return {
        "python": f"{python}, {kind}" if kind else python,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}, {' '.join(platform.libc_ver())}",
        "cores": {"usable": usable(), "of_machine": os.cpu_count()},
        "memory_gib": {"usable": _gib(min([physical, *_limits()])), "of_machine": _gib(physical)},
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "settings": sorted(name for name in os.environ if name.startswith("SPKD_")),  # their values may be secret
        "nvidia_driver": _driver(),
    }


def _physical() -> int:
    """Bytes of memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _limits() -> list[int]:
    """Limits (bytes) of the control groups that this process is in."""
    found = []
    for folder, is_first in group_folders("memory"):
        try:
            text = (folder / ("memory.limit_in_bytes" if is_first else "memory.max")).read_text()
            found += [int(text)] if text.strip().isdecimal() else []
        except (OSError, ValueError):
            continue
    return found


def _gib(size: int) -> float:
    return round(size / 2**30, 1)


def _driver() -> str | None:
    """Version of the driver of NVIDIA's GPUs; None where there is none."""
    try:
        line = DRIVER.read_text().partition("\n")[0]
    except OSError:
        return None
    return next((word for word in line.split() if word[:1].isdecimal() and "." in word), line)
