"""Checks that really run: imports, a product of matrices on each device, durable writing, locks on files.

What other packages do happens in a process of its own: a package that ends its process, or hangs, is found by that.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spkd.errors import first_line
from spkd.files.atomic import write_bytes

LONGEST = 120.0  # s without a result after which the process of the checks is ended
DEVICES = "a product of matrices on each device"  # name of the check that needs torch
LOCKS = "locks on files in the current folder"  # of the one that needs the cache, and with it numpy
WRITING = "a durable write into the temporary folder"
SIZE = 256  # rows and columns of the matrices
TOLERANCE = 1e-2  # of a product of matrices of standard normal numbers, whose values are about 16: TF32 has ten bits
CHILD = "from spkd.doctor.checks import child; child()"


@dataclass(frozen=True)
class Result:
    """Result of a check.

    Attributes:
        error: None where it succeeded.
        found: what it found; of devices, a description of each.
    """

    name: str
    error: str | None = None
    found: list[str] = field(default_factory=list)


def run(modules: Sequence[str]) -> list[Result]:
    """Import modules one after the other in another process; use the devices, if torch is among them; lock files."""
    waiting, done = [*modules, *([DEVICES] if "torch" in modules else []), LOCKS], []
    while waiting:
        results, end = _in_process(waiting)
        done += results
        if len(results) == len(waiting):
            break
        done.append(Result(waiting[len(results)], end))
        waiting = waiting[len(results) + 1 :]
    if any(result.name == "torch" and result.error for result in done):
        done = [result for result in done if result.name != DEVICES]
    return done


def _in_process(names: Sequence[str]) -> tuple[list[Result], str]:
    """Results of the checks up to one that ended the process, and how it ended."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, *names], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        out, _ = process.communicate(timeout=LONGEST)
        code = process.returncode
        end = f"ended its process ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})"
    except subprocess.TimeoutExpired:
        process.kill()
        out, _ = process.communicate()
        end = f"did not end within {LONGEST:.0f} s"
    lines = [line for line in out.splitlines(keepends=True) if line.endswith("\n")]
    return [Result(**json.loads(line)) for line in lines], end


def child() -> None:
    """Run the checks that the command line names, and print a line of JSON after each."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a package prints is no result
    for name in sys.argv[1:]:
        error: str | None = None
        found: list[str] = []
        try:
            if name == DEVICES:
                found, error = _devices()
            elif name == LOCKS:
                error = _locks()
            else:
                __import__(name)
        except BaseException as problem:  # of other packages; SystemExit, too
            error = f"{type(problem).__name__}: {first_line(problem)}"
        print(json.dumps({"name": name, "error": error, "found": found}), file=out, flush=True)
    out.flush()
    os._exit(0)  # packages may hang or fail as they are left


def _devices() -> tuple[list[str], str | None]:
    """Every device that torch sees, and what is wrong with the first on which it computes wrongly."""
    import torch

    names = ["cpu", *(["mps"] if torch.backends.mps.is_available() else [])]
    names += [f"cuda:{number}" for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]
    found, errors = [], []
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(SIZE, SIZE, generator=generator) for _ in range(2))
    right = a.double() @ b.double()
    for name in names:
        description = name
        if name.startswith("cuda"):
            properties: Any = torch.cuda.get_device_properties(name)
            capability = f"{properties.major}.{properties.minor}"
            description += f" {properties.name}, {properties.total_memory / 2**30:.0f} GiB, capability {capability}"
        found.append(description)
        try:
            off = float(((a.to(name) @ b.to(name)).double().cpu() - right).abs().max())
            if not off < TOLERANCE * right.std():
                errors.append(f"{name}: a product of matrices is off by {off:.2g}")
        except RuntimeError as problem:
            errors.append(f"{name}: {first_line(problem)}")
    builds = [
        f"{name} {version}" for name, version in (("CUDA", torch.version.cuda), ("ROCm", torch.version.hip)) if version
    ]
    found.append(f"torch built for {builds[0] if builds else 'CPUs'}")
    return found, "; ".join(errors) or None


def _locks() -> str | None:
    """What is wrong with locks on files in the current folder; None where one keeps another out."""
    from spkd.cache.lock import exclusive, made_exclusive

    with tempfile.TemporaryDirectory(prefix=".spkd-doctor-", dir=".") as folder:
        path = Path(folder, "file")
        with made_exclusive(path, wait=False) as first, exclusive(path, wait=False) as second:
            return None if first and not second else "a second lock was given"


def writing() -> Result:
    """Whether a file can be written durably into the folder for temporary files."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "file")
            write_bytes(path, b"spkd")
            return Result(WRITING, None if path.read_bytes() == b"spkd" else "another content is read back")
    except OSError as error:
        return Result(WRITING, error.strerror or first_line(error))
