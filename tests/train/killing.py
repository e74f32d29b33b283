"""A training that dies."""

from __future__ import annotations

import time
from pathlib import Path

from tests import processes


def kill_after_saving(arguments: list[str], out: Path) -> None:
    """Run spkd in a process of its own, beside `out`, and kill it once it has saved a state there."""
    running = processes.spkd(*arguments, cwd=out.parent)
    deadline = time.monotonic() + 60
    while not (out / "state.json").is_file() and time.monotonic() < deadline:
        time.sleep(0.005)
    running.kill()
