"""Opening large caches: time and memory for 1.1 million (VoxCeleb2) and 11 million views.

Plans of these sizes are made and written as extraction would write them; the targets themselves, which opening never
touches, are left out. Each cache is opened in a fresh process.

Then a cache of thousands of shards, from which a student is trained and which is exported under a limit of 256 open
files; and one of more shards than a process maps at once (the kernel allows it 65,530 maps), of which all are read.

    python benchmarks/cache_scale.py

Prints a table and, as its last line, one JSON object; keeps it in benchmarks/results/cache_scale.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from machine import describe
from synthetic import make_card, write_cache

from spkd.cache import Plan, initialise
from spkd.cache.folder import COMPLETE, CompletionRecord, metadata_files
from spkd.cache.read import MOST_MAPPED
from spkd.corpus.manifest import Manifest, Utterance
from spkd.corpus.view import Views
from spkd.files import digest
from spkd.files.atomic import write_json
from spkd.outputs.features import FBANK
from spkd.outputs.target import Target

HERE = Path(__file__).parent
TARGETS = [Target("embedding", 256), Target("frames", 512, 320, 400)]
DESCRIPTORS = 256
UNITS = 2500  # of two shards each
READ_ALL = """
import sys
import numpy as np
from pathlib import Path
from spkd.cache import Cache

cache, most = Cache.open(sys.argv[1]), 0
for views in np.array_split(cache.usable_views, 64):
    values = cache.batch(views, ["embedding"])["embedding"].numpy()
    assert (values[:, 0] == views + 1).all()
    most = max(most, len(Path("/proc/self/maps").read_text().splitlines()))
print(most)
"""
OPEN = """
import json, sys, time
from pathlib import Path
import numpy as np
from spkd.cache import Cache

def peak_kb():  # not getrusage's, which a child inherits from its parent
    return int(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line))

before = peak_kb()
start = time.perf_counter()
cache = Cache.open(sys.argv[1])
seconds = time.perf_counter() - start
first, count = cache.plan.places(cache.targets["frames"])
labels = cache.speaker(cache.usable_views)
ready = time.perf_counter() - start
peak = peak_kb()
print(json.dumps({"views": len(cache), "open_seconds": round(seconds, 3), "ready_seconds": round(ready, 3),
                  "peak_mb": round(peak / 1024), "libraries_mb": round(before / 1024)}))
"""


def make(root: Path, utterances: int, crops: int) -> None:
    """A finished cache of `utterances * crops` views, without its shards."""
    shutil.rmtree(root, ignore_errors=True)
    names = (f"id{i // 200:05d}/{i % 1_000_003:011d}/{i % 200:05d}.wav" for i in range(utterances))
    manifest = Manifest(tuple(Utterance(name, "", name[:7], 8.0) for name in names))
    count = utterances * crops
    views = Views(
        np.repeat(np.arange(utterances, dtype=np.int32), crops),
        np.zeros(count, np.int64),
        np.full(count, 32_000, np.int32),
        np.ones(count, np.float32),
        np.arange(count, dtype=np.uint32),
    )
    plan = Plan.make(manifest, views, 1024, 1280.0)
    card = make_card(TARGETS, manifest, plan)
    initialise(root, card, [plan])
    files = (name for name in metadata_files(card) if not name.endswith(".safetensors"))
    sha256 = {name: digest.of_file(root / name) if (root / name).is_file() else "0" * 64 for name in files}
    write_json(root / COMPLETE, CompletionRecord(card, {}, 0, sha256).to_json())


def values(target: Target, views: np.ndarray) -> np.ndarray:
    """Outputs that name their view."""
    height = [int(target.num_frames(32_000))] if target.hop else []
    shape = (len(views), *height, target.dim)
    return np.broadcast_to((views + 1.0).reshape(-1, *[1] * len(shape[1:])), shape).astype(np.float32)


def few_descriptors(root: Path) -> int:
    """Train from and export a cache of many shards under a limit of open files. Returns the number of shards."""
    shutil.rmtree(root, ignore_errors=True)
    manifest = Manifest(tuple(Utterance(f"u{i}", "", f"s{i % 50}", 2.0) for i in range(UNITS)))
    write_cache(root / "cache", [FBANK, Target("embedding", 16)], manifest, 32_000, 1, values)
    commands = [
        [
            *("train", "--loss", "cosine", "cache=cache", "out=student", "steps=12", "batch_size=256", "crop=0.5"),
            *("student.channels=8", "student.embedding=8"),
        ],
        ["cache", "export", "cache", "cache.h5"],
        ["cache", "verify", "cache"],
    ]
    for command in commands:
        limited = f'ulimit -n {DESCRIPTORS}; exec "$@"'
        whole = ["bash", "-c", limited, "bash", sys.executable, "-c", "from spkd.cli import main; main()", *command]
        done = subprocess.run(whole, cwd=root, capture_output=True, text=True, check=False)
        print(f"spkd {' '.join(command[:3])}, {DESCRIPTORS} descriptors: exit code {done.returncode}", flush=True)
        if done.returncode:
            raise SystemExit(done.stderr)
    return len(list((root / "cache").glob("*/c/*/0")))


def many_maps(root: Path) -> dict[str, int]:
    """Read every shard of a cache that has more of them than are mapped at once."""
    shutil.rmtree(root, ignore_errors=True)
    count = MOST_MAPPED + 600
    manifest = Manifest(tuple(Utterance(f"u{i}", "", f"s{i % 50}", 2.0) for i in range(count)))
    write_cache(root, [Target("embedding", 16, codec="float32")], manifest, 32_000, 1, values)
    done = subprocess.run([sys.executable, "-c", READ_ALL, str(root)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return {"shards": count, "most_maps": int(done.stdout)}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--work", type=Path, default=HERE / "work" / "cache_scale")
    given = options.parse_args()
    rows = []
    print(f"{'views':>12} {'open (s)':>9} {'ready (s)':>10} {'peak (MB)':>10} {'of it libraries':>16}")
    for crops in (1, 10):
        make(given.work, 1_100_000, crops)
        done = subprocess.run([sys.executable, "-c", OPEN, str(given.work)], capture_output=True, text=True, check=True)
        row = json.loads(done.stdout)
        rows.append(row)
        print(
            f"{row['views']:12,} {row['open_seconds']:9.2f} {row['ready_seconds']:10.2f} {row['peak_mb']:10} "
            f"{row['libraries_mb']:16}",
            flush=True,
        )
    few = few_descriptors(given.work)
    many = many_maps(given.work)
    print(f"{many['shards']:,} shards read with at most {many['most_maps']:,} maps")
    shutil.rmtree(given.work)
    result = {"rows": rows, "shards_under_256_descriptors": few, "maps": many, "machine": describe()}
    (HERE / "results" / "cache_scale.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
