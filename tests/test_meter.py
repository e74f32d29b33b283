from __future__ import annotations

import pytest

from spkd import meter as meters
from spkd.meter import Meter


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(meters, "time", clock)
    return clock


def test_waiting_and_working_are_separated_after_the_warm_up(clock: Clock) -> None:
    def items() -> object:
        for number in range(2 + 10):
            clock.now += 60.0 if number < 2 else 0.5
            yield 8

    meter = Meter(warm_up=2)
    for views in meter.loading(items()):  # type: ignore[arg-type, var-annotated]
        with meter.spending("step"):
            clock.now += 1.5
        meter.count(views)
    assert (meter.seconds, meter.done, meter.rate) == (20.0, 80, 4.0)
    assert (meter.share("loading"), meter.share("step"), meter.share("writing")) == (0.25, 0.75, 0.0)
    assert not meter.is_short


def test_a_short_run_says_nothing(clock: Clock) -> None:
    meter = Meter(warm_up=1)
    meter.count(8)
    clock.now += 100.0
    assert meter.is_short  # nothing but the warm-up
    meter.count(8)
    assert not meter.is_short
    quick = Meter()
    quick.count(8)
    clock.now += 1.0
    assert quick.is_short
