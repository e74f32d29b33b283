"""Hard negatives from the whole cache: for every instance the nearest others by the teacher's embeddings, or by the
student's."""

from __future__ import annotations

import copy
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from spkd.audio import SAMPLE_RATE
from spkd.cache import CacheSource, Crop
from spkd.config import MiningConfig
from spkd.errors import SpkdError, UsageError
from spkd.features import HOP
from spkd.progress import log
from spkd.seeding import Purpose, random_state
from spkd.students import Network
from spkd.target import EMBEDDING
from spkd.train.batches import InputSource, decode_crops, load_crops
from spkd.train.labels import Groups, Labels, mean_embeddings

EXACT = 100_000  # instances up to which every pair is compared
CANDIDATES = 1 << 16  # candidates looked at together: (queries, neighbours asked for)
EMBEDDED_AT_ONCE = 256  # views
PROBES = 1000  # instances on which the recall of an approximate index is measured
GPU_WIDEST = 2048  # most neighbours that FAISS selects on a GPU
NONE = -1


class Drawn(NamedTuple):
    """Hard negatives of a batch.

    Attributes:
        views: (B, N); where there is none, a view that must not be used.
        is_negative: (B, N) whether there is one.
    """

    views: np.ndarray
    is_negative: np.ndarray

    def part(self, rows: slice) -> Drawn:
        """Those of some rows."""
        return Drawn(self.views[rows], self.is_negative[rows])


@dataclass(frozen=True)
class Negatives:
    """Table of hard negatives.

    Attributes:
        neighbours: (instances, K) instances, hardest first, NONE where there are no more.
        instances: the views of each.
    """

    neighbours: np.ndarray
    instances: Groups

    def draw(self, views: np.ndarray, count: int, random: np.random.RandomState) -> Drawn:
        """Of `count` random neighbours of each view's instance a random view each. An instance with fewer neighbours
        gives some of them again; one without any has no negatives."""
        own = self.instances.group[views]
        table = self.neighbours[own]
        known = (table != NONE).sum(1)
        pick = (random.random_sample((len(views), count)) * np.maximum(known, 1)[:, None]).astype(np.int64)
        instance = np.take_along_axis(table, pick, 1)
        is_negative = instance != NONE
        return Drawn(self.instances.pick(np.where(is_negative, instance, own[:, None]), random), is_negative)


def check(cache: CacheSource) -> None:
    """Raises UsageError for a cache that cannot be searched."""
    if EMBEDDING not in cache.names:
        raise UsageError("mining.negatives: needs one teacher's embeddings (teachers=concatenate or average)")
    if not cache.random_access:
        raise UsageError("mining.negatives: a stream cannot be searched; pull or import the cache")


