from __future__ import annotations

import numpy as np
import pytest

from spkd.extract import meter as meters
from spkd.extract.meter import Meter


class Clock:
    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("waits", "word"),
    [((6.0, 4.0, 0.0), "decoding and augmentation"), ((0.0, 6.0, 4.0), "writing"), ((0.1, 9.9, 0.0), "")],
)
def test_the_bottleneck_is_named(
    waits: tuple[float, float, float], word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    monkeypatch.setattr(meters, "time", clock)
    meter = Meter(workers=1)

    def items() -> object:
        clock.now += waits[0]
        yield 1

    for _ in meter.loading(items()):  # type: ignore[arg-type]
        with meter.teacher():
            clock.now += waits[1]
        with meter.writing():
            clock.now += waits[2]
        meter.count(np.array([16_000 * 50] * 4))
    meter.report()
    out = capsys.readouterr().out
    assert f"0.06 h of audio in {sum(waits):.0f} s: 20 hours per hour; the teacher was busy" in out
    assert ("bottleneck" in out) == bool(word)
    assert word in out
