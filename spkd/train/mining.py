"""Hard negatives from the whole cache: for every voice the nearest others by the teacher's embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from spkd.cache import Contents
from spkd.config import LossConfig, MiningConfig
from spkd.errors import SpkdError, UsageError
from spkd.progress import say, track
from spkd.train.data import Classes, mean_embeddings

EXACT = 100_000  # voices up to which every pair is compared
BATCH = 4096  # voices searched at once
PROBES = 1000  # voices on which the recall of an approximate index is measured
NONE = -1


@dataclass(frozen=True)
class Negatives:
    """Table of hard negatives.

    neighbours: (voices, K) voices, hardest first, NONE where there were no more. voice: (views,) row of each view in
    the table, -1 of those not served. views, first: the views of voice v are views[first[v] : first[v + 1]].
    """

    neighbours: np.ndarray
    voice: np.ndarray
    views: np.ndarray
    first: np.ndarray

    def draw(self, rows: np.ndarray, count: int, random: np.random.RandomState) -> np.ndarray:
        """(B, count) views: of `count` random neighbours of each view's voice a random view each. A voice with fewer
        neighbours gives some of them again; one without any gives other voices at random."""
        table = self.neighbours[self.voice[rows]]
        known = (table != NONE).sum(1)
        pick = (random.random_sample((len(rows), count)) * np.maximum(known, 1)[:, None]).astype(np.int64)
        voice = np.take_along_axis(table, pick, 1)
        anywhere = random.randint(len(self.neighbours), size=voice.shape)
        own = self.voice[rows][:, None]
        anywhere = np.where(anywhere == own, (anywhere + 1) % len(self.neighbours), anywhere)
        voice = np.where(known[:, None] > 0, voice, anywhere)
        size = self.first[voice + 1] - self.first[voice]
        return self.views[self.first[voice] + (random.random_sample(voice.shape) * size).astype(np.int64)]


def mine(cache: Contents, classes: Classes, config: MiningConfig, loss: LossConfig) -> Negatives:
    """For every voice (an utterance at one speed) its nearest voices, but for those of the same utterance, of the same
    speaker at the same speed where labels are known, and those whose cosine exceeds `loss.ceiling` (the same voice?).

    Raises:
        UsageError: FAISS is missing. SpkdError: a cache of one utterance.
    """
    vectors, voice, views, first = _voices(cache, classes)
    lead = views[first[:-1]]
    utterance, label = cache.plan.views.utterance[lead], classes.label[lead]
    if len(np.unique(utterance)) < 2:
        raise SpkdError(f"{cache.name}: hard negatives need at least two utterances")
    index = build(vectors, config.nprobe)
    table = np.full((len(vectors), config.neighbours), NONE, np.int32)
    # Excluded voices stand among the nearest, so twice as many are asked for, and more where that is too few.
    todo, width = np.arange(len(vectors)), 2 * config.neighbours
    with track("mining negatives", len(vectors), "voices") as bar:
        while len(todo):
            width, short = min(width, len(vectors)), []
            for start in range(0, len(todo), BATCH):
                mine_ = todo[start : start + BATCH]
                similarity, found = index.search(vectors[mine_], width)
                allowed = (found >= 0) & (similarity <= loss.ceiling) & (utterance[found] != utterance[mine_][:, None])
                allowed &= (label[found] != label[mine_][:, None]) | (label[mine_][:, None] < 0)
                order = np.argsort(~allowed, axis=1, kind="stable")[:, : config.neighbours]
                kept = np.where(np.take_along_axis(allowed, order, 1), np.take_along_axis(found, order, 1), NONE)
                table[mine_, : kept.shape[1]] = kept
                short.append(mine_[(kept == NONE).any(1)])
            left = np.concatenate(short) if width < len(vectors) and len(vectors) <= EXACT else todo[:0]
            bar.advance(len(todo) - len(left))
            todo, width = left, 4 * width
    if len(vectors) > EXACT:
        k = config.neighbours
        say(f"mining: recall@{k} of the approximate index {recall(index, vectors, k):.3f}")
    return Negatives(table, voice, views, first)


def _voices(cache: Contents, classes: Classes) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Mean normalised embedding of each voice (voices, D), each view's voice, and the views by voice."""
    rows = cache.rows
    _, number = np.unique(classes.voice[rows], return_inverse=True)
    voice = np.full(len(cache), -1, np.int64)
    voice[rows] = number
    order = np.argsort(number, kind="stable")
    first = np.concatenate([[0], np.cumsum(np.bincount(number))])
    vectors = mean_embeddings(cache, voice, len(first) - 1).numpy()
    return vectors, voice, rows[order], first


def build(vectors: np.ndarray, nprobe: int) -> Any:
    """A FAISS index of unit vectors (n, D) by inner product: exact up to 100,000, lists of 8-bit codes above; on the
    GPU where FAISS sees one.

    Raises:
        UsageError: FAISS is missing.
    """
    try:
        import faiss
    except ImportError as error:
        raise UsageError('mining.negatives: needs FAISS; pip install "spkd[cpu]" or "spkd[gpu]"') from error
    count, dim = vectors.shape
    index: Any
    if count <= EXACT:
        index = faiss.IndexFlatIP(dim)
    else:
        lists = 2 ** int(np.log2(4 * np.sqrt(count)))
        index = faiss.index_factory(dim, f"IVF{lists},SQ8", faiss.METRIC_INNER_PRODUCT)
        index.nprobe = nprobe
    if hasattr(faiss, "index_cpu_to_all_gpus") and faiss.get_num_gpus() > 0:
        index = faiss.index_cpu_to_all_gpus(index)
    if not index.is_trained:
        chosen = np.random.RandomState(0).permutation(count)[: 40 * lists]
        index.train(vectors[chosen])
    index.add(vectors)
    return index


def recall(index: Any, vectors: np.ndarray, k: int) -> float:
    """How many of the true k nearest an index finds, over a sample of vectors (themselves counted)."""
    chosen = np.random.RandomState(1).permutation(len(vectors))[:PROBES]
    _, found = index.search(vectors[chosen], k)
    best = torch.from_numpy(vectors[chosen]) @ torch.from_numpy(vectors).mT
    true = best.topk(k, dim=1).indices.numpy()
    return float(np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(found, true, strict=True)]))
