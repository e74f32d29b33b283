"""Opening large caches: time and memory for 1.1 million (VoxCeleb2) and 11 million views.

Plans of these sizes are made and written as extraction would write them; the targets themselves, which opening never
touches, are left out. Each cache is opened in a fresh process.

Then a cache of thousands of shards, from which a student is trained and which is exported under a limit of 256 open
files; and one of more shards than a process maps at once (the kernel allows it 65,530 maps), of which all are read.

    python benchmarks/cache_scale.py

Prints a table and, as its last line, one JSON object; keeps it in benchmarks/results/cache_scale.json.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import record
from synthetic import make_card, whole_views, write_cache

from spkd.cache import Plan, initialise
from spkd.cache.folder import COMPLETE, CompletionRecord, metadata_files
from spkd.cache.read import MOST_MAPPED
from spkd.corpus.manifest import Manifest, Utterance
from spkd.files import digest
from spkd.files.atomic import write_json
from spkd.outputs.features import FBANK
from spkd.outputs.target import Target

HERE = Path(__file__).parent
TARGETS = [Target("embedding", 256), Target("frames", 512, 320, 400)]
READ_ALL = """
import sys
import numpy as np
from pathlib import Path
from spkd.cache import Cache

cache, most = Cache.open(sys.argv[1]), 0
for views in np.array_split(cache.usable_views, min(64, len(cache.usable_views))):
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
    plan = Plan.make(manifest, whole_views(np.full(utterances, 32_000), crops), 1024, 1280.0)
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


def few_descriptors(root: Path, units: int, descriptors: int) -> int:
    """Train from and export a cache of many shards under a limit of open files. Returns the number of shards."""
    shutil.rmtree(root, ignore_errors=True)
    manifest = Manifest(tuple(Utterance(f"u{i}", "", f"s{i % 50}", 2.0) for i in range(units)))
    write_cache(root / "cache", [FBANK, Target("embedding", 16)], manifest, 32_000, 1, values)
    commands = [
        [
            *("train", "--loss", "cosine", "cache=cache", "out=student", "steps=12", "batch_size=16", "crop=0.5"),
            *("student.channels=8", "student.embedding=8"),
        ],
        ["cache", "export", "cache", "cache.h5"],
        ["cache", "verify", "cache"],
    ]
    for command in commands:
        limited = f'ulimit -n {descriptors}; exec "$@"'
        whole = ["bash", "-c", limited, "bash", sys.executable, "-c", "from spkd.cli import main; main()", *command]
        done = subprocess.run(whole, cwd=root, capture_output=True, text=True, check=False)
        print(f"spkd {' '.join(command[:3])}, {descriptors} descriptors: exit code {done.returncode}", flush=True)
        if done.returncode:
            raise SystemExit(done.stderr)
    return len(list((root / "cache").glob("*/c/*/0")))


def many_maps(root: Path, count: int) -> dict[str, int]:
    """Read every shard of a cache that has more of them than are mapped at once."""
    shutil.rmtree(root, ignore_errors=True)
    manifest = Manifest(tuple(Utterance(f"u{i}", "", f"s{i % 50}", 2.0) for i in range(count)))
    write_cache(root, [Target("embedding", 16, codec="float32")], manifest, 32_000, 1, values)
    done = subprocess.run([sys.executable, "-c", READ_ALL, str(root)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return {"shards": count, "most_maps": int(done.stdout)}


def main() -> None:
    options = record.options(__doc__, "cache_scale")
    options.add_argument("--utterances", type=int, default=1_100_000)
    options.add_argument("--crops", type=int, nargs="+", default=[1, 10], help="views of each utterance")
    options.add_argument("--units", type=int, default=2500, help="of two shards each, with few descriptors")
    options.add_argument("--descriptors", type=int, default=256, help="limit of open files")
    options.add_argument("--shards", type=int, default=MOST_MAPPED + 600, help="read in one process")
    given = record.parse(options, utterances=2000, crops=[1], units=20, shards=40, descriptors=64)
    rows = []
    print(f"{'views':>12} {'open (s)':>9} {'ready (s)':>10} {'peak (MB)':>10} {'of it libraries':>16}")
    for crops in given.crops:
        make(given.work, given.utterances, crops)
        done = subprocess.run([sys.executable, "-c", OPEN, str(given.work)], capture_output=True, text=True, check=True)
        row = json.loads(done.stdout)
        rows.append(row)
        print(
            f"{row['views']:12,} {row['open_seconds']:9.2f} {row['ready_seconds']:10.2f} {row['peak_mb']:10} "
            f"{row['libraries_mb']:16}",
            flush=True,
        )
    few = few_descriptors(given.work, given.units, given.descriptors)
    many = many_maps(given.work, given.shards)
    print(f"{many['shards']:,} shards read with at most {many['most_maps']:,} maps")
    shutil.rmtree(given.work)
    result = {"rows": rows, "shards_under_256_descriptors": few, "maps": many}
    record.keep("cache_scale", result, given.tiny)


if __name__ == "__main__":
    main()
