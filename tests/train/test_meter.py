from __future__ import annotations

import time

import pytest
import torch

from spkd.train.meter import WARM_UP, Meter, in_words


def test_waiting_and_working_are_separated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spkd.train.meter.SHORT", 0.1)

    def batches() -> object:
        for _ in range(WARM_UP + 10):
            time.sleep(0.02)
            yield 0

    meter = Meter()
    for _ in meter.loading(batches()):  # type: ignore[arg-type]
        time.sleep(0.01)
        meter.count(8)
    found = meter.summary(torch.device("cpu"))
    assert 0.5 < found["waited"] < 0.8
    assert 150 < found["views_per_second"] < 280
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
