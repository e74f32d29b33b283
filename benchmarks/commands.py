"""The commands of spkd, run by the benchmarks as a user runs them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

from spkd.device import has_bfloat16

HERE = Path(__file__).parent
Lists = dict[str, tuple[Path, Path]]  # manifest and trials by name
MAIN = "from spkd.cli import main; main()"


def spkd(work: Path, threads: int, *arguments: str, python: Path | None = None) -> str:
    """Run one command in `work`; its output goes to log.txt there, and is shown if it fails. Returns what it printed.

    A processor without bfloat16 arithmetic takes float32, with which it is many times as fast.

    Args:
        threads: of its process; 0 runs it in this process, where the time that a process needs to start matters.
        python: interpreter of another environment; None: the one that runs this.
    """
    if not has_bfloat16():
        arguments = tuple("precision=fp32" if one == "precision=bf16" else one for one in arguments)
    if threads or python:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads or 1), "PYTHONPATH": str(HERE.parent)}
        command = [str(python or sys.executable), "-W", "ignore", "-c", MAIN, *arguments]
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)
        code, printed, errors = done.returncode, done.stdout, done.stderr
    else:
        code, printed, errors = in_this_process(work, arguments)
    with open(work / "log.txt", "a") as log:
        log.write(f"$ spkd {' '.join(arguments)}\n{printed}{errors}")
    if code:
        raise SystemExit(f"failed: spkd {' '.join(arguments)}\n{printed}{errors}")
    return printed


def in_this_process(work: Path, arguments: tuple[str, ...]) -> tuple[int, str, str]:
    """Exit code, output and errors of a command."""
    from spkd.cli import app

    printed, errors = io.StringIO(), io.StringIO()
    with contextlib.chdir(work), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        try:
            app(list(arguments), standalone_mode=False)
            code = 0
        except SystemExit as exit_:
            code = int(exit_.code or 0)
    return code, printed.getvalue(), errors.getvalue()


def evaluate(work: Path, lists: Lists, threads: int, out: str, *model: str) -> dict[str, dict]:
    """Reports of one model on every list."""
    reports = {}
    for name, (manifest, trials) in lists.items():
        target = work / out / name
        spkd(work, threads, "eval", str(trials), f"manifest={manifest}", f"out={target}", "bootstrap=0", *model)
        reports[name] = json.loads((target / "report.json").read_text())
    return reports
