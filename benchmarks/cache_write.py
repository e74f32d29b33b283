"""Writing frames of fp16 x 512 as `spkd extract` does, against writing the same bytes raw.

Each writer is a process of its own that claims units of one cache, hands over batches of float16 (rounded on the
teacher's device) and commits: finiteness check, placing, checksums, fsync and rename included. The raw write puts the
same blocks into one file per writer, one behind the other, and calls fsync. Both are interleaved in one run; ratios
are medians over the rounds. Memory is the writers' own, above what it was before.

    python benchmarks/cache_write.py

Prints a table and, as its last line, one JSON object; keeps it in benchmarks/results/cache_write.json.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import record

HERE = Path(__file__).parent
COMMON = """
import json, os, sys, time
from pathlib import Path
import numpy as np
import torch
from spkd.cache import Background, Plan, UnitWriter, claim_units, finalize, initialise
from spkd.cache.codec import make_codec
from spkd.outputs.target import Target
from spkd.corpus.manifest import Manifest, Utterance
from synthetic import make_card, whole_views

torch.set_num_threads(1)
DIM, HOP, FRAMES, BATCH = 512, 160, 400, 32
TARGET = Target("frames", DIM, HOP, 0)

def memory_kb(which):  # VmRSS now, VmHWM at most
    return int(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if which in line))

def plan_of(utterances):
    samples = np.full(utterances, (FRAMES - 1) * HOP)
    manifest = Manifest(tuple(Utterance(f"u{i}", "", None, float(s) / 16_000) for i, s in enumerate(samples)))
    return manifest, Plan.make(manifest, whole_views(samples), 128, 1280.0)

def go(ready):  # all writers start together
    Path(ready).touch()
    while not Path(ready).with_name("go").exists():
        time.sleep(0.001)

folder, ready, utterances = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
random = np.random.RandomState(0)
"""
CACHE = (
    COMMON
    + """
manifest, plan = plan_of(utterances)
card = make_card([TARGET], manifest, plan)
initialise(folder, card, [plan])
fitted = {TARGET.name: make_codec(TARGET.codec, DIM)}
outputs = random.standard_normal((BATCH, FRAMES, DIM)).astype(np.float16)
Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the preparations
before = memory_kb("VmRSS")
go(ready)
start = time.perf_counter()
with Background() as background:
    for unit in claim_units(folder, plan.units):
        writer = UnitWriter(folder, card, plan, unit, fitted)
        views = np.array(plan.unit(unit))
        for i in range(0, len(views), BATCH):
            background(writer.put, TARGET.name, views[i : i + BATCH], outputs[: len(views[i : i + BATCH])])
        background.commit(writer.commit)
finalize(folder, card, plan)
print(json.dumps({"seconds": time.perf_counter() - start, "memory_mb": (memory_kb("VmHWM") - before) / 1024}))
"""
)
RAW = (
    COMMON
    + """
block = random.standard_normal((BATCH, FRAMES, DIM)).astype(np.float16).tobytes()
go(ready)
start = time.perf_counter()
descriptor = os.open(str(ready) + ".raw", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
for _ in range(utterances // BATCH):
    os.write(descriptor, block)
os.fsync(descriptor)
os.close(descriptor)
print(json.dumps({"seconds": time.perf_counter() - start}))
"""
)


def run(code: str, work: Path, writers: int, utterances: int) -> tuple[float, float]:
    """Seconds until the last of `writers` processes is done, and the most memory any of them took (MB)."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    os.sync()
    ready = [work / f"ready{i}" for i in range(writers)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(work / "cache"), str(path), str(utterances)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])},
        )
        for path in ready
    ]
    while not all(path.exists() for path in ready) and all(process.poll() is None for process in processes):
        time.sleep(0.01)
    (work / "go").touch()
    printed = [process.communicate() for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit("a writer failed:\n" + "".join(errors for _, errors in printed))
    outputs = [json.loads(line) for line, _ in printed]
    return max(s["seconds"] for s in outputs), max(s.get("memory_mb", 0.0) for s in outputs)


def main() -> None:
    options = record.options(__doc__, "cache_write")
    options.add_argument("--utterances", type=int, default=2048, help="400 frames each; 2048 make 0.84 GB")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--writers", type=int, nargs="+", default=[1, 2, 4])
    given = record.parse(options, utterances=128, rounds=1, writers=[2])
    size = given.utterances * 400 * 512 * 2
    rows = {}
    print(f"{'writers':>7} {'raw MB/s':>9} {'spkd MB/s':>10} {'ratio':>6}   (least..most)   {'memory (MB)':>11}")
    for writers in given.writers:
        raw, ours, memory = [], [], []
        for _ in range(given.rounds):
            raw.append(run(RAW, given.work, writers, given.utterances // writers)[0])
            seconds, megabytes = run(CACHE, given.work, writers, given.utterances)
            ours.append(seconds)
            memory.append(megabytes)
        ratios = [a / b for a, b in zip(raw, ours, strict=True)]
        rows[writers] = {
            "raw_mb_s": round(size / 1e6 / statistics.median(raw)),
            "spkd_mb_s": round(size / 1e6 / statistics.median(ours)),
            "ratio_to_raw_write": round(statistics.median(ratios), 3),
            "least": round(min(ratios), 3),
            "most": round(max(ratios), 3),
            "memory_mb": round(max(memory)),
        }
        row = rows[writers]
        print(
            f"{writers:7} {row['raw_mb_s']:9} {row['spkd_mb_s']:10} {row['ratio_to_raw_write']:6.2f}   "
            f"({row['least']:.2f}..{row['most']:.2f})   {row['memory_mb']:11}",
            flush=True,
        )
    shutil.rmtree(given.work)
    result = {
        "ratio_to_raw_write": rows[given.writers[0]]["ratio_to_raw_write"],
        "writers": rows,
        "bytes": size,
        "rounds": given.rounds,
    }
    record.keep("cache_write", result, given.tiny)


if __name__ == "__main__":
    main()
