"""Size of an installation, and of what every extra adds to it.

    python benchmarks/install.py --torch torch==2.13.0+cpu

Makes a virtual environment with spkd and no extra, then one for each extra: a copy of the first, linked file by file,
into which the extra is installed. What an extra adds is every file that is not shared with the first. --torch is what
pip is given for torch: the build for CPUs, without which the usual one comes with its CUDA libraries. The seconds are
those of pip, downloads included. What was installed is kept in the folder of the work, and the same command continues.
--tiny installs nothing and adds up the files of the packages that are here. The last line is one JSON object: MB and
seconds of the first environment and of every extra, the largest packages of the first, and the processor's seconds of
`import spkd`, of `spkd --help` and of Python alone.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterable
from importlib.metadata import Distribution, distributions
from pathlib import Path

import record
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FOR_TESTS = ("dev", "oracles")
MB = 1e6
RUNS = 7  # of which the median counts


def main() -> None:
    parser = record.options(__doc__, "install")
    parser.add_argument("--torch", default="torch", help="what pip is given for torch")
    parser.add_argument("--extras", nargs="+", choices=[*PROJECT["optional-dependencies"]], help="default: every one")
    given = record.parse(parser, extras=["cpu", "onnx"])
    extras = given.extras or [extra for extra in PROJECT["optional-dependencies"] if extra not in FOR_TESTS]
    python = Path(sys.executable)
    if given.tiny:
        first = {"mb": packages_mb(dependencies(())) / MB, "seconds": None, "failed": None}
        adds = {extra: {"mb": extra_mb(extra), "seconds": None, "failed": None} for extra in extras}
    else:
        python = given.work / "first" / "bin" / "python"
        first = made(given.work, "first", lambda: install_first(given.work, given.torch))
        adds = {extra: made(given.work, extra, lambda e=extra: install_extra(e, given.work)) for extra in extras}
    result = {"first": first, "extras": adds, "torch": given.torch}
    commands = {
        "import": ["-c", "import spkd"],
        "help": ["-c", "from spkd.cli import main; main()", "--help"],
        "python": ["-c", "pass"],
    }
    runs = 1 if given.tiny else RUNS
    result |= {f"{name}_seconds": seconds_of(python, arguments, runs) for name, arguments in commands.items()}
    result["largest"] = largest(python)
    print(table(result))
    record.keep("install", result, given.tiny)


def made(work: Path, name: str, make: Callable[[], dict]) -> dict:
    """What was installed before under a name, or is installed now."""
    path = work / "made.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    if name not in known:
        known[name] = make()
        print(f"{name}: {known[name]}", flush=True)
        path.write_text(json.dumps(known))
    return known[name]


def install_first(work: Path, torch: str) -> dict:
    """Make the environment without extras. Returns its MB and seconds."""
    folder = work / "first"
    if folder.exists():
        raise SystemExit(f"{folder} is not complete; remove it")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    empty, start = files(folder), time.perf_counter()
    pip(folder / "bin/python", [torch, str(ROOT)])
    return {"mb": added(folder, empty), "seconds": time.perf_counter() - start, "failed": None}


def install_extra(extra: str, work: Path) -> dict:
    """Install an extra into a linked copy of the environment without extras; the copy is removed."""
    folder, first = work / extra, work / "first"
    subprocess.run(["cp", "-al", str(first), str(folder)], check=True)
    start, failed = time.perf_counter(), None
    try:
        pip(folder / "bin/python", [f"{ROOT}[{extra}]"])
    except subprocess.CalledProcessError as error:
        failed = next((line for line in reversed(error.stderr.splitlines()) if line.startswith("ERROR")), "pip failed")
    seconds, mb = time.perf_counter() - start, added(folder, files(first))
    subprocess.run(["rm", "-rf", str(folder)], check=True)
    return {"mb": mb, "seconds": seconds, "failed": failed}


def pip(python: Path, what: list[str]) -> None:
    command = [str(python), "-m", "pip", "install", "-q", "--no-compile", *what]
    subprocess.run(command, check=True, capture_output=True, text=True)


def files(folder: Path) -> dict[int, int]:
    """Number of every file below a folder on its disk -> its bytes."""
    found = (os.lstat(os.path.join(at, name)) for at, _, names in os.walk(folder) for name in names)
    return {each.st_ino: each.st_size for each in found}


def added(folder: Path, before: dict[int, int]) -> float:
    """MB of the files below a folder that were not there before."""
    return sum(size for number, size in files(folder).items() if number not in before) / MB


def dependencies(extras: Iterable[str]) -> set[str]:
    """Names of the packages that spkd needs with some extras, and of those that they need, as far as they are here."""
    everything = {canonicalize_name(each.name): each for each in distributions() if each.name}
    found: set[str] = set()
    waiting = list(requirements(extras))
    while waiting:
        name = canonicalize_name(waiting.pop().name)
        if name in found or name not in everything:
            continue
        found.add(name)
        needs = map(Requirement, everything[name].requires or ())
        waiting += [need for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found


def requirements(extras: Iterable[str]) -> list[Requirement]:
    """What spkd needs with some extras, by pyproject.toml."""
    found = [*map(Requirement, PROJECT["dependencies"])]
    for extra in extras:
        for each in map(Requirement, PROJECT["optional-dependencies"][extra]):
            found += requirements(each.extras) if each.name == PROJECT["name"] else [each]
    return found


def extra_mb(extra: str) -> float:
    """MB that an extra adds here."""
    return packages_mb(dependencies([extra]) - dependencies(())) / MB


def packages_mb(names: Iterable[str]) -> float:
    """Bytes of the files of packages."""
    by_name = {canonicalize_name(each.name): each for each in distributions() if each.name}
    return sum(size_of(by_name[name]) for name in names)


def size_of(package: Distribution) -> int:
    """Bytes of the files of a package, as its record has them."""
    return sum(file.size or 0 for file in package.files or ())


def largest(python: Path) -> dict[str, float]:
    """The five largest packages of an environment, with their MB."""
    folders = [str(path) for path in python.parents[1].glob("lib/python*/site-packages")]
    sizes = {each.name: size_of(each) / MB for each in distributions(path=folders)}
    return dict(sorted(sizes.items(), key=lambda item: -item[1])[:5])


def seconds_of(python: Path, arguments: list[str], runs: int) -> float:
    """The processor's seconds of a command of Python, the median of several runs after a first one."""
    seconds = []
    for _ in range(runs + 1):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([str(python), *arguments], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    return statistics.median(seconds[1:])


def table(result: dict) -> str:
    """Of docs/install.md."""
    lines = ["| | MB | s |", "|---|---|---|"]
    for name, row in {"no extra": result["first"], **result["extras"]}.items():
        label = name if name == "no extra" else f"`{name}`"
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.0f}"
        size = f"{row['mb']:,.0f}" if row["mb"] >= 10 else f"{row['mb']:.1f}"
        lines.append(f"| {label} | {'cannot be installed here' if row['failed'] else size} | {seconds} |")
    largest_ = ", ".join(f"{name} {mb:.0f}" for name, mb in result["largest"].items())
    took = [result[f"{name}_seconds"] for name in ("help", "import", "python")]
    lines += [
        "",
        f"Largest packages without an extra (MB): {largest_}. Processor's seconds: `spkd --help` {took[0]:.2f}, ",
    ]
    lines[-1] += f"`import spkd` {took[1]:.2f}, Python alone {took[2]:.2f}."
    return "\n".join(lines)


if __name__ == "__main__":
    main()
