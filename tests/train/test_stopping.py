from __future__ import annotations

import os
import signal
import threading

import pytest

from spkd.errors import Interrupted
from spkd.train.settings import ValidConfig
from spkd.train.stopping import SIGNALS, BestValidation, stop_request


@pytest.mark.parametrize("which", SIGNALS)
def test_a_signal_asks_and_the_second_does_not_wait(which: signal.Signals) -> None:
    before = signal.getsignal(which)
    with stop_request() as stop:
        assert not stop.asked
        os.kill(os.getpid(), which)
        assert stop.asked
        with pytest.raises(Interrupted, match="interrupted twice"):
            os.kill(os.getpid(), which)
    assert signal.getsignal(which) == before


def test_other_threads_leave_the_handlers_alone() -> None:
    found = []

    def run() -> None:
        with stop_request() as stop:
            found.append(stop.asked)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [False]


def test_validation_ends_a_run_that_gets_no_better() -> None:
    best, config = BestValidation(), ValidConfig("t", "m", patience=2)
    assert [best.add(step, rate) for step, rate in ((10, 5.0), (20, 4.0), (30, 4.0), (40, 6.0))] == [
        True,
        True,
        False,
        False,
    ]
    assert best.is_over(config)
    assert (best.rate, best.step) == (4.0, 20)
    assert BestValidation.of_state(best.state()) == best
    assert BestValidation.of_state({}) == BestValidation()
    assert not best.is_over(ValidConfig("t", "m"))
