"""Hard negatives from the whole cache: for every voice the nearest others by the teacher's embeddings, or
by the student's."""

from __future__ import annotations

import copy
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from spkd.audio import SAMPLE_RATE
from spkd.cache import EMBEDDING, Contents, Crop
from spkd.cache.tars import Stream
from spkd.config import MiningConfig
from spkd.errors import SpkdError, UsageError
from spkd.features import HOP
from spkd.models import Network
from spkd.progress import say
from spkd.train.data import Classes, Groups, Listening, decode, heard, mean_embeddings

EXACT = 100_000  # voices up to which every pair is compared
BATCH = 4096  # voices searched at once
EMBEDDED_AT_ONCE = 256  # views
PROBES = 1000  # voices on which the recall of an approximate index is measured
GPU_WIDEST = 2048  # most neighbours that FAISS selects on a GPU
NONE = -1


@dataclass(frozen=True)
class Negatives:
    """Table of hard negatives.

    neighbours: (voices, K) voices, hardest first, NONE where there were no more. voices: the views of each.
    """

    neighbours: np.ndarray
    voices: Groups

    def draw(self, rows: np.ndarray, count: int, random: np.random.RandomState) -> np.ndarray:
        """(B, count) views: of `count` random neighbours of each view's voice a random view each. A voice with fewer
        neighbours gives some of them again; one without any gives other voices at random."""
        mine_ = self.voices.group[rows]
        table = self.neighbours[mine_]
        known = (table != NONE).sum(1)
        pick = (random.random_sample((len(rows), count)) * np.maximum(known, 1)[:, None]).astype(np.int64)
        voice = np.take_along_axis(table, pick, 1)
        anywhere = random.randint(len(self.neighbours), size=voice.shape)
        anywhere = np.where(anywhere == mine_[:, None], (anywhere + 1) % len(self.neighbours), anywhere)
        voice = np.where(known[:, None] > 0, voice, anywhere)
        return self.voices.pick(voice, random)


def check(cache: Contents, config: MiningConfig) -> None:
    """Raises UsageError for settings outside their range, or a cache that cannot be searched."""
    if config.negatives < 0 or config.neighbours < 1 or config.refresh < 1:
        raise UsageError("mining: negatives must not be negative, neighbours and refresh at least 1")
    if EMBEDDING not in cache.names:
        raise UsageError("mining.negatives: needs one teacher's embeddings (teachers=concatenate or average)")
    if isinstance(cache, Stream):
        raise UsageError("mining.negatives: a stream cannot be searched; pull or import the cache")


def mine(
    vectors: np.ndarray, voices: Groups, cache: Contents, classes: Classes, config: MiningConfig, ceiling: float
) -> Negatives:
    """For every voice (an utterance at one speed) its nearest voices, but for those of the same utterance, of the same
    speaker at the same speed where labels are known, and those whose cosine exceeds `ceiling` (the same voice?).

    Args:
        vectors: (voices, D), of length one.
    Raises:
        UsageError: FAISS is missing. SpkdError: a cache of one utterance.
    """
    lead = voices.views[voices.first[:-1]]
    utterance, label = cache.plan.views.utterance[lead], classes.label[lead]
    if len(np.unique(utterance)) < 2:
        raise SpkdError(f"{cache.name}: hard negatives need at least two utterances")
    index = build(vectors, config.nprobe)
    table = np.full((len(vectors), config.neighbours), NONE, np.int32)
    # Excluded voices stand among the nearest, so twice as many are asked for, and more where that is too few.
    todo, width = np.arange(len(vectors)), 2 * config.neighbours
    widest = min(len(vectors), GPU_WIDEST if gpus() else len(vectors))
    while len(todo):
        width, short = min(width, widest), []
        for start in range(0, len(todo), BATCH):
            mine_ = todo[start : start + BATCH]
            similarity, found = index.search(vectors[mine_], width)
            allowed = (found >= 0) & (similarity <= ceiling) & (utterance[found] != utterance[mine_][:, None])
            allowed &= (label[found] != label[mine_][:, None]) | (label[mine_][:, None] < 0)
            order = np.argsort(~allowed, axis=1, kind="stable")[:, : config.neighbours]
            kept = np.where(np.take_along_axis(allowed, order, 1), np.take_along_axis(found, order, 1), NONE)
            table[mine_, : kept.shape[1]] = kept
            short.append(mine_[(kept == NONE).any(1)])
        todo = np.concatenate(short) if width < widest and len(vectors) <= EXACT else todo[:0]
        width *= 4
    if len(vectors) > EXACT:
        k = config.neighbours
        say(f"mining: recall@{k} of the approximate index {recall(index, vectors, k):.3f}")
    return Negatives(table, voices)


