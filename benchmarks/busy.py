"""Training and extraction beside other work: how much of their fair share of the cores do they keep?

Processes that only keep cores busy, two for every core, run and rest in turns beside a command. A command with a thread
of torch for every core has a fair share of a third of its speed alone; `share_kept_...` is the part of it that is kept,
more than 1 where a command has further threads, or left a part of the cores idle when it was alone.
Student and teacher are small: the shorter an operation, the more often its threads wait for one another. A waiting
thread turns in a loop, GOMP_SPINCOUNT times, before it sleeps. --spins compares numbers of turns; `torch` is torch's
own way, `spkd` that of the commands. All take turns, so that they meet the same machine.

`share_kept_half_core` is the training's speed in a control group of half a core, over half of its speed on one core;
null where no such group can be made.

    python benchmarks/busy.py --spins spkd torch 0 1000 10000

Prints a table and, as its last line, one JSON object; keeps it in benchmarks/results/busy.json.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import record

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from extract_overhead import corpus  # noqa: E402
from train_overhead import prepare  # noqa: E402

from spkd.cores import usable  # noqa: E402
from tests.processes import half_a_core  # noqa: E402

WHAT = ("training", "extraction")
OTHERS = 2  # busy processes for every core
ONE, HALF = "one core", "half a core"
OWN = ("GOMP_SPINCOUNT", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")  # variables that the measurement sets itself


class Worker:
    """A process of busy_work.py, until the end of the block.

    Attributes:
        threads: of torch.
    """

    def __init__(self, spins: str, place: str, what: str, given: argparse.Namespace) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in OWN}
        if spins.isdecimal():
            environment["GOMP_SPINCOUNT"] = spins
        environment["PYTHONPATH"] = str(HERE.parent)
        command = [sys.executable, str(HERE / "busy_work.py"), spins, place, what, str(given.work), str(given.channels)]
        piped = subprocess.PIPE
        self._process = subprocess.Popen(command, env=environment, stdin=piped, stdout=piped, text=True)
        self._in, self._out = self._process.stdin, self._process.stdout
        self.threads = int(self._answer())

    def speed(self, seconds: float) -> tuple[float, float]:
        """Work per second over some seconds, and cores in use."""
        print(seconds, file=self._in, flush=True)
        rate, cores = map(float, self._answer().split())
        return rate, cores

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def _answer(self) -> str:
        assert self._out is not None
        if not (line := self._out.readline()):
            raise SystemExit("busy_work.py has failed")
        return line


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[list[subprocess.Popen]]:
    """Processes that keep cores busy; they are stopped at first."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        signal_all(processes, signal.SIGSTOP)
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def signal_all(processes: list[subprocess.Popen], number: int) -> None:
    for process in processes:
        process.send_signal(number)


def compare(workers: dict[str, Worker], beside: list[str], given: argparse.Namespace) -> dict[str, dict]:
    """Speeds of workers alone, and of those that are named in `beside` beside busy processes, in rounds.

    Returns:
        For each worker its lists of `alone`, `beside`, and cores in use.
    """
    found = {name: {key: [] for key in ("alone", "beside", "cores_alone", "cores_beside")} for name in workers}

    def add(name: str, key: str) -> None:
        speed, cores = workers[name].speed(given.seconds)
        found[name][key].append(speed)
        found[name][f"cores_{key}"].append(cores)

    with busy_processes(OTHERS * usable()) as processes:
        for _ in range(given.rounds):
            for name in workers:
                add(name, "alone")
            signal_all(processes, signal.SIGCONT)
            for name in beside:
                add(name, "beside")
            signal_all(processes, signal.SIGSTOP)
    return found


def ratios(above: list[float], below: list[float], scale: float = 1.0) -> dict[str, float]:
    """Median, least and greatest ratio of two measurements of every round."""
    each = [scale * a / b for a, b in zip(above, below, strict=True)]
    found = {"median": statistics.median(each), "least": min(each), "most": max(each)}
    return {name: round(value, 3) for name, value in found.items()}


def row(what: str, spins: str, threads: int, found: dict[str, list[float]], idle: list[float]) -> dict[str, Any]:
    """Figures of one way to wait.

    Args:
        idle: speeds alone of torch without any setting.
    """
    cores, others = usable(), OTHERS * usable()
    fair = cores * threads / (threads + others) / min(threads, cores)
    medians = {key: round(statistics.median(values), 2) for key, values in found.items()}
    kept = ratios(found["beside"], found["alone"], 1 / fair)
    return {"what": what, "spins": spins, "threads": threads, **medians, "fair": round(fair, 3), "kept": kept,
            "alone_over_torch": ratios(found["alone"], idle)}  # fmt: skip


def main() -> None:
    options = record.options(__doc__, "busy")
    options.add_argument("--spins", nargs="+", default=["spkd", "torch"], help="spkd, torch and numbers of turns")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--seconds", type=float, default=3.0, help="of every measurement")
    options.add_argument("--channels", type=int, default=128, help="of the student")
    options.add_argument("--speakers", type=int, default=16)
    given = record.parse(options, rounds=1, seconds=0.1, channels=16, speakers=2)
    spins = list(dict.fromkeys(["spkd", "torch", *given.spins]))
    shutil.rmtree(given.work, ignore_errors=True)
    given.work.mkdir(parents=True)
    prepare(given.work, given.speakers)
    corpus(given.work, given.speakers)
    with contextlib.ExitStack() as started:
        group = started.enter_context(half_a_core())
        commands: dict[str, dict[str, Worker]] = {}
        for what in WHAT:
            places = dict.fromkeys(spins, "all cores")
            if what == "training" and group is not None:
                places |= {ONE: ONE, HALF: str(group)}
            commands[what] = {
                name: started.enter_context(Worker(name if name in spins else "spkd", place, what, given))
                for name, place in places.items()
            }
        found = {what: compare(workers, spins, given) for what, workers in commands.items()}
    rows = [
        row(what, name, workers[name].threads, found[what][name], found[what]["torch"]["alone"])
        for what, workers in commands.items()
        for name in spins
    ]
    for one in rows:
        print(*(f"{key} {value}" for key, value in one.items()), sep="  ")
    result: dict[str, object] = {}
    for one in rows:
        if one["spins"] == "spkd":
            result[f"share_kept_{one['what']}"] = one["kept"]["median"]
            result[f"idle_speed_over_torch_{one['what']}"] = one["alone_over_torch"]["median"]
    places = found["training"]
    half = ratios(places[HALF]["alone"], places[ONE]["alone"], 2.0) if HALF in places else None
    result["share_kept_half_core"] = half and half["median"]
    counts = {"others": OTHERS * usable(), "rounds": given.rounds}
    record.keep("busy", result | counts | {"half_core": half, "rows": rows}, given.tiny)


if __name__ == "__main__":
    main()
