"""The log of a run: log.jsonl, and TensorBoard events where it is installed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from spkd.files import write_bytes

LOG_EVERY = 20  # steps between lines


class RunLog:
    """Values of a run, step by step.

    Args:
        out: folder of the run.
        first: the step it begins with; what was logged of this step and later ones, before a kill, is dropped.
    """

    def __init__(self, out: Path, first: int) -> None:
        path = out / "log.jsonl"
        # Replaced whole, so that a kill at any moment leaves the old log or the new one.
        write_bytes(path, "".join(f"{line}\n" for line in _lines_before(path, first)).encode())
        self._file = open(path, "a")
        try:
            from torch.utils.tensorboard import SummaryWriter

            if not first:
                shutil.rmtree(out / "tensorboard", ignore_errors=True)
            self._board: Any = SummaryWriter(str(out / "tensorboard"), purge_step=first or None)
        except ImportError:
            self._board = None

    def __call__(self, step: int, values: dict[str, float]) -> None:
        if step % LOG_EVERY:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def _lines_before(path: Path, first: int) -> list[str]:
    """Lines of earlier steps; one that a kill left torn is dropped."""
    kept = []
    for line in path.read_text(errors="replace").splitlines() if first and path.is_file() else []:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int) and entry["step"] < first:
            kept.append(line)
    return kept
