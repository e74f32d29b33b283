"""Ending a run before its last step: when asked to, after saving, and when validation gets no better."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spkd.errors import Interrupted
from spkd.train.settings import ValidConfig

# Ctrl-C; what schedulers send before they kill; what Slurm sends on request (--signal=USR1@120).
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Whether a signal asked the run to end. The second one does not wait for the step."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, *_: object) -> None:
        if self.asked:
            raise Interrupted("interrupted twice; what was saved before stays valid, and the same command continues")
        self.asked = True


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Signals ask for an end while the block runs; only the main thread can be asked."""
    request, before = StopRequest(), dict[signal.Signals, Any]()
    if threading.current_thread() is threading.main_thread():
        before = {which: signal.signal(which, request) for which in SIGNALS}
    try:
        yield request
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)


@dataclass
class BestValidation:
    """The best validation of a run so far.

    Attributes:
        rate: lowest EER (%).
        step: at which.
        worse: validations since.
    """

    rate: float = float("inf")
    step: int = -1
    worse: int = 0

    def add(self, step: int, eer_percent: float) -> bool:
        """A new result. Returns whether it is the best."""
        if eer_percent < self.rate:
            self.rate, self.step, self.worse = eer_percent, step, 0
            return True
        self.worse += 1
        return False

    def is_over(self, config: ValidConfig) -> bool:
        """Whether waiting longer is no use."""
        return 0 < config.patience <= self.worse

    def state(self) -> dict[str, Tensor]:
        numbers = (self.rate, self.step, self.worse)
        return {"best": torch.tensor(numbers, dtype=torch.float64)} if self.step >= 0 else {}

    @classmethod
    def of_state(cls, state: dict[str, Tensor]) -> BestValidation:
        if "best" not in state:
            return cls()
        rate, step, worse = state["best"].tolist()
        return cls(rate, int(step), int(worse))