def mine(
    vectors: np.ndarray,
    teacher: np.ndarray,
    instances: Groups,
    cache: CacheSource,
    labels: Labels,
    config: MiningConfig,
    ceiling: float,
) -> Negatives:
    """For every instance (an utterance at one speed) its nearest instances, but for those of the same utterance, of the
    same speaker at the same speed where labels are known, and those whose teacher cosine exceeds `ceiling` (probably
    the same speaker).

    Args:
        vectors: (instances, D), of length one, by which they are near. teacher: (instances, Dt), the teacher's.
    Raises:
        UsageError: FAISS is missing. SpkdError: a cache of one utterance.
    """
    lead = instances.lead
    utterance, label = cache.plan.views.utterance[lead], labels.label[lead]
    if len(np.unique(utterance)) < 2:
        raise SpkdError(f"{cache.name}: hard negatives need at least two utterances")
    table = np.full((len(vectors), config.neighbours), NONE, np.int32)
    search = _Search(vectors, config.nprobe)
    # The instances of the same speaker are among the nearest, and there may be more of them than `neighbours`. What
    # else is excluded is not known before the search: where too few are left, it is repeated wider.
    same = np.bincount(label[label >= 0], minlength=1)[label] * (label >= 0)
    wanted = config.neighbours + max(config.neighbours, int(np.quantile(same, 0.9)))
    todo, width = np.arange(len(vectors)), wanted + wanted // 8
    while len(todo):
        width, short = min(width, search.widest), []
        for start in range(0, len(todo), max(CANDIDATES // width, 1)):
            own = todo[start : start + max(CANDIDATES // width, 1)]
            found, exhausted = search(own, width)
            allowed = (found >= 0) & (utterance[found] != utterance[own][:, None])
            allowed &= (label[found] != label[own][:, None]) | (label[own][:, None] < 0)
            allowed &= _cosines(teacher, own, found) <= ceiling
            order = np.argsort(~allowed, axis=1, kind="stable")[:, : config.neighbours]
            kept = np.where(np.take_along_axis(allowed, order, 1), np.take_along_axis(found, order, 1), NONE)
            table[own, : kept.shape[1]] = kept
            short.append(own[(kept == NONE).any(1) & ~exhausted])
        todo = np.concatenate(short) if width < search.widest else todo[:0]
        width *= 4
        search.widen()
    if not search.exact:
        k = config.neighbours
        log(f"mining: recall@{k} of the approximate index {recall(search.index, vectors, k):.3f}")
    lacking = int((table[:, 0] == NONE).sum())
    if lacking:
        log(f"mining: {lacking:,} of {len(table):,} instances have no allowed neighbour, and so no hard negatives")
    return Negatives(table, instances)


class _Search:
    """Nearest neighbours among vectors, exactly or through inverted lists."""

    def __init__(self, vectors: np.ndarray, nprobe: int) -> None:
        self.index, self._vectors, self._nprobe = build(vectors, nprobe), vectors, nprobe
        self.exact = len(vectors) <= EXACT
        self.widest = min(len(vectors), GPU_WIDEST if gpus() else len(vectors))

    def __call__(self, queries: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        """(B, width) neighbours of some of the vectors, nearest first, -1 where there are no more; and (B,) whether
        wider searches cannot bring more."""
        found = self.index.search(self._vectors[queries], width)[1]
        return found, (found[:, -1] < 0) & (self.exact or self._nprobe >= lists_of(len(self._vectors)))

    def widen(self) -> None:
        """Look into more lists: those probed so far may hold too few."""
        if not self.exact:
            self._nprobe = min(4 * self._nprobe, lists_of(len(self._vectors)))
            set_nprobe(self.index, self._nprobe)


def _cosines(vectors: np.ndarray, queries: np.ndarray, found: np.ndarray) -> np.ndarray:
    """(B, width) inner products of each query with its candidates."""
    table = torch.from_numpy(vectors)
    return torch.einsum("bd,bwd->bw", table[queries], table[np.maximum(found, 0)]).numpy()


class Miner:
    """The hard negatives of a run.

    Over the teacher's embeddings one table serves the whole run. Over the student's that table is only the first: every
    `refresh` steps the student of that moment embeds one view of every instance and a new table is mined in the
    background; it takes over `refresh` steps later, wherever the background has got to, so that a run repeats exactly.

    Raises:
        UsageError: FAISS is missing. SpkdError: a cache of one utterance.
    """

    def __init__(
        self, cache: CacheSource, labels: Labels, source: InputSource, config: MiningConfig, ceiling: float
    ) -> None:
        self._cache, self._labels, self._source = cache, labels, source
        self._config, self._ceiling = config, ceiling
        self._instances = Groups.of(labels.instance, cache.usable_views)
        log(f"mining hard negatives among {len(self._instances):,} instances")
        self._teacher = mean_embeddings(cache, self._instances.group, len(self._instances)).numpy()
        self.table = self._mine(self._teacher)
        self._next: Future[Negatives] | None = None
        self._background = ThreadPoolExecutor(1, "mining")

    def draw(self, views: np.ndarray, seed: int, step: int) -> Drawn:
        """Hard negatives of a batch of views at one step."""
        return self.table.draw(views, self._config.negatives, random_state(Purpose.NEGATIVES, seed, step))

    def after_step(self, step: int, network: Network) -> None:
        """Called after every step, with the student that it left."""
        if self._config.embeddings != "student" or (step + 1) % self._config.refresh:
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
        """Raises KeyError, ValueError: it is not the state of such a run."""
        tables = {}
        for name, table in state.items():
            found = table.numpy()
            if found.shape != self.table.neighbours.shape or found.min() < NONE or found.max() >= len(self._instances):
                raise ValueError(f"mined negatives of another cache ({name})")
            tables[name] = Negatives(found, self._instances)
        self.table = tables["now"]
        if "next" in tables:
            self._next = Future()
            self._next.set_result(tables["next"])

    def close(self) -> None:
        self._background.shutdown(cancel_futures=True)

    def _mine(self, vectors: np.ndarray) -> Negatives:
        return mine(vectors, self._teacher, self._instances, self._cache, self._labels, self._config, self._ceiling)

    @torch.inference_mode()
    def _embed(self, network: Network) -> np.ndarray:
        """The student's embedding of the middle of one view of each instance: (instances, D), normalised."""
        device = next(network.parameters()).device
        lead = self._instances.lead
        samples = HOP * round(self._source.crops[0] * SAMPLE_RATE / HOP)
        found = []
        for start in range(0, len(lead), EMBEDDED_AT_ONCE):
            views = lead[start : start + EMBEDDED_AT_ONCE]
            room = np.maximum(self._cache.plan.views.samples[views] - samples, 0)
            stored = load_crops(self._cache, self._source, views, Crop(room // 2 // HOP * HOP, samples))
            features, _ = decode_crops(self._cache, self._source, {k: v.to(device) for k, v in stored.items()})
            found.append(normalize(network(features)[EMBEDDING].float(), dim=-1).cpu())
        return torch.cat(found).numpy()


def lists_of(count: int) -> int:
    """Inverted lists of an index over so many vectors."""
    return int(2 ** int(np.log2(4 * np.sqrt(count))))


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
        index = faiss.index_factory(dim, f"IVF{lists_of(count)},SQ8", faiss.METRIC_INNER_PRODUCT)
        index.nprobe = min(nprobe, lists_of(count))
    if gpus():
        index = faiss.index_cpu_to_all_gpus(index)
    if not index.is_trained:
        chosen = np.random.RandomState(0).permutation(count)[: 40 * lists_of(count)]
        index.train(vectors[chosen])
    index.add(vectors)
    return index


def set_nprobe(index: Any, nprobe: int) -> None:
    """How many lists a search looks into, wherever the index is."""
    import faiss

    space = faiss.GpuParameterSpace() if gpus() else faiss.ParameterSpace()
    space.set_index_parameter(index, "nprobe", nprobe)


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
