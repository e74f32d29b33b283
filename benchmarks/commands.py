"""The commands of spkd, run by the benchmarks as a user runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

Lists = dict[str, tuple[Path, Path]]  # manifest and trials by name


def spkd(work: Path, threads: int, *arguments: str) -> None:
    """Run one command in `work`; its output goes to log.txt there, and is shown if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-c", "from spkd.cli import main; main()", *arguments]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)
    with open(work / "log.txt", "a") as log:
        log.write(f"$ spkd {' '.join(arguments)}\n{done.stdout}{done.stderr}")
    if done.returncode:
        raise SystemExit(f"failed: spkd {' '.join(arguments)}\n{done.stdout}{done.stderr}")


def evaluate(work: Path, lists: Lists, threads: int, out: str, *model: str) -> dict[str, dict]:
    """Reports of one model on every list."""
    reports = {}
    for name, (manifest, trials) in lists.items():
        target = work / out / name
        spkd(work, threads, "eval", str(trials), f"manifest={manifest}", f"out={target}", "bootstrap=0", *model)
        reports[name] = json.loads((target / "report.json").read_text())
    return reports
