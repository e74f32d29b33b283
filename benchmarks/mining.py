"""Mining negatives: how long the index takes, how much memory, and how many of the true neighbours it finds.

Synthetic instances of the shape real embeddings have: 256 numbers, unit length, 170 instances about each of many
speakers (cosine about 0.7 to their speaker's centre). Built and searched by the very functions that training uses:
exact up to 100,000 instances, approximate above; `nprobe` is the setting mining.nprobe.

A second table mines as training does, with labels, where a speaker has more utterances than the table has neighbours:
the cosine of the drawn negatives to their view over that of the true hardest other speakers, found by comparing all
pairs, and how many of the drawn are of the same speaker, or more alike than the teacher's ceiling.

    python benchmarks/mining.py

Prints both tables and, as its last line, one JSON object; keeps it in benchmarks/results/mining.json
(mining-gpu.json where faiss-gpu sees a GPU).
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import faiss
import numpy as np
import record
import torch
from synthetic import write_cache

from spkd.cache import Cache
from spkd.corpus.manifest import Manifest, Utterance
from spkd.outputs.target import Target
from spkd.train.labels import Groups, Labels, mean_embeddings
from spkd.train.mining import PROBES, build, gpus, mine, recall
from spkd.train.settings import MiningConfig

DIM, PER_SPEAKER, SPREAD, K = 256, 170, 1.0, 50
PER_LABEL = [64, 128, 182, 220]  # utterances of a speaker; VoxCeleb2 has 182 on average
CEILING = 0.4  # teacher cosine above which two instances are not negatives


def instances(count: int, per_speaker: int) -> tuple[np.ndarray, np.ndarray]:
    """(count, 256) float32 unit vectors, and the speaker of each."""
    random = np.random.default_rng(0)
    centres = random.standard_normal((count // per_speaker + 1, DIM), dtype=np.float32)
    speaker = np.repeat(np.arange(len(centres)), per_speaker)[:count]
    vectors = centres[speaker]
    vectors += SPREAD * random.standard_normal(vectors.shape, dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    order = random.permutation(count)
    return vectors[order], speaker[order]


def hardness(per_speaker: int, count: int, queries: int, work: Path) -> dict[str, float]:
    """Mine a labelled cache as training does, and compare what is drawn with the nearest by all pairs."""
    vectors, speaker = instances(count, per_speaker)
    shutil.rmtree(work, ignore_errors=True)
    manifest = Manifest(tuple(Utterance(f"u{i}", "", f"s{s}", 2.0) for i, s in enumerate(speaker)))
    write_cache(
        work, [Target("embedding", DIM, codec="float32")], manifest, 32_000, 4096, lambda _, rows: vectors[rows]
    )
    cache = Cache.open(work)
    labels, config = Labels.of(cache), MiningConfig(negatives=16)
    groups = Groups.of(labels.instance, cache.usable_views)
    mean = mean_embeddings(cache, groups.group, len(groups)).numpy()
    start = time.perf_counter()
    negatives = mine(mean, mean, groups, cache, labels, config, CEILING)
    seconds = time.perf_counter() - start
    views = np.random.RandomState(0).permutation(count)[:queries]
    drawn = negatives.draw(views, config.negatives, np.random.RandomState(1))
    cosines = np.einsum("bd,bnd->bn", vectors[views], vectors[drawn.views])
    forbidden = drawn.found & ((speaker[drawn.views] == speaker[views][:, None]) | (cosines > CEILING + 1e-5))
    true = []
    for some in np.array_split(views, 10):
        pairs = vectors[some] @ vectors.T
        pairs[(speaker[some][:, None] == speaker) | (pairs > CEILING)] = -1
        true.append(torch.from_numpy(pairs).topk(config.neighbours).values.mean(1).numpy())
    shutil.rmtree(work)
    return {
        "per_speaker": per_speaker,
        "seconds": round(seconds, 1),
        "drawn_cosine": round(float(cosines[drawn.found].mean()), 4),
        "hardest_cosine": round(float(np.concatenate(true).mean()), 4),
        "ratio": round(float(cosines[drawn.found].mean() / np.concatenate(true).mean()), 4),
        "with_negatives": round(float(drawn.found.mean()), 4),
        "forbidden": int(forbidden.sum()),
    }


def resident_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if "VmRSS" in line)) / 1024


def main() -> None:
    options = record.options(__doc__, "mining")
    options.add_argument("--counts", type=int, nargs="+", default=[100_000, 1_000_000])
    options.add_argument("--nprobes", type=int, nargs="+", default=[8, 32, 64])
    options.add_argument("--queries", type=int, default=5000)
    options.add_argument("--labelled", type=int, default=110_000, help="instances of the second table")
    options.add_argument("--per-label", type=int, nargs="+", default=PER_LABEL, help="utterances of a speaker")
    given = record.parse(options, counts=[2000], labelled=1500, per_label=[64, 182], queries=100)
    faiss.omp_set_num_threads(os.cpu_count() or 1)
    device = "gpu" if gpus() else "cpu"
    rows = []
    print(f"{'instances':>9} {'index':>14} {'nprobe':>6} {'build (s)':>9} {'MB':>7} {'queries/s':>10} {'recall@50':>9}")
    for count in given.counts:
        vectors, _ = instances(count, PER_SPEAKER)
        before, start = resident_mb(), time.perf_counter()
        index = build(vectors, given.nprobes[0])
        seconds, memory = time.perf_counter() - start, resident_mb() - before
        exact = "Flat" in type(index).__name__
        for nprobe in [0] if exact else given.nprobes:
            if not exact:
                index.nprobe = nprobe
            start = time.perf_counter()
            found = index.search(vectors[: given.queries], K)[1]
            rate = given.queries / (time.perf_counter() - start)
            row = {
                "instances": count,
                "index": "exact" if exact else f"IVF{index.nlist},SQ8",
                "nprobe": nprobe,
                "build_seconds": round(seconds, 1),
                "memory_mb": round(memory),
                "queries_per_second": round(rate),
                "recall_at_50": round(recall(vectors, np.arange(given.queries)[:PROBES], found[:PROBES]), 4),
            }
            rows.append(row)
            print(
                f"{count:9,} {row['index']:>14} {nprobe:6} {row['build_seconds']:9} {row['memory_mb']:7} "
                f"{row['queries_per_second']:10} {row['recall_at_50']:9}",
                flush=True,
            )
    print(f"{'of a speaker':>12} {'mine (s)':>9} {'drawn':>7} {'hardest':>8} {'ratio':>7} {'forbidden':>10}")
    labelled = []
    for per_speaker in given.per_label:
        found = hardness(per_speaker, given.labelled, given.queries, given.work)
        labelled.append(found)
        print(
            f"{per_speaker:12} {found['seconds']:9} {found['drawn_cosine']:7} {found['hardest_cosine']:8} "
            f"{found['ratio']:7} {found['forbidden']:10}",
            flush=True,
        )
    suffix = "" if device == "cpu" else "-gpu"
    result = {
        "rows": rows,
        "labelled": labelled,
        "hardest_cosine_ratio_182": next(found["ratio"] for found in labelled if found["per_speaker"] == 182),
        "forbidden": sum(int(found["forbidden"]) for found in labelled),
        "device": device,
        "dimension": DIM,
    }
    record.keep(f"mining{suffix}", result, given.tiny)


if __name__ == "__main__":
    main()