class Miner:
    """The hard negatives of a run.

    Over the teacher's embeddings one table serves the whole run. Over the student's that table only begins: every
    `refresh` steps the student of that moment embeds one view of every voice and a new table is mined in the
    background; it takes over `refresh` steps later, wherever the background has got to, so that a run repeats exactly.

    Raises:
        UsageError: FAISS is missing. SpkdError: a cache of one utterance.
    """

    def __init__(
        self, cache: Contents, classes: Classes, listening: Listening, config: MiningConfig, ceiling: float
    ) -> None:
        self._cache, self._classes, self._listening = cache, classes, listening
        self._config, self._ceiling = config, ceiling
        self._voices = Groups.of(classes.voice, cache.rows)
        say(f"mining hard negatives among {len(self._voices.first) - 1} voices")
        self.table = self._mine(mean_embeddings(cache, self._voices.group, len(self._voices.first) - 1))
        self._next: Future[Negatives] | None = None
        self._background = ThreadPoolExecutor(1, "mining")

    def draw(self, rows: np.ndarray, seed: int) -> np.ndarray:
        """(B, count) views: hard negatives of the views `rows`."""
        return self.table.draw(rows, self._config.negatives, np.random.RandomState(seed % 2**32))

    def after(self, step: int, network: Network) -> None:
        """Called after every step, with the student that it left."""
        if self._config.over != "student" or (step + 1) % self._config.refresh:
            return
        if self._next is not None:
            self.table = self._next.result()
        student = copy.deepcopy(network).eval()
        self._next = self._background.submit(lambda: self._mine(self._embed(student)))

    def state(self) -> dict[str, Tensor]:
        """What a run continues from: the table in force and the one that is to come."""
        tables = {"now": self.table} | ({} if self._next is None else {"next": self._next.result()})
        return {name: torch.from_numpy(table.neighbours) for name, table in tables.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        tables = {name: Negatives(table.numpy(), self._voices) for name, table in state.items()}
        self.table = tables["now"]
        if "next" in tables:
            self._next = Future()
            self._next.set_result(tables["next"])

    def close(self) -> None:
        self._background.shutdown(cancel_futures=True)

    def _mine(self, vectors: Tensor) -> Negatives:
        return mine(vectors.numpy(), self._voices, self._cache, self._classes, self._config, self._ceiling)

    @torch.inference_mode()
    def _embed(self, network: Network) -> Tensor:
        """The student's embedding of the middle of one view of each voice: (voices, D), normalised."""
        device = next(network.parameters()).device
        lead = self._voices.views[self._voices.first[:-1]]
        samples = HOP * round(self._listening.crops[0] * SAMPLE_RATE / HOP)
        found = []
        for start in range(0, len(lead), EMBEDDED_AT_ONCE):
            rows = lead[start : start + EMBEDDED_AT_ONCE]
            room = np.maximum(self._cache.plan.views.samples[rows] - samples, 0)
            stored = heard(self._cache, self._listening, rows, Crop(room // 2 // HOP * HOP, samples))
            features, _ = decode(self._cache, self._listening, {k: v.to(device) for k, v in stored.items()})
            found.append(normalize(network(features)[EMBEDDING].float(), dim=-1).cpu())
        return torch.cat(found)


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
    if gpus():
        index = faiss.index_cpu_to_all_gpus(index)
    if not index.is_trained:
        chosen = np.random.RandomState(0).permutation(count)[: 40 * lists]
        index.train(vectors[chosen])
    index.add(vectors)
    return index


def gpus() -> int:
    """GPUs on which FAISS searches: none where it is faiss-cpu."""
    import faiss

    return int(faiss.get_num_gpus()) if hasattr(faiss, "index_cpu_to_all_gpus") else 0


def recall(index: Any, vectors: np.ndarray, k: int) -> float:
    """How many of the true k nearest an index finds, over a sample of vectors (themselves counted)."""
    chosen = np.random.RandomState(1).permutation(len(vectors))[:PROBES]
    _, found = index.search(vectors[chosen], k)
    best = torch.from_numpy(vectors[chosen]) @ torch.from_numpy(vectors).mT
    true = best.topk(k, dim=1).indices.numpy()
    return float(np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(found, true, strict=True)]))
