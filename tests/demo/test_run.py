"""The demo, made small: every step runs, and its table and report are whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from spkd.demo import run as demo
from spkd.demo.run import Part


def test_the_whole_pipeline(spkd: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "PARTS", (Part("teacher", 8, 2, 1.2), Part("train", 6, 2, 1.2), Part("test", 4, 2, 1.2)))
    tiny = ["student.channels=16", "student.embedding=8", "steps=5", "batch_size=4", "crop=1.0"]
    monkeypatch.setattr(demo, "TEACHER", tiny)
    monkeypatch.setattr(demo, "STUDENT", tiny)
    done = spkd("demo", "--out", "d")
    assert done.code == 0, done.err
    assert "$ spkd train --loss contrastive" in done.out
    assert done.out.count("shows the machinery, not accuracy") >= 2
    rows = json.loads(Path("d/report.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["teacher", "student, no teacher", "student, distilled"]
    assert all(0 <= row["eer_percent"] <= 100 and row["bytes"] > row["parameters"] for row in rows)
    assert "not accuracy" in Path("d/report.html").read_text()
    assert spkd("demo", "--out", "d").code == 0  # continues, nothing left to do
    assert "another seed" in spkd("demo", "--out", "d", "--seed", "1").err
    Path("mine").mkdir()
    Path("mine/thesis.tex").touch()
    assert "not a demo's folder" in spkd("demo", "--out", "mine").err
