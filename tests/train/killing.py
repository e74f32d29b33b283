"""A training that dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch


def kill_after_saving(arguments: list[str], out: Path) -> None:
    """Run spkd in a process of its own, beside `out`, and kill it once it has saved a state there."""
    command = [sys.executable, "-c", "from spkd.cli import main; main()", *arguments]
    threads = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums depend on it in their last bits
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    running = subprocess.Popen(command, cwd=out.parent, env=threads, **quiet)  # type: ignore[call-overload]
    deadline = time.monotonic() + 60
    while not (out / "state.json").is_file() and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
