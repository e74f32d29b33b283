"""Workers that are killed, and workers that are stopped for long: does the cache lose, repeat or change anything?

Three `spkd extract` processes fill one cache. Every two seconds or so one of them is killed with SIGKILL and started
again; or it is stopped with SIGSTOP, its claim made as old as one that is taken over, and continued once another worker
had the time to do so. When the kills and stops are used up, the cache is completed. Units committed before must be the
same files at the end (not lost, not written again), and the content must equal that of an uninterrupted run, without a
row of zeros. Where the machine allows, every worker has a name space of its own, in which its host name is `worker` and
its process number 1, as in containers; their identities alone differ then.

    python benchmarks/cache_crash.py --kills 30 --stops 10

Prints what happened and, as its last line, one JSON object; keeps it in benchmarks/results/cache_crash.json.
"""

from __future__ import annotations

import argparse
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
from pathlib import Path

import numpy as np
import soundfile
from machine import describe

from spkd.cache import Cache, verify
from spkd.cache.claims import STALE
from spkd.cache.folder import COMPLETE
from spkd.corpus.manifest import build
from spkd.demo.synthesis import speaker, utterance

HERE = Path(__file__).parent
WRITERS = 3


def committed(root: Path) -> dict[str, int]:
    """Commit records by name, with their inodes: a unit written again would have another."""
    return {p.name: p.stat().st_ino for p in (root / "commits").glob("*.json")} if root.is_dir() else {}


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
        for claim in self.root.glob("claims/*"):
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


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--kills", type=int, default=30)
    options.add_argument("--stops", type=int, default=10)
    options.add_argument("--utterances", type=int, default=1000, help="seven views each, one unit per view")
    options.add_argument("--work", type=Path, default=HERE / "work" / "cache_crash")
    given = options.parse_args()
    work = given.work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    for i in range(given.utterances):
        path = work / "audio" / f"s{i % 20}" / f"{i}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, utterance(speaker(i % 20), i, 1.0), 16_000)
    manifest, _, _ = build(work / "audio", "folder")
    manifest.save(work / "manifest.csv")
    command = [
        *(sys.executable, "-c", "from spkd.cli import main; main()", "extract", "teacher=none"),
        *("view.speeds=[0.85,0.9,0.95,1.0,1.05,1.1,1.15]", "storage.unit_views=1", "view.noise=synthetic"),
    ]
    root, chance = work / "crashed", random.Random(0)
    before: dict[str, int] = {}
    workers = [Worker(root, command) for _ in range(WRITERS)]
    todo = ["kill"] * given.kills + ["stop"] * given.stops
    chance.shuffle(todo)
    in_flight = stopped_with_claim = 0
    for what in todo:
        time.sleep(chance.uniform(1.0, 3.0))
        if (root / COMPLETE).is_file():
            raise SystemExit("complete before the last kill; give more --utterances")
        which = chance.randrange(WRITERS)
        before |= committed(root)
        in_flight += len(list(root.glob("claims/*")))
        if what == "kill":
            workers[which].kill()
            workers[which] = Worker(root, command)
            continue
        stopped_with_claim += workers[which].stop()
        # The others pass a claim only once: a new worker begins at the first unit and takes it over.
        other = (which + 1) % WRITERS
        workers[other].kill()
        workers[other] = Worker(root, command)
        time.sleep(5.0)
        before |= committed(root)
        workers[which].proceed()
    for worker in workers:
        worker.wait()
    if not (root / COMPLETE).is_file():
        # Nobody can see into the name space of a killed worker: its claim lives until it is old.
        for claim in root.glob("claims/*"):
            age(claim)
        Worker(root, command).wait()
    after = committed(root)
    lost = [name for name in before if name not in after]
    duplicated = [name for name in before if name in after and after[name] != before[name]]
    for worker in [Worker(work / "whole", command) for _ in range(WRITERS)]:
        worker.wait()
    damaged = verify(root)
    result = {
        "kills": given.kills + given.stops,
        "stops": given.stops,
        "stopped_with_a_claim": stopped_with_claim,
        "equal_host_names_and_pids": bool(namespaces()),
        "units": len(after),
        "units_committed_before": len(before),
        "claims_open": in_flight,
        "lost": len(lost),
        "duplicated": len(duplicated),
        "zero_rows": zero_rows(root),
        "content_identical": content(root) == content(work / "whole") and not damaged,
        "leftover_parts": len(list(root.glob("**/*.part"))),
        "machine": describe(),
    }
    for name, value in result.items():
        print(f"{name:30} {value}")
    (HERE / "results" / "cache_crash.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
