"""Every benchmark runs to its end with small numbers."""

from __future__ import annotations

import json
import os
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import HAS_SPEECHBRAIN

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = sorted(path.stem for path in BENCHMARKS.glob("*.py") if 'if __name__ == "__main__"' in path.read_text())
# These start processes, which import torch, or take longer than five seconds (`pytest -m slow` runs them); the last two
# import speechbrain, whose lazy modules break hypothesis in the tests that follow in the same process.
SLOW = {
    *(
        "audio_in",
        "audio_remote",
        "buffers",
        "bundled",
        "busy",
        "cache_codecs",
        "cache_crash",
        "cache_scale",
        "cache_write",
        "eval_scale",
        "export_agree",
        "export_students",
        "extract_overhead",
        "extract_scale",
        "flips",
        "frame_codecs",
        "frame_times",
        "fuzz",
        "gpu",
        "install",
        "nested",
        "mapping",
        "papers",
        "papers_why",
        "power_cut",
        "pseudo_label",
        "recipe",
        "scale",
        "score_trials",
        "silence",
        "web",
    ),
    *("train_ddp", "train_resume", "metrics_agree", "teachers_equal"),
}


@pytest.fixture
def cores() -> Iterator[None]:
    """The cores of this process are those from before, whatever a benchmark made of them: loading has processes where
    there are several."""
    before = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    yield
    if before is not None:
        os.sched_setaffinity(0, before)


@pytest.mark.usefixtures("cores")
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in SCRIPTS])
def test_it_ends_with_one_line_of_json(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "metrics_agree" and not HAS_SPEECHBRAIN:
        pytest.skip("needs speechbrain")
    if name == "formants":
        pytest.importorskip("parselmouth")
    if name == "silence":
        pytest.importorskip("silero_vad")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--list" if name == "tables" else "--tiny"])
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    kept = {path: path.read_bytes() for path in (BENCHMARKS / "results").iterdir()}
    runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")
    last = capsys.readouterr().out.splitlines()[-1]
    assert isinstance(json.loads(last), dict)
    assert '"error: ' not in last  # gpu.py goes on after one
    assert kept == {path: path.read_bytes() for path in (BENCHMARKS / "results").iterdir()}
