"""Caches of many shards.

From one of thousands a student is trained, and it is exported, under a limit of 256 open files. Another has more shards
than a process maps at once (the kernel allows it 65,530 maps), of which all are read.

    python benchmarks/cache_scale.py

Prints what it does and, as its last line, one JSON object; keeps it in benchmarks/results/cache_scale.json.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import record
from synthetic import write_cache

from spkd.cache.read import MOST_MAPPED
from spkd.corpus.manifest import Manifest, Utterance
from spkd.outputs.features import FBANK
from spkd.outputs.target import Target

HERE = Path(__file__).parent
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
    options.add_argument("--units", type=int, default=2500, help="of two shards each, with few descriptors")
    options.add_argument("--descriptors", type=int, default=256, help="limit of open files")
    options.add_argument("--shards", type=int, default=MOST_MAPPED + 600, help="read in one process")
    given = record.parse(options, units=20, shards=40, descriptors=64)
    few = few_descriptors(given.work, given.units, given.descriptors)
    many = many_maps(given.work, given.shards)
    print(f"{many['shards']:,} shards read with at most {many['most_maps']:,} maps")
    shutil.rmtree(given.work)
    result = {"shards_under_256_descriptors": few, "maps": many}
    record.keep("cache_scale", result, given.tiny)


if __name__ == "__main__":
    main()
