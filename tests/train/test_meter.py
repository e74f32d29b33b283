from __future__ import annotations

import pytest
import torch

from spkd.train import meter as meters
from spkd.train.meter import WARM_UP, Meter, in_words


class Clock:
    now = 0.0

    def perf_counter(self) -> float:
        return self.now


def test_waiting_and_working_are_separated(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(meters, "time", clock)

    def batches() -> object:
        for _ in range(WARM_UP + 10):
            clock.now += 0.6
            yield 0

    meter = Meter()
    for _ in meter.loading(batches()):  # type: ignore[arg-type]
        clock.now += 0.4
        meter.count(8)
    found = meter.summary(torch.device("cpu"))
    # Counting starts when the last step of the warm-up is done: ten steps of a second are left.
    assert (found["waited"], found["views_per_second"]) == (0.6, 8.0)
    assert found["memory_gb"] > 0.05
    lines = in_words(found, from_audio=True, workers=3)
    assert "raise workers=3, or extract with fbank=true" in lines[1]
    assert "copy it to a local disk" in in_words(found, from_audio=False, workers=3)[1]
    assert len(in_words(found | {"waited": 0.01}, from_audio=True, workers=3)) == 1


def test_a_short_run_is_not_measured() -> None:
    meter = Meter()
    meter.count(8)
    assert meter.summary(torch.device("cpu")) == {}
    assert in_words({}, from_audio=True, workers=1) == []
