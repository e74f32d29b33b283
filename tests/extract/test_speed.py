from __future__ import annotations

import pytest

from spkd.extract.speed import note, report
from spkd.meter import Meter
from tests.test_meter import Clock, clock

__all__ = ["clock"]


@pytest.mark.parametrize(
    ("waits", "word", "cores"),
    [
        (
            (6.0, 4.0, 0.0),
            "decoding and augmentation",
            4,
        ),  # 15 s of cores for every 4 s in which nothing waits for them
        ((0.0, 6.0, 4.0), "writing", 2),
        ((0.1, 9.9, 0.0), "", 2),
    ],
)
def test_the_bottleneck_is_named(
    clock: Clock, waits: tuple[float, float, float], word: str, cores: int, capsys: pytest.CaptureFixture[str]
) -> None:
    meter = Meter()

    def items() -> object:
        clock.now += waits[0]
        yield 1

    for _ in meter.loading(items()):  # type: ignore[arg-type]
        with meter.spending("teacher"):
            clock.now += waits[1]
        with meter.spending("writing"):
            clock.now += waits[2]
        meter.spend("cores", 15.0)
        meter.count(4 * 50.0)
    assert note(meter) == "20 h/h"
    report(meter, workers=1, runs_teacher=True)
    out = capsys.readouterr().out
    assert f"0.06 h of audio in {sum(waits):.0f} s: 20 hours per hour; the teacher was busy" in out
    assert ("bottleneck" in out) == bool(word)
    assert word in out
    assert f"loading took 1.5 cores; so that this teacher never waits, it needs {cores} here (workers=1)" in out
    report(meter, workers=1, runs_teacher=False)
    out = capsys.readouterr().out
    assert out.startswith(
        f"0.06 h of audio in {sum(waits):.0f} s: 20 hours per hour; loading took 1.5 cores (workers=1)"
    )
    assert "teacher" not in out


def test_waiting_that_no_worker_would_shorten_is_no_bottleneck_of_decoding(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of a slow disk: the line before says that the workers are enough."""
    meter = Meter()

    def items() -> object:
        clock.now += 5.0
        yield 1

    for _ in meter.loading(items()):  # type: ignore[arg-type]
        with meter.spending("teacher"):
            clock.now += 5.0
        meter.spend("cores", 2.0)
        meter.count(200.0)
    report(meter, workers=1, runs_teacher=True)
    *_, needed, bottleneck = capsys.readouterr().out.splitlines()
    assert needed.endswith("it needs 1 here (workers=1)")
    assert bottleneck == "bottleneck: audio that comes late; take faster storage, or cores without other work"
