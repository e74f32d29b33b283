"""Workers that are killed, and workers that are stopped for long: does the cache lose, repeat or change anything?

Three `spkd extract` processes fill one cache, whose size follows from the speed of the machine. About every two
seconds, each time when they have filled their share of what was left, one of them is killed with SIGKILL and started
again; or it is stopped with SIGSTOP, its claim made as old as one that is taken over, and continued once another worker
had the time to do so. When the kills and stops are used up, the cache is completed. Units committed before must be the
same files at the end (not lost, not written again), and the content must equal that of an uninterrupted run, without a
row of zeros. Where the machine allows, every worker has a name space of its own, in which its host name is `worker` and
its process number 1, as in containers; their identities alone differ then.

    python benchmarks/cache_crash.py --kills 30 --stops 10

Prints what happened and, as its last line, one JSON object; keeps it in benchmarks/results/cache_crash.json.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import record
import soundfile

from spkd.cache import Cache, verify
from spkd.cache.folder import COMPLETE
from spkd.cache.owner import STALE
from spkd.corpus.manifest import build
from spkd.demo.synthesis import speaker, utterance

WRITERS = 3
SPEEDS = (0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15)  # views of an utterance, one unit each
PROBED = 210  # units, from which the speed of the machine is measured
FILLED = 0.7  # share of the units by the last kill; each kill leaves some claimed, which no other worker fills
TAKE_OVER = 2.5  # pauses that a worker is stopped for


def committed(root: Path) -> dict[str, int]:
    """Commit records by name, with their inodes: a unit written again would have another."""
    return {p.name: p.stat().st_ino for p in (root / "commits").glob("*.json")} if root.is_dir() else {}


def count(root: Path) -> int:
    """Number of committed units."""
    return len(os.listdir(root / "commits")) if (root / "commits").is_dir() else 0


def content(root: Path) -> str:
    """Digest over everything the cache serves."""
    cache, state = Cache.open(root), hashlib.sha256()
    for row in cache.usable_views:
        for name, values in cache.batch(cache.usable_views[row : row + 1], list(cache.targets)).items():
            state.update(f"{row} {name}".encode() + values.numpy().tobytes())
    return state.hexdigest()


def zero_rows(root: Path) -> int:
    """Rows of which every value is zero, as they would be where nothing was written; noise is in every frame here."""
    cache = Cache.open(root)
    count = 0
    for view in cache.usable_views:
        for values in cache.batch(np.array([view]), list(cache.targets)).values():
            count += int((values.flatten(0, -2) == 0).all(-1).sum())
    return count


def claims(root: Path) -> list[Path]:
    """The claims on units."""
    return [path for path in root.glob("claims/*") if path.name.isdecimal()]


def age(claim: Path) -> None:
    """Let a claim look as if its owner had not been there for long."""
    os.utime(claim, (time.time() - 2 * STALE,) * 2)


@functools.cache
def namespaces() -> list[str]:
    """A command that gives another one process number 1 and the host name `worker`; empty where it is not allowed."""
    command = ["unshare", "--fork", "--pid", "--mount-proc", "--uts", "--kill-child"]
    command += ["sh", "-c", 'hostname worker && exec "$@"', "sh"]
    try:
        allowed = subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return []
    return command if allowed else []


class Worker:
    """One `spkd extract`."""

    def __init__(self, root: Path, command: list[str]) -> None:
        self.root, self.command = root, command
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        wrapped = [*namespaces(), *command, f"cache={root.name}"]
        self.process = subprocess.Popen(wrapped, cwd=root.parent, **quiet)  # type: ignore[call-overload]

    @property
    def pid(self) -> int:
        """Of the process itself, which is a child of `unshare` where there are name spaces."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0]) if namespaces() and children else self.process.pid

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.process.communicate()

    def stop(self) -> bool:
        """Stop it and let its claim look abandoned. Returns whether it had one."""
        os.kill(self.pid, signal.SIGSTOP)
        started = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[19]
        aged = False
        for claim in claims(self.root):
            try:
                if json.loads(claim.read_text())["started"] == started:
                    age(claim)
                    aged = True
            except (OSError, ValueError):
                continue  # given back meanwhile
        return aged

    def proceed(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def wait(self) -> None:
        _, errors = self.process.communicate()
        if self.process.returncode:
            raise SystemExit(f"a worker failed: {errors.decode()}")


@dataclass
class Crashed:
    """What an interrupted extraction left. before: commit records seen while it ran; after: those in the end."""

    before: dict[str, int]
    after: dict[str, int]
    in_flight: int
    stopped_with_claim: int


def write_corpus(work: Path, utterances: int) -> None:
    """Audio of one second each, and manifest.csv; what is there is kept."""
    for i in range(utterances):
        path = work / "audio" / f"s{i % 20}" / f"{i}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            soundfile.write(path, utterance(speaker(i % 20), i, 1.0), 16_000)
    manifest, _, _ = build(work / "audio", "folder")
    manifest.save(work / "manifest.csv")


def units_per_second(work: Path, command: list[str]) -> float:
    """Units that the workers together commit in a second, once they have started."""
    root = work / "probe"
    workers, start, before = [Worker(root, command) for _ in range(WRITERS)], 0.0, 0
    while (now := count(root)) < PROBED and not (root / COMPLETE).is_file():
        if now and not start:
            start, before = time.perf_counter(), now
        time.sleep(0.01)
    rate = (now - before) / (time.perf_counter() - start) if now > before else float(PROBED)
    for worker in workers:
        worker.kill()
    shutil.rmtree(root)
    return rate


def interrupt(
    root: Path, command: list[str], todo: list[str], units: int, pause: float, chance: random.Random
) -> Crashed | None:
    """Fill a cache of so many units under kills and stops, each when a share of the units that were left is there.

    Returns:
        None where the workers ended before the last of them: a stop took longer than the rest, or all units that were
        left were claimed by killed ones.
    """
    done = Crashed({}, {}, 0, 0)
    workers = [Worker(root, command) for _ in range(WRITERS)]
    for number, what in enumerate(todo):
        now, working = count(root), True
        place = now + chance.uniform(0.5, 1.5) * (FILLED * units - now) / (len(todo) - number + 1)
        while count(root) < place and (working := any(worker.process.poll() is None for worker in workers)):
            time.sleep(0.02)
        if (root / COMPLETE).is_file() or not working:
            for worker in workers:
                worker.wait()
            return None
        which = chance.randrange(WRITERS)
        done.before |= committed(root)
        done.in_flight += len(claims(root))
        if what == "kill":
            workers[which].kill()
            workers[which] = Worker(root, command)
            continue
        done.stopped_with_claim += workers[which].stop()
        # The others pass a claim only once: a new worker begins at the first unit and takes it over.
        other = (which + 1) % WRITERS
        workers[other].kill()
        workers[other] = Worker(root, command)
        time.sleep(TAKE_OVER * pause)
        done.before |= committed(root)
        workers[which].proceed()
    for worker in workers:
        worker.wait()
    if not (root / COMPLETE).is_file():
        # Nobody can see into the name space of a killed worker: its claim lives until it is old.
        for claim in root.glob("claims/*"):
            age(claim)
        Worker(root, command).wait()
    done.after = committed(root)
    return done


def main() -> None:
    options = record.options(__doc__, "cache_crash")
    options.add_argument("--kills", type=int, default=30)
    options.add_argument("--stops", type=int, default=10)
    options.add_argument("--pause", type=float, default=2.0, help="mean seconds between two of them")
    given = record.parse(options, kills=1, stops=1, pause=0.2)
    work = given.work
    shutil.rmtree(work, ignore_errors=True)
    command = [
        *(sys.executable, "-c", "from spkd.cli import main; main()", "extract", "teacher=none"),
        *(f"view.speeds=[{','.join(map(str, SPEEDS))}]", "storage.unit_views=1", "view.noise=synthetic"),
    ]
    todo, chance = ["kill"] * given.kills + ["stop"] * given.stops, random.Random(0)
    chance.shuffle(todo)
    # As many utterances as the machine fills caches with while kills and stops take place.
    seconds = given.pause * (given.kills + given.stops * (1 + TAKE_OVER))
    utterances = PROBED // len(SPEEDS)
    write_corpus(work, utterances)
    if not given.tiny:
        utterances = max(utterances, round(1.5 * units_per_second(work, command) * seconds / len(SPEEDS)))
    root, done = work / "crashed", None
    while done is None:
        write_corpus(work, utterances)
        print(f"{utterances} utterances, {len(SPEEDS) * utterances} units", flush=True)
        done = interrupt(root, command, todo, len(SPEEDS) * utterances, given.pause, chance)
        if done is None:
            print("the workers ended before the last kill: again with twice as many", flush=True)
            shutil.rmtree(root)
            utterances *= 2
    for worker in [Worker(work / "whole", command) for _ in range(WRITERS)]:
        worker.wait()
    damaged = verify(root)
    result = {
        "kills": given.kills + given.stops,
        "stops": given.stops,
        "stopped_with_a_claim": done.stopped_with_claim,
        "equal_host_names_and_pids": bool(namespaces()),
        "units": len(done.after),
        "units_committed_before": len(done.before),
        "claims_open": done.in_flight,
        "lost": len(done.before.keys() - done.after.keys()),
        "duplicated": sum(done.after.get(name, inode) != inode for name, inode in done.before.items()),
        "zero_rows": zero_rows(root),
        "content_identical": content(root) == content(work / "whole") and not damaged,
        "leftover_parts": len(list(root.glob("**/*.part"))),
    }
    for name, value in result.items():
        print(f"{name:30} {value}")
    record.keep("cache_crash", result, given.tiny)


if __name__ == "__main__":
    main()
