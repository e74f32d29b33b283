"""Log of a run: log.jsonl, and in addition TensorBoard, Weights & Biases or trackio."""

from __future__ import annotations

import importlib
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from spkd.errors import UsageError
from spkd.files.atomic import appending, write_bytes
from spkd.students.curves import LOG, log_line, read_log

LOG_EVERY = 20  # steps between lines
BOARD = "tensorboard"  # folder within that of the run


class Logger(ABC):
    """Base class of loggers: they keep values by step."""

    @abstractmethod
    def add(self, step: int, values: dict[str, float]) -> None: ...

    @abstractmethod
    def close(self) -> None: ...


class RunLog:
    """Values of a run, step by step.

    Args:
        kept: bytes of the log before the first step; values that were logged behind them before a kill are dropped.
        names: names of the loggers in addition to log.jsonl.
    """

    def __init__(self, out: Path, first: int, kept: int = 0, names: Sequence[str] = ()) -> None:
        """Open the log.

        Raises:
            UsageError: the package of a logger is missing.
            SpkdError: a line that is kept was changed.
        """
        path = out / LOG
        # The file is replaced as a whole, so that a kill at any moment leaves the old log or the new one.
        lines = [log_line(entry.pop("step"), entry) for entry in read_log(path, kept)]
        write_bytes(path, "".join(lines).encode())
        self._file = appending(path)
        made = (LOGGERS[name](out, first) for name in names)
        self._loggers = [logger for logger in made if logger is not None]

    @staticmethod
    def is_due(step: int) -> bool:
        """Whether the values of a step are kept."""
        return step % LOG_EVERY == 0

    def add(self, step: int, values: dict[str, float]) -> None:
        self._file.write(log_line(step, values))
        self._file.flush()
        for logger in self._loggers:
            logger.add(step, values)

    def sync(self) -> None:
        """Make the lines so far durable, before a state is saved that is continued behind them."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self.sync()
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
    # Values of earlier runs in this folder, from the first step of this one, are hidden by it; no file is removed.
    return _TensorBoard(SummaryWriter(str(out / BOARD), purge_step=first))


class _Tracker(Logger):
    """Weights & Biases, or trackio, which has the same interface. A continued run adds to its earlier record."""

    def __init__(self, name: str, out: Path, first: int) -> None:
        try:
            self._package = importlib.import_module(name)
        except ImportError as error:
            raise UsageError(f"loggers: {name} is not installed: pip install {name}") from error
        self._package.init(
            project="spkd", name=out.resolve().name, resume="allow" if first else "never", config={"out": str(out)}
        )

    def add(self, step: int, values: dict[str, float]) -> None:
        self._package.log(dict(values), step=step)

    def close(self) -> None:
        self._package.finish()


LOGGERS: dict[str, Any] = {
    "tensorboard": _tensorboard,
    "wandb": partial(_Tracker, "wandb"),
    "trackio": partial(_Tracker, "trackio"),
}
