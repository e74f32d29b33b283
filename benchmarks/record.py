"""Options that all benchmarks share, and the files that keep their results."""

from __future__ import annotations

import argparse
import atexit
import datetime
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from corpora import synthesise
from machine import describe

HERE = Path(__file__).parent
RESULTS = HERE / "results"
STARTED = time.time()


def options(
    description: str | None, work: str = "", data: bool = False, teacher: bool = True
) -> argparse.ArgumentParser:
    """Options of a benchmark.

    Args:
        description: the module's docstring.
        work: name of the folder that the benchmark works in, below benchmarks/work; "" where it needs none.
        data: whether it needs real speech.
        teacher: whether it then needs the pretrained teacher, too.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small numbers, for a test; nothing is kept")
    if work:
        parser.add_argument("--work", type=Path, default=HERE / "work" / work)
    if data:
        parser.add_argument("--data", type=Path, help="folder of the corpora")
    if data and teacher:
        parser.add_argument("--teacher", type=Path, help="weights of the GE2E d-vector")
    return parser


def parse(parser: argparse.ArgumentParser, **tiny: Any) -> argparse.Namespace:
    """The options of the command line; relative paths are made absolute.

    Args:
        tiny: values that options have with --tiny where they are not given. The folder to work in is then a temporary
            one, so that an unfinished work of full size is left alone.
    """
    if parser.parse_known_args()[0].tiny:
        folder = tempfile.mkdtemp(prefix="spkd-benchmark-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        parser.set_defaults(work=Path(folder) / "work", **tiny)
    given = parser.parse_args()
    for name, value in vars(given).items():
        if isinstance(value, Path):
            setattr(given, name, value.resolve())
    needed = [f"--{name}" for name in ("data", "teacher") if name in vars(given)]
    if any(getattr(given, name[2:]) is None for name in needed):
        if not given.tiny:
            parser.error(f"{' and '.join(needed)} needed (--tiny synthesises its own)")
        given.data, given.teacher = synthesise(given.work.parent / "data")
    return given


def keep(name: str, result: dict[str, Any], tiny: bool) -> None:
    """Print a result as the last line, and keep it in results/NAME.json, unless it is tiny."""
    minutes = round((time.time() - STARTED) / 60, 1)
    result = result | {
        "date": f"{datetime.date.today()}",
        "commit": commit(),
        "minutes": minutes,
        "machine": describe(),
    }
    if not tiny:
        (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def kept(name: str) -> dict[str, Any]:
    """A result that was kept."""
    if not (RESULTS / f"{name}.json").is_file():
        raise SystemExit(f"no result of {name}.py: python benchmarks/tables.py --run {name}")
    return json.loads((RESULTS / f"{name}.json").read_text())


def commit() -> str:
    """Short hash of the commit that is checked out, with a plus sign where the code differs from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", "../spkd", "*.py")
    return f"{git('rev-parse', '--short', 'HEAD') or 'unknown'}{'+' if changed else ''}"


def figure(value: float) -> str:
    """A small number for a table, like 2.1e-9."""
    digits, _, exponent = f"{value:.1e}".partition("e")
    return f"{digits}e{int(exponent)}"
