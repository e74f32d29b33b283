"""Scores of pairs of vectors, about as fast as memory can be read, and AS-norm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits

from spkd.cores import usable

PAIRS = 1024  # pairs scored together by one thread: both sides stay in its second-level cache
MOST_THREADS = 16
ROWS = 256  # rows of a matrix of cohort scores that one thread computes at a time
STEP, MARGIN = 16, 1.35  # AS-norm: the threshold is taken from every 16th score, for 1.35 times the scores asked for


@dataclass(frozen=True)
class Side:
    """Enrolment or test side: the score of a pair is the inner product of its vectors plus both offsets.

    Attributes:
        vectors: (N, D) vectors.
        offset: (N,) offsets; None: all are 0.
    """

    vectors: np.ndarray
    offset: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.vectors)


def score_pairs(enrolment: Side, test: Side, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Scores (T,) of pairs.

    Args:
        i: (T,) row of the enrolment side of each pair.
        j: (T,) row of the test side of each pair.
    """
    scores = np.empty(len(i), enrolment.vectors.dtype)

    def work(starts: range) -> None:
        left = np.empty((PAIRS, enrolment.vectors.shape[1]), enrolment.vectors.dtype)
        right = np.empty_like(left)
        for first in starts:
            a, b = i[first : first + PAIRS], j[first : first + PAIRS]
            # With mode "clip", take writes into `out` directly; in its default mode it makes a copy.
            np.take(enrolment.vectors, a, 0, out=left[: len(a)], mode="clip")
            np.take(test.vectors, b, 0, out=right[: len(a)], mode="clip")
            np.einsum("nd,nd->n", left[: len(a)], right[: len(a)], out=scores[first : first + PAIRS])

    count = min(usable(), MOST_THREADS)
    _in_threads(work, (range(k * PAIRS, len(i), count * PAIRS) for k in range(count)))
    for side, rows in ((enrolment, i), (test, j)):
        if side.offset is not None:
            scores += side.offset[rows]
    return scores


def cohort_statistics(side: Side, cohort: Side, top: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean (N,) and standard deviation (N,), in float64, of each row's `top` highest scores with the cohort.

    Where the cohort has fewer vectors, all scores are used.
    """
    mean, deviation = np.empty(len(side)), np.empty(len(side))
    top = min(top, len(cohort))
    columns = np.ascontiguousarray(cohort.vectors.T)

    def work(rows: range) -> None:
        chunk = slice(rows.start, rows.stop)
        scores = side.vectors[chunk] @ columns
        for offset in (
            None if side.offset is None else side.offset[chunk, None],
            None if cohort.offset is None else cohort.offset[None],
        ):
            if offset is not None:
                scores += offset
        highest = _highest(scores, top).astype(np.float64)
        mean[chunk], deviation[chunk] = highest.mean(1), highest.std(1)

    starts = range(0, len(side), ROWS)
    with threadpool_limits(1, "blas"):  # each of our threads computes a product
        _in_threads(work, (range(s, min(s + ROWS, len(side))) for s in starts))
    return mean, deviation


def _highest(scores: np.ndarray, top: int) -> np.ndarray:
    """The `top` highest scores of each row, unordered: (N, C) -> (N, top).

    A threshold from a sample of each row leaves few scores to select from. Rows in which it is too high are selected
    from whole.
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
    candidates = np.full((rows, most), -np.inf, scores.dtype)
    shift = np.arange(rows) * most - (np.cumsum(counts) - counts)
    candidates.ravel()[np.arange(len(places)) + np.repeat(shift, counts)] = scores.ravel()[places]
    candidates.partition(most - top, axis=1)
    highest = candidates[:, most - top :]
    if len(few := np.flatnonzero(counts < top)):
        highest[few] = np.partition(scores[few], width - top, axis=1)[:, width - top :]
    return highest


Statistics = tuple[np.ndarray, np.ndarray]  # mean and deviation


def as_norm(scores: np.ndarray, enrolment: Statistics, test: Statistics, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Adaptive symmetric normalisation (Matejka et al., Interspeech 2017, "AS-norm1").

    It is the mean of the score normalised by the cohort of the enrolment side, and by that of the test side.

    Args:
        scores: (T,) scores of pairs.
        enrolment: `cohort_statistics` of the rows of the enrolment side.
        test: `cohort_statistics` of the rows of the test side.
        i: (T,) row of the enrolment side of each pair.
        j: (T,) row of the test side of each pair.
    """
    normalised = np.zeros(len(scores))
    for (mean, deviation), rows in ((enrolment, i), (test, j)):
        normalised += (scores - mean[rows]) / np.maximum(deviation[rows], 1e-12)
    return 0.5 * normalised


def _in_threads(work: Callable[[range], None], jobs: Iterator[range]) -> None:
    with ThreadPoolExecutor(min(usable(), MOST_THREADS)) as pool:
        for _ in pool.map(work, jobs):
            pass
