"""Log of a run: log.jsonl, and in addition TensorBoard, Weights & Biases or trackio."""

from __future__ import annotations

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spkd.errors import UsageError
from spkd.files.atomic import write_bytes

LOG_EVERY = 20  # steps between lines


class Logger(ABC):
    """Base class of loggers: they keep values by step."""

    @abstractmethod
    def add(self, step: int, values: dict[str, float]) -> None: ...

    @abstractmethod
    def close(self) -> None: ...


class RunLog:
    """Values of a run, step by step.

    Args:
        out: folder of the run.
        first: first step; values of this and later steps that were logged before a kill are dropped.
        names: names of the loggers in addition to log.jsonl.
    """

    def __init__(self, out: Path, first: int, names: Sequence[str] = ()) -> None:
        """Open the log. Raises UsageError where the package of a logger is missing."""
        path = out / "log.jsonl"
        # The file is replaced as a whole, so that a kill at any moment leaves the old log or the new one.
        kept = _lines_before(path, first)
        write_bytes(path, "".join(f"{line}\n" for line in kept).encode())
        self._file = open(path, "a")
        made = (LOGGERS[name](out, first) for name in names)
        self._loggers = [logger for logger in made if logger is not None]

    @staticmethod
    def is_due(step: int) -> bool:
        """Whether the values of a step are kept."""
        return step % LOG_EVERY == 0

    def add(self, step: int, values: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for logger in self._loggers:
            logger.add(step, values)

    def close(self) -> None:
        self._file.close()
        for logger in self._loggers:
            logger.close()


class _TensorBoard(Logger):
    def __init__(self, board: Any) -> None:
        self._board = board

    def add(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._board.close()


def _tensorboard(out: Path, first: int) -> Logger | None:
    """TensorBoard logger; None where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    if not first:
        shutil.rmtree(out / "tensorboard", ignore_errors=True)
    return _TensorBoard(SummaryWriter(str(out / "tensorboard"), purge_step=first or None))


class _Tracker(Logger):
    """Weights & Biases, or trackio, which has the same interface. A continued run adds to its earlier record."""

    def __init__(self, package: Any, out: Path, first: int) -> None:
        self._package = package
        package.init(
            project="spkd", name=out.resolve().name, resume="allow" if first else "never", config={"out": str(out)}
        )

    def add(self, step: int, values: dict[str, float]) -> None:
        self._package.log(dict(values), step=step)

    def close(self) -> None:
        self._package.finish()


def _tracker(name: str) -> Any:
    def make(out: Path, first: int) -> Logger:
        import importlib

        try:
            package = importlib.import_module(name)
        except ImportError as error:
            raise UsageError(f"loggers: {name} is not installed: pip install {name}") from error
        return _Tracker(package, out, first)

    return make


LOGGERS: dict[str, Any] = {
    "tensorboard": _tensorboard,
    "wandb": _tracker("wandb"),
    "trackio": _tracker("trackio"),
}


def _lines_before(path: Path, first: int) -> list[str]:
    """Lines of the log before a step, without one that a kill left incomplete."""
    kept = []
    for line in path.read_text(errors="replace").splitlines() if first and path.is_file() else []:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int) and entry["step"] < first:
            kept.append(line)
    return kept
