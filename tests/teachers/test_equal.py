"""The benchmark that compares every family with its own library runs, in its tiny mode."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..conftest import HAS_SPEECHBRAIN

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not HAS_SPEECHBRAIN, reason="needs speechbrain")
@pytest.mark.slow
def test_the_benchmark_finds_every_family_equal_to_its_library() -> None:
    for name in ("onnx", "onnxscript", "onnxruntime", "sherpa_onnx", "transformers"):
        pytest.importorskip(name)
    command = [sys.executable, str(ROOT / "benchmarks" / "teachers_equal.py"), "--tiny"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["models"] == 9  # two of speechbrain, transformers and both grids, and one of ONNX
    assert report["max_cosine_distance"] < 1e-6
