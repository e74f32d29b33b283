"""Choosing the device: the same code path runs on all of them."""

from __future__ import annotations

import torch

from spkd.errors import UsageError


def resolve(name: str) -> torch.device:
    """`auto` takes CUDA, then MPS, then CPU; a device named but absent is an error.

    Raises:
        UsageError: the named device is not on this machine.
    """
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, here in present.items() if here))
    if not present.get(name, False):
        here = ", ".join(kind for kind, is_here in present.items() if is_here)
        raise UsageError(f"device={name}: not available on this machine (available: {here})")
    return torch.device(name)
