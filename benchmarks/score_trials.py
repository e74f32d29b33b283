"""Speed and memory of scoring: 10 million cosine trials, and AS-norm of 580,000 trials.

The floor is what BLAS takes for the same products when everything lies in order: as many dot products of rows that
follow one another, and one matrix product with the cohort. The Python loop is what toolkits do, one trial per call: for
cosines scikit-learn's cosine_similarity (WeSpeaker), for AS-norm the cosines of both sides with the cohort and their
highest (SpeechBrain's VoxCeleb recipe). The NumPy loop is the leanest that can be written: a dot product per trial, a
sorted row of cohort scores per utterance. Loops are timed on a part and scaled.

    python benchmarks/score_trials.py

Prints, as its last line, one JSON object; keeps it in benchmarks/results/score_trials.json.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import record
import torch
from sklearn.metrics.pairwise import cosine_similarity

from spkd.eval.cohort import normalised
from spkd.eval.pairs import Side, as_norm, cohort_statistics, score_pairs

HERE = Path(__file__).parent
DIM, ROUNDS = 256, 5


def seconds(call: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Median."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def embeddings(count: int, seed: int) -> np.ndarray:
    return normalised(np.random.RandomState(seed).standard_normal((count, DIM)).astype(np.float32))


def cosine_trials(trials: int, utterances: int) -> dict[str, float]:
    vectors, random = embeddings(utterances, 0), np.random.RandomState(1)
    i, j = (random.randint(0, utterances, trials).astype(np.int32) for _ in range(2))
    side = Side(vectors)
    ours = seconds(lambda: score_pairs(side, side, i, j))
    block = 1 << 16
    left, right = torch.randn(block, 1, DIM), torch.randn(block, DIM, 1)

    def floor() -> None:
        for _ in range(trials // block):
            torch.bmm(left, right)

    def loop() -> None:
        for a, b in zip(i[:2000].tolist(), j[:2000].tolist(), strict=True):
            float(cosine_similarity(vectors[a].reshape(1, -1), vectors[b].reshape(1, -1))[0][0])

    def lean() -> None:
        for a, b in zip(i[:20_000].tolist(), j[:20_000].tolist(), strict=True):
            float(vectors[a] @ vectors[b])

    loops = {"loop": seconds(loop, 3) * trials / 2000, "numpy": seconds(lean, 3) * trials / 20_000}
    return {"seconds": ours, "floor": seconds(floor), **loops}


def normalised_trials(trials: int, utterances: int, cohort: int, top: int) -> dict[str, float]:
    vectors, others, random = embeddings(utterances, 2), embeddings(cohort, 3), np.random.RandomState(4)
    i, j = (random.randint(0, utterances, trials).astype(np.int32) for _ in range(2))
    side, other = Side(vectors), Side(others)

    def ours() -> None:
        statistics = cohort_statistics(side, other, top)
        as_norm(score_pairs(side, side, i, j), statistics, statistics, i, j)

    one, two = torch.from_numpy(vectors), torch.from_numpy(others).T.contiguous()

    def floor() -> None:
        for first in range(0, utterances, 1024):
            torch.mm(one[first : first + 1024], two)

    similarity, whole = torch.nn.CosineSimilarity(dim=-1, eps=1e-6), torch.from_numpy(others)

    def loop() -> None:
        for a, b in zip(i[:50].tolist(), j[:50].tolist(), strict=True):
            score, parts = similarity(one[a : a + 1], one[b : b + 1])[0], []
            for row in (a, b):
                highest = torch.topk(similarity(one[row : row + 1].repeat(cohort, 1), whole), top, dim=0)[0]
                parts.append((score - highest.mean()) / highest.std())
            float(0.5 * (parts[0] + parts[1]))

    def lean() -> None:
        for row in vectors[:200]:
            highest = np.sort(others @ row)[-top:]
            highest.mean(), highest.std()

    loops = {"loop": seconds(loop, 3) * trials / 50, "numpy": seconds(lean, 3) * utterances / 200}
    return {"seconds": seconds(ours, 3), "floor": seconds(floor, 3), **loops}


def main() -> None:
    options = record.options(__doc__)
    options.add_argument("--trials", type=int, default=10_000_000)
    options.add_argument("--utterances", type=int, default=100_000)
    options.add_argument(
        "--normalised", type=int, nargs=4, default=[580_000, 145_000, 6000, 300], help="trials, utterances, cohort, top"
    )  # the size of VoxCeleb1-E
    given = record.parse(options, trials=200_000, utterances=1000, normalised=[5000, 2000, 300, 50])
    cosine = cosine_trials(given.trials, given.utterances)
    as_normed = normalised_trials(*given.normalised)
    result = {
        name: {
            "seconds": round(times["seconds"], 2),
            "floor_seconds": round(times["floor"], 2),
            "ratio_to_blas_floor": round(times["floor"] / times["seconds"], 3),
            "times_python_loop": round(times["loop"] / times["seconds"]),
            "times_numpy_loop": round(times["numpy"] / times["seconds"], 1),
        }
        for name, times in (("cosine", cosine), ("as_norm", as_normed))
    }
    result["peak_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    record.keep("score_trials", result, given.tiny)


if __name__ == "__main__":
    main()
