"""End of a run before its last step: on a signal, after saving, and where validation no longer improves."""

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

# Ctrl-C; the signal of schedulers before they kill; the signal that Slurm sends on request (--signal=USR1@120).
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Handler of signals that ask a run to end. A second signal ends it without waiting for the step."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, *_: object) -> None:
        if self.asked:
            raise Interrupted("interrupted twice; what was saved before stays valid, and the same command continues")
        self.asked = True


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Handle signals that ask for an end while the block runs; only the main thread receives them."""
    request, before = StopRequest(), dict[signal.Signals, Any]()
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, request) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class BestValidation:
    """Best validation of a run so far.

    Attributes:
        rate: lowest EER (%).
        step: step of the lowest EER.
        worse: number of validations since then.
        trials: digest of the trials and of what finds their speech; rates of others are not compared; "" without
            validation.
    """

    rate: float = float("inf")
    step: int = -1
    worse: int = 0
    trials: str = ""

    def add(self, step: int, eer_percent: float) -> bool:
        """Add a new result. Returns whether it is the best."""
        if eer_percent < self.rate:
            self.rate, self.step, self.worse = eer_percent, step, 0
            return True
        self.worse += 1
        return False

    def is_over(self, config: ValidConfig) -> bool:
        """Whether the run ends, since validation has not improved for `patience` validations."""
        return 0 < config.patience <= self.worse

    def state(self) -> dict[str, Tensor]:
        numbers = (self.rate, self.step, self.worse)
        if self.step < 0:
            return {}
        trials = torch.tensor(list(bytes.fromhex(self.trials)), dtype=torch.uint8)
        return {"best": torch.tensor(numbers, dtype=torch.float64), "trials": trials}

    @classmethod
    def of_state(cls, state: dict[str, Tensor]) -> BestValidation:
        if "best" not in state:
            return cls()
        rate, step, worse = state["best"].tolist()
        return cls(rate, int(step), int(worse), bytes(state["trials"].tolist()).hex())
