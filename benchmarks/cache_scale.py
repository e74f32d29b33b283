"""Opening large caches: time and memory for 1.1 million (VoxCeleb2) and 11 million views.

Plans of these sizes are made and written as extraction would write them; the targets themselves, which opening never
touches, are left out. Each cache is opened in a fresh process.

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
from synthetic import make_card

from spkd import digest
from spkd.cache import Plan, initialise
from spkd.cache.folder import COMPLETE, CompletionRecord, metadata_files
from spkd.files import write_json
from spkd.manifest import Manifest, Utterance
from spkd.target import Target
from spkd.view import Views

HERE = Path(__file__).parent
TARGETS = [Target("embedding", 256), Target("frames", 512, 320, 400)]
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
            f"{row['libraries_mb']:16}"
        )
    shutil.rmtree(given.work)
    result = {"rows": rows, "machine": describe()}
    (HERE / "results" / "cache_scale.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
