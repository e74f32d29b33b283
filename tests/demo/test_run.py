"""The demo, made small: every step runs, and its table and report are whole."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from spkd.demo import run as demo
from spkd.demo.run import Subset


@pytest.mark.slow
def test_the_whole_pipeline(spkd: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        demo, "SUBSETS", (Subset("teacher", 8, 2, 1.2), Subset("train", 6, 2, 1.2), Subset("test", 4, 2, 1.2))
    )
    tiny = ["student.channels=16", "student.embedding=8", "steps=5", "batch_size=4", "crop=1.0"]
    monkeypatch.setattr(demo, "TEACHER", tiny)
    monkeypatch.setattr(demo, "STUDENT", tiny)
    done = spkd("demo", "--out", "d").ok()
    assert "$ spkd train --loss contrastive" in done.out
    assert done.out.count("shows the machinery, not accuracy") >= 2
    systems = json.loads(Path("d/comparison/comparison.json").read_text())["systems"]
    assert [system["label"] for system in systems] == ["teacher", "student, no teacher", "student, distilled"]
    for system in systems:
        assert f"{system['results']['eer_percent']:.2f}" in done.out
        assert 0 <= system["results"]["eer_percent"] <= 100
    decisions = re.findall(r"^\$ spkd verify (\S+) (\S+) model=bundled device=cpu\n.*: (.*)$", done.out, re.M)
    assert decisions == [
        ("d/people/2033/0.flac", "d/people/2033/1.flac", "the same speaker"),
        ("d/people/2033/0.flac", "d/people/1998/1.flac", "different speakers"),
    ]
    assert "CC BY 4.0" in Path("d/people/LICENSE.txt").read_text()
    assert "synthetic-trials.txt" in Path("d/comparison/comparison.html").read_text()
    spkd("demo", "--out", "d").ok()  # continues, nothing left to do
    assert "another seed" in spkd("demo", "--out", "d", "--seed", "1").err
    Path("mine").mkdir()
    Path("mine/thesis.tex").touch()
    assert "not a demo's folder" in spkd("demo", "--out", "mine").err
