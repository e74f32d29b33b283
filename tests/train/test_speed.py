from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from spkd.meter import Meter
from spkd.train import speed
from spkd.train.speed import Speed, in_words
from tests.test_meter import Clock, clock

__all__ = ["clock"]


def test_the_speed_and_what_to_do_about_waiting(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    meter = Meter()
    for _ in range(10):
        with meter.spending("loading"):
            clock.now += 0.3
        clock.now += 0.1
        meter.count(8)
    measured = Speed.of(meter, torch.device("cpu"))
    assert measured is not None
    assert (measured.views_per_second, measured.waited) == (20.0, 0.75)
    assert measured.memory_gb > 0.05
    monkeypatch.setattr(speed, "usable", lambda: 4)
    lines = in_words(measured, 60.0, from_audio=True, workers=3)
    assert lines[0].startswith("20 utterances/s; waited 75 % of the time for data; ")
    assert "raise workers=3, or extract with fbank=true" in lines[1]
    remedy = in_words(measured, 60.0, from_audio=True, workers=4)[1]
    assert remedy.endswith("take more cores, or extract with fbank=true")
    remedy = in_words(measured, 60.0, from_audio=False, workers=3)[1]
    assert "copy it to a local disk" in remedy
    assert "workers" not in remedy  # which are refused there
    assert len(in_words(measured, 59.0, from_audio=False, workers=3)) == 1  # a short run is mostly its start
    assert len(in_words(replace(measured, waited=0.01), 60.0, from_audio=True, workers=3)) == 1


def test_a_short_run_is_not_measured(clock: Clock) -> None:
    assert Speed.of(Meter(), torch.device("cpu")) is None
    assert in_words(None, 0.0, from_audio=True, workers=1) == []
