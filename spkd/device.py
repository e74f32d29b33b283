"""Choice of the device."""

from __future__ import annotations

import os
import re

import torch

from spkd.errors import UsageError

NAMES = re.compile(r"auto|cpu|mps|cuda(:\d+)?")


def resolve(name: str) -> torch.device:
    """The device of a name.

    `auto` takes CUDA, then MPS, then CPU. Where a launcher gives this process a rank on its machine (LOCAL_RANK),
    `auto` and `cuda` take the GPU of that rank.

    Args:
        name: auto, cpu, mps, cuda or cuda:N.
    Raises:
        UsageError: no such name, or the named device is not on this machine.
    """
    if not NAMES.fullmatch(name):
        raise UsageError(f"device={name}: expected auto, cpu, mps, cuda or cuda:N")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    present = {"cuda": gpus > 0, "mps": torch.backends.mps.is_available(), "cpu": True}
    kind, _, number = name.partition(":")
    if kind == "auto":
        kind = next(kind for kind, here in present.items() if here)
    if not present[kind] or int(number or 0) >= max(gpus, 1):
        here = ", ".join([kind for kind, is_here in present.items() if is_here] + [f"cuda:{i}" for i in range(gpus)])
        raise UsageError(f"device={name}: not available on this machine (available: {here})")
    rank = os.environ.get("LOCAL_RANK", "")
    if kind == "cuda" and not number and rank.isdecimal():
        number = str(int(rank) % gpus)
    return torch.device(f"{kind}:{number}" if number else kind)
