"""Scores of pairs of vectors, near the speed at which memory gives them, and AS-norm."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits

PAIRS = 1024  # scored together by one thread: both sides stay in its second-level cache
ROWS = 256  # of a matrix of cohort scores, which one thread makes at a time
STEP, MARGIN = 16, 1.35  # AS-norm: the threshold comes from every 16th score, and lets a third more than asked through


@dataclass(frozen=True)
class Side:
    """Enrolment or test side: the score of a pair is the product of its vectors plus both offsets.

    Attributes:
        vectors: (N, D).
        offset: (N,).
    """

    vectors: np.ndarray
    offset: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.vectors)


def score_pairs(enrolment: Side, test: Side, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Scores (T,) of the pairs of rows i (T,) and j (T,)."""
    scores = np.empty(len(i), enrolment.vectors.dtype)

    def work(starts: range) -> None:
        left = np.empty((PAIRS, enrolment.vectors.shape[1]), enrolment.vectors.dtype)
        right = np.empty_like(left)
        for first in starts:
            a, b = i[first : first + PAIRS], j[first : first + PAIRS]
            # With a mode that cannot raise, take writes into `out` without a copy between.
            np.take(enrolment.vectors, a, 0, out=left[: len(a)], mode="clip")
            np.take(test.vectors, b, 0, out=right[: len(a)], mode="clip")
            np.einsum("nd,nd->n", left[: len(a)], right[: len(a)], out=scores[first : first + PAIRS])

    count = _threads()
    _in_threads(work, (range(k * PAIRS, len(i), count * PAIRS) for k in range(count)))
    for side, rows in ((enrolment, i), (test, j)):
        if side.offset is not None:
            scores += side.offset[rows]
    return scores


def cohort_statistics(side: Side, cohort: Side, top: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of each row's `top` highest scores with the cohort (all of them where it has no more): (N,)
    each, in float64."""
    mean, deviation = np.empty(len(side)), np.empty(len(side))
    top = min(top, len(cohort))
    columns = np.ascontiguousarray(cohort.vectors.T)

    def work(rows: range) -> None:
        part = slice(rows.start, rows.stop)
        scores = side.vectors[part] @ columns
        for offset in (
            None if side.offset is None else side.offset[part, None],
            None if cohort.offset is None else cohort.offset[None],
        ):
            if offset is not None:
                scores += offset
        highest = _highest(scores, top).astype(np.float64)
        mean[part], deviation[part] = highest.mean(1), highest.std(1)

    starts = range(0, len(side), ROWS)
    with threadpool_limits(1, "blas"):  # our threads each have a product of their own
        _in_threads(work, (range(s, min(s + ROWS, len(side))) for s in starts))
    return mean, deviation


def _highest(scores: np.ndarray, top: int) -> np.ndarray:
    """The `top` highest of each row, unordered: (N, C) -> (N, top).

    A threshold from a sample of each row leaves little to select from; rows in which it is too high are done whole.
    """
    rows, width = scores.shape
    sample = scores[:, ::STEP]
    kept = int(top / STEP * MARGIN) + 6
    if kept >= sample.shape[1]:
        return np.partition(scores, width - top, axis=1)[:, width - top :]
    threshold = np.partition(sample, sample.shape[1] - kept, axis=1)[:, sample.shape[1] - kept, None]
    above = scores > threshold
    counts = np.count_nonzero(above, axis=1)
    most = max(int(counts.max()), top)
    places = np.flatnonzero(above)
    found = np.full((rows, most), -np.inf, scores.dtype)
    shift = np.arange(rows) * most - (np.cumsum(counts) - counts)
    found.ravel()[np.arange(len(places)) + np.repeat(shift, counts)] = scores.ravel()[places]
    found.partition(most - top, axis=1)
    highest = found[:, most - top :]
    if len(few := np.flatnonzero(counts < top)):
        highest[few] = np.partition(scores[few], width - top, axis=1)[:, width - top :]
    return highest


Statistics = tuple[np.ndarray, np.ndarray]  # mean and deviation


def as_norm(scores: np.ndarray, enrolment: Statistics, test: Statistics, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Adaptive symmetric normalisation (Matejka et al., Interspeech 2017, "AS-norm1"): the mean of the score as
    normalised by the cohort of the enrolment side, and by that of the test side.

    Args:
        scores: (T,) of pairs of rows i and j. enrolment, test: `cohort_statistics` of the sides' rows.
    """
    normalised = np.zeros(len(scores))
    for (mean, deviation), rows in ((enrolment, i), (test, j)):
        normalised += (scores - mean[rows]) / np.maximum(deviation[rows], 1e-12)
    return 0.5 * normalised


def _threads() -> int:
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 16)


def _in_threads(work: Callable[[range], None], jobs: Iterator[range]) -> None:
    with ThreadPoolExecutor(_threads()) as pool:
        for _ in pool.map(work, jobs):
            pass
