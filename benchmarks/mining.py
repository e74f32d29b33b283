"""Mining negatives: how long the index takes, how much memory, and how many of the true neighbours it finds.

Synthetic instances of the shape real embeddings have: 256 numbers, unit length, 170 instances about each of many
speakers (cosine about 0.7 to their speaker's centre). Built and searched by the very functions that training uses:
exact up to 100,000 instances, approximate above; `nprobe` is the setting mining.nprobe.

    python benchmarks/mining.py

Prints a table and, as its last line, one JSON object; keeps it in benchmarks/results/mining.json (mining-gpu.json where
faiss-gpu sees a GPU), unless other counts are asked for.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import faiss
import numpy as np
from machine import describe

from spkd.train.mining import build, gpus, recall

HERE = Path(__file__).parent
COUNTS = [100_000, 1_000_000]
DIM, PER_SPEAKER, SPREAD, K, QUERIES = 256, 170, 1.0, 50, 5000


def instances(count: int) -> np.ndarray:
    """(count, 256) float32 unit vectors."""
    random = np.random.default_rng(0)
    centres = random.standard_normal((count // PER_SPEAKER + 1, DIM), dtype=np.float32)
    vectors = np.repeat(centres, PER_SPEAKER, 0)[:count]
    vectors += SPREAD * random.standard_normal(vectors.shape, dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors[random.permutation(count)]


def resident_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if "VmRSS" in line)) / 1024


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--counts", type=int, nargs="+", default=COUNTS)
    options.add_argument("--nprobes", type=int, nargs="+", default=[8, 32, 64])
    given = options.parse_args()
    faiss.omp_set_num_threads(os.cpu_count() or 1)
    device = "gpu" if gpus() else "cpu"
    rows = []
    print(f"{'instances':>9} {'index':>14} {'nprobe':>6} {'build (s)':>9} {'MB':>7} {'queries/s':>10} {'recall@50':>9}")
    for count in given.counts:
        vectors = instances(count)
        before, start = resident_mb(), time.perf_counter()
        index = build(vectors, given.nprobes[0])
        seconds, memory = time.perf_counter() - start, resident_mb() - before
        exact = "Flat" in type(index).__name__
        for nprobe in [0] if exact else given.nprobes:
            if not exact:
                index.nprobe = nprobe
            start = time.perf_counter()
            index.search(vectors[:QUERIES], K)
            rate = QUERIES / (time.perf_counter() - start)
            row = {
                "instances": count,
                "index": "exact" if exact else f"IVF{index.nlist},SQ8",
                "nprobe": nprobe,
                "build_seconds": round(seconds, 1),
                "memory_mb": round(memory),
                "queries_per_second": round(rate),
                "recall_at_50": round(recall(index, vectors, K), 4),
            }
            rows.append(row)
            print(
                f"{count:9,} {row['index']:>14} {nprobe:6} {row['build_seconds']:9} {row['memory_mb']:7} "
                f"{row['queries_per_second']:10} {row['recall_at_50']:9}",
                flush=True,
            )
    result = {"rows": rows, "device": device, "dimension": DIM, "machine": describe()}
    if given.counts == COUNTS:
        name = "mining.json" if device == "cpu" else "mining-gpu.json"
        (HERE / "results" / name).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
