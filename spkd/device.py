"""Choice of the device, copies to it, and functions that are compiled for it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spkd.errors import SpkdError, UsageError, first_line
from spkd.progress import log

NAMES = re.compile(r"auto|cpu|mps|cuda(:\d+)?")
LOCAL_RANKS = ("LOCAL_RANK", "SLURM_LOCALID")  # variables with the number of a process on its machine: torchrun, srun


def resolve(name: str) -> torch.device:
    """The device of a name.

    `auto` takes CUDA, then MPS, then CPU. Where torchrun or srun gives this process a rank on its machine, `auto` and
    `cuda` take the GPU of that rank, among those that the process sees.

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
    rank = next((os.environ[name] for name in LOCAL_RANKS if os.environ.get(name, "").isdecimal()), "")
    if kind == "cuda" and not number and rank:
        number = str(int(rank) % gpus)
    return torch.device(f"{kind}:{number}" if number else kind)


def has_bfloat16() -> bool:
    """Whether the processor has bfloat16 arithmetic."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def note_precision(setting: str, precision: str, device: torch.device) -> None:
    """Log a note where bfloat16 is asked for on a processor without such arithmetic, which takes many times as long.

    Args:
        setting: name of the setting, e.g. teacher.precision.
        precision: its value.
    """
    if precision == "bf16" and device.type == "cpu" and not has_bfloat16():
        log(f"note: {setting}=bf16: this processor has no bfloat16 arithmetic; {setting}=fp32 is many times as fast")


def sent(values: Tensor, device: torch.device) -> Tensor:
    """Values on a device. The host does not wait for the copy: a GPU reads from pinned memory on its own."""
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()  # no copy where they are pinned
    return values.to(device, non_blocking=True)


def compiled(function: Callable[..., Any], setting: str, **options: Any) -> Callable[..., Any]:
    """Function of tensors that torch compiles when it is first called.

    Args:
        setting: the setting that asks for it, for the error.
        options: keyword arguments of torch.compile.
    Raises:
        SpkdError: by the function, where it cannot be compiled.
    """
    fast = torch.compile(function, **options)

    def call(*arguments: Any, **named: Any) -> Any:
        try:
            return fast(*arguments, **named)
        except RuntimeError as error:
            from torch._dynamo.exc import TorchDynamoException  # there once something was compiled

            if isinstance(error, TorchDynamoException):
                reason = first_line(getattr(error, "inner_exception", error))
                raise SpkdError(f"{setting}: {reason}; run without it") from error
            raise

    return call
