"""kill -9 at random moments: does the cache lose, repeat or change anything?

Three `spkd extract` processes fill one cache. Every two seconds or so one of them is killed with SIGKILL and started
again, until the kills are used up; then the cache is completed. Units committed before a kill must be the same files
at the end (not lost, not written again), and the content must equal that of an uninterrupted run.

    python benchmarks/cache_crash.py --kills 30

Prints what happened and, as its last line, one JSON object; keeps it in benchmarks/results/cache_crash.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import soundfile
from machine import describe

from spkd.cache import Cache, verify
from spkd.demo.synthesis import speaker, utterance
from spkd.manifest import build

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


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--kills", type=int, default=30)
    options.add_argument("--utterances", type=int, default=600, help="seven views each, one unit per view")
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

    def start(folder: str) -> subprocess.Popen:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        return subprocess.Popen([*command, f"cache={folder}"], cwd=work, **quiet)  # type: ignore[call-overload]

    root, chance = work / "crashed", random.Random(0)
    before: dict[str, int] = {}
    writers = [start("crashed") for _ in range(WRITERS)]
    kills = in_flight = 0
    while kills < given.kills:
        time.sleep(chance.uniform(1.0, 3.0))
        if (root / "COMPLETE.json").is_file():
            raise SystemExit(f"complete after {kills} kills; give more --utterances")
        which = chance.randrange(WRITERS)
        before |= committed(root)
        in_flight += len(list(root.glob("claims/*")))
        writers[which].kill()
        writers[which].communicate()
        kills += 1
        writers[which] = start("crashed")
    for writer in writers:
        _, errors = writer.communicate()
        if writer.returncode:
            raise SystemExit(f"a writer failed: {errors.decode()}")
    if not (root / "COMPLETE.json").is_file() and start("crashed").wait():
        raise SystemExit("the closing run failed")
    after = committed(root)
    lost = [name for name in before if name not in after]
    duplicated = [name for name in before if name in after and after[name] != before[name]]
    if start("whole").wait():
        raise SystemExit("the uninterrupted run failed")
    damaged = verify(root)
    result = {
        "kills": kills,
        "units": len(after),
        "units_committed_before_kills": len(before),
        "claims_open_at_kills": in_flight,
        "lost": len(lost),
        "duplicated": len(duplicated),
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
