"""Mining in the whole cache: hard negatives of each view, and positives from other recordings.

Both are nearest neighbours of its embedding, of the teacher or of the student.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from spkd.cache import CacheSource, Crop
from spkd.errors import SpkdError, UsageError
from spkd.faiss_library import load_faiss
from spkd.outputs.features import HOP
from spkd.outputs.target import EMBEDDING
from spkd.progress import log
from spkd.seeding import Purpose, random_state
from spkd.students import Network
from spkd.train.batches import BatchContent, decode_crops, load_crops, whole_hops
from spkd.train.distributed import ALONE, ProcessGroup, first_ranks
from spkd.train.labels import Groups, Labels, mean_embeddings
from spkd.train.settings import MiningConfig

EXACT = 100_000  # instances up to which every pair is compared
CANDIDATES = 1 << 16  # candidates examined together: queries times neighbours asked for
EMBEDDED_AT_ONCE = 256  # views
PROBES = 1000  # instances on which the recall of an approximate index is measured
GPU_WIDEST = 2048  # most neighbours that FAISS selects on a GPU, and most inverted lists that a search visits there
NONE = -1
NEGATIVES, POSITIVES = "negatives", "positives"
CPU = torch.device("cpu")


class Drawn(NamedTuple):
    """Neighbours drawn for a batch.

    Attributes:
        views: (B, N) numbers of views; where a neighbour is lacking, a view of the same instance.
        found: (B, N) whether there is a neighbour.
    """

    views: np.ndarray
    found: np.ndarray

    def part(self, rows: slice) -> Drawn:
        """Neighbours of some rows of the batch."""
        return Drawn(self.views[rows], self.found[rows])


@dataclass(frozen=True)
class Neighbours:
    """Table of the nearest instances of each instance.

    Attributes:
        neighbours: (instances, K) numbers of instances, nearest first, NONE where there are no more.
        instances: views of each instance.
    """

    neighbours: np.ndarray
    instances: Groups

    def draw(self, views: np.ndarray, count: int, random: np.random.RandomState) -> Drawn:
        """A random view of each of `count` random neighbours of the instance of each view (B,).

        Where an instance has fewer neighbours, some are drawn repeatedly.
        """
        anchor = self.instances.group[views]
        table = self.neighbours[anchor]
        known = (table != NONE).sum(1)
        pick = (random.random_sample((len(views), count)) * np.maximum(known, 1)[:, None]).astype(np.int64)
        instance = np.take_along_axis(table, pick, 1)
        found = instance != NONE
        return Drawn(self.instances.pick(np.where(found, instance, anchor[:, None]), random), found)


Tables = dict[str, Neighbours]


def check(cache: CacheSource, config: MiningConfig, groups: bool = False) -> None:
    """Check that a cache can be searched. Raises UsageError where it cannot.

    Args:
        groups: whether batches are made of the teacher's neighbours (sampler=hard).
    """
    if EMBEDDING not in cache.names and (config.negatives or groups or config.embeddings == "teacher"):
        raise UsageError("mining: needs one teacher's embeddings (teachers=concatenate or average)")
    if not cache.random_access:
        raise UsageError("mining: a stream cannot be searched; pull or import the cache")


def mine(
    vectors: np.ndarray,
    teacher: np.ndarray,
    instances: Groups,
    cache: CacheSource,
    labels: Labels,
    config: MiningConfig,
    ceiling: float,
) -> Neighbours:
    """Hard negatives: the nearest instances of every instance that are probably of other speakers.

    Left out are instances of the same utterance, of the same class where labels are known, and those whose teacher
    cosine exceeds `ceiling` (probably the same speaker).

    Args:
        vectors: (instances, D) unit vectors of the search.
        teacher: (instances, Dt) the teacher's unit embeddings.
        ceiling: teacher cosine above which an instance is left out.
    Raises:
        UsageError: FAISS is missing, or installed twice.
        SpkdError: a cache of one utterance.
    """
    views = instances.first_views
    utterance, label = cache.plan.views.utterance[views], labels.label[views]
    if len(np.unique(utterance)) < 2:
        raise SpkdError(f"{cache.name}: hard negatives need at least two utterances")
    table = np.full((len(vectors), config.neighbours), NONE, np.int32)
    search = _Search(vectors, config.nprobe, config.neighbours)
    # Width of the first search: instances of the same speaker are among the nearest, and may outnumber `neighbours`.
    same = np.bincount(label[label >= 0], minlength=1)[label] * (label >= 0)
    wanted = config.neighbours + max(config.neighbours, int(np.quantile(same, 0.9)))
    todo, width = np.arange(len(vectors)), wanted + wanted // 8
    # Further exclusions are not known before the search: queries with too few neighbours are searched again, wider.
    while len(todo):
        width, short = min(width, search.widest), []
        for queries in _chunks(todo, width):
            candidates, exhausted = search(queries, width)
            allowed = (candidates >= 0) & (utterance[candidates] != utterance[queries][:, None])
            allowed &= (label[candidates] != label[queries][:, None]) | (label[queries][:, None] < 0)
            allowed &= _cosines(teacher, queries, candidates) <= ceiling
            kept = _first_allowed(candidates, allowed, config.neighbours)
            table[queries, : kept.shape[1]] = kept
            short.append(queries[(kept == NONE).any(1) & ~exhausted])
        todo = np.concatenate(short) if width < search.widest else todo[:0]
        width *= 4
        search.widen()
    search.log_recall()
    lacking = int((table[:, 0] == NONE).sum())
    if lacking:
        log(f"mining: {lacking:,} of {len(table):,} instances have no allowed neighbour, and so no hard negatives")
    return Neighbours(table, instances)


def find_positives(vectors: np.ndarray, instances: Groups, cache: CacheSource, config: MiningConfig) -> Neighbours:
    """Positives: the nearest instances of every instance in other utterances, with a cosine of at least `config.floor`.

    They are other recordings of the same speaker, as far as the embeddings are good (SSPS; Lepage and Dehak, arXiv
    2505.14561, who sample near the anchor's cluster in a queue; the search of the whole cache and the floor are this
    project's choice).

    Args:
        vectors: (instances, D) unit vectors of the search.
    Raises:
        UsageError: FAISS is missing, or installed twice.
    """
    utterance = cache.plan.views.utterance[instances.first_views]
    table = np.full((len(vectors), config.positives), NONE, np.int32)
    search = _Search(vectors, config.nprobe, config.positives)
    # Only instances of the same utterance are excluded, so one search of this width suffices.
    width = min(config.positives + int(np.bincount(utterance).max()), search.widest)
    for queries in _chunks(np.arange(len(vectors)), width):
        candidates, _ = search(queries, width)
        allowed = (candidates >= 0) & (utterance[candidates] != utterance[queries][:, None])
        allowed &= _cosines(vectors, queries, candidates) >= config.floor
        kept = _first_allowed(candidates, allowed, config.positives)
        table[queries, : kept.shape[1]] = kept
    search.log_recall()
    log(f"mining: {float((table[:, 0] != NONE).mean()):.0%} of the instances have positives in other utterances")
    return Neighbours(table, instances)


def _chunks(queries: np.ndarray, width: int) -> Iterator[np.ndarray]:
    """Queries in chunks whose candidates, `width` for each query, are examined together."""
    together = max(CANDIDATES // width, 1)
    return (queries[start : start + together] for start in range(0, len(queries), together))


def _first_allowed(candidates: np.ndarray, allowed: np.ndarray, count: int) -> np.ndarray:
    """The first `count` allowed candidates of each query, NONE where there are fewer.

    Args:
        candidates: (B, width) numbers of instances.
        allowed: (B, width) whether each may be taken.
    Returns:
        (B, at most count).
    """
    # A stable sort by "not allowed" keeps the allowed ones in front, nearest first.
    order = np.argsort(~allowed, axis=1, kind="stable")[:, :count]
    return np.where(np.take_along_axis(allowed, order, 1), np.take_along_axis(candidates, order, 1), NONE)


class _Search:
    """Nearest neighbours among vectors, exactly or through inverted lists.

    Args:
        vectors: (n, D) unit vectors.
        nprobe: number of inverted lists that a search visits.
        k: number of neighbours over which the recall is measured.
    """

    def __init__(self, vectors: np.ndarray, nprobe: int, k: int) -> None:
        self.index, self._vectors, self._exact = build(vectors, nprobe), vectors, len(vectors) <= EXACT
        self._nprobe = min(nprobe, most_lists(len(vectors)))
        if not self._exact and self._nprobe < min(nprobe, lists_of(len(vectors))):
            log(f"mining: FAISS visits at most {GPU_WIDEST:,} lists on a GPU, and not mining.nprobe={nprobe}")
        self.widest = min(len(vectors), GPU_WIDEST if gpus() else len(vectors))
        # Sample of vectors, and the result of their last search, for the recall.
        self._sample = np.sort(np.random.RandomState(1).permutation(len(vectors))[:PROBES])
        self._found = np.full((len(self._sample), k), NONE, np.int64)

    def __call__(self, queries: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Neighbours of some of the vectors.

        Args:
            queries: (B,) numbers of the vectors.
            width: number of neighbours.
        Returns:
            (B, width) numbers of vectors, nearest first, -1 where there are no more.
            (B,) whether a wider search cannot give more.
        """
        neighbours = self.index.search(self._vectors[queries], width)[1]
        place = np.searchsorted(self._sample, queries).clip(max=len(self._sample) - 1)
        is_sampled = self._sample[place] == queries
        k = min(width, self._found.shape[1])
        self._found[place[is_sampled], :k] = neighbours[is_sampled, :k]
        return neighbours, (neighbours[:, -1] < 0) & (self._exact or self._nprobe >= lists_of(len(self._vectors)))

    def widen(self) -> None:
        """Visit more lists in later searches: those visited so far may hold too few vectors."""
        if not self._exact:
            self._nprobe = min(4 * self._nprobe, most_lists(len(self._vectors)))
            set_nprobe(self.index, self._nprobe)

    def log_recall(self) -> None:
        """Log the fraction of the true nearest neighbours that the searches gave, where they were approximate."""
        if not self._exact:
            k = self._found.shape[1]
            log(
                f"mining: recall@{k} of the approximate searches {recall(self._vectors, self._sample, self._found):.3f}"
            )


def _cosines(vectors: np.ndarray, queries: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Inner products (B, width) of each query (B,) with its candidates (B, width)."""
    table = torch.from_numpy(vectors)
    return torch.einsum("bd,bwd->bw", table[queries], table[np.maximum(candidates, 0)]).numpy()


class Miner:
    """Hard negatives and positives of a run.

    With the teacher's embeddings, the tables are computed once for the whole run. With the student's, these are only
    the first tables (empty without a teacher): every `refresh` steps the current student embeds one view of every
    instance, and new tables are computed in the background. They are used from `refresh` steps later on, even if they
    are ready earlier, so that a run is repeated exactly. Of several ranks, the first searches and the others receive
    its tables.

    Args:
        ceiling: teacher cosine above which an instance is not used as a negative.
        crop: length of the crops that the student embeds (s).
        tables: names of the tables: `negatives`, `positives` or both.
    Attributes:
        tables: current tables by name.
    Raises:
        UsageError: FAISS is missing, or installed twice.
        SpkdError: a cache of one utterance.
    """

    def __init__(
        self,
        content: BatchContent,
        config: MiningConfig,
        ceiling: float,
        crop: float,
        tables: Sequence[str] = (NEGATIVES,),
        ranks: ProcessGroup = ALONE,
        device: torch.device = CPU,
    ) -> None:
        self._content, self._config, self._ceiling, self._crop = content, config, ceiling, crop
        cache, labels = content.cache, content.labels
        self._ranks, self._device = ranks, device
        self._instances = Groups.of(labels.instance, cache.usable_views)
        self._widths = {name: config.neighbours if name == NEGATIVES else config.positives for name in tables}
        self._teacher: np.ndarray | None = None
        log(f"mining {' and '.join(self._widths)} among {len(self._instances):,} instances")
        with ranks.first_alone():
            if EMBEDDING in cache.names and ranks.is_first:
                self._teacher = mean_embeddings(cache, self._instances.group, len(self._instances)).numpy()
            searched = self._search(self._teacher) if ranks.is_first else None
        self.tables = self._from_first(searched)
        self._next: Future[Tables] | None = None
        self._background = ThreadPoolExecutor(1, "mining")

    def __getstate__(self) -> dict[str, Any]:
        # A loader's process only draws from the tables.
        return {"tables": self.tables, "_config": self._config}

    def negatives(self, views: np.ndarray, seed: int, step: int) -> Drawn:
        """Hard negatives of a batch of views at one step."""
        random = random_state(Purpose.NEGATIVES, seed, step)
        return self.tables[NEGATIVES].draw(views, self._config.negatives, random)

    def positives(self, views: np.ndarray, random: np.random.RandomState) -> np.ndarray:
        """Random view (B,) of a positive of each view, or of the same instance where it has none."""
        return self.tables[POSITIVES].draw(views, 1, random).views[:, 0]

    def after_step(self, step: int, network: Network) -> None:
        """Called after every step, with the student as it is then; starts and applies the refresh of the tables."""
        if self._config.embeddings != "student" or (step + 1) % self._config.refresh:
            return
        if step + 1 >= 2 * self._config.refresh:
            with self._ranks.first_alone():
                searched = None if self._next is None else self._next.result()
            self.tables = self._from_first(searched)
        if self._ranks.is_first:
            student = copy.deepcopy(network).eval()
            self._next = self._background.submit(lambda: self._search(self._embed(student)))

    def state(self) -> dict[str, Tensor]:
        """State from which a run is continued: the current tables and the next ones."""
        tables = {"now": self.tables} | ({} if self._next is None else {"next": self._next.result()})
        return {
            f"{when}.{name}": torch.from_numpy(table.neighbours)
            for when, by_name in tables.items()
            for name, table in by_name.items()
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Load the state of a run. Raises KeyError or ValueError where it is not of such a run."""
        tables: dict[str, Tables] = {}
        for key, table in state.items():
            when, _, name = key.partition(".")
            neighbours = table.numpy()
            if neighbours.shape != self.tables[name].neighbours.shape:
                raise ValueError(f"mined {name} of another cache")
            if neighbours.min() < NONE or neighbours.max() >= len(self._instances):
                raise ValueError(f"mined {name} of another cache")
            tables.setdefault(when, {})[name] = Neighbours(neighbours, self._instances)
        self.tables = tables["now"]
        if "next" in tables:
            self._next = Future()
            self._next.set_result(tables["next"])

    def close(self) -> None:
        self._background.shutdown(cancel_futures=True)

    def _from_first(self, searched: Tables | None) -> Tables:
        """Tables of the first rank, sent to all; `searched` is None on the others."""
        if self._ranks.world == 1:
            assert searched is not None
            return searched
        tables = {}
        for name, width in self._widths.items():
            shape = (len(self._instances), width)
            rows = np.empty(shape, np.int32) if searched is None else searched[name].neighbours
            sent = first_ranks(torch.from_numpy(rows).to(self._device))
            tables[name] = Neighbours(sent.cpu().numpy(), self._instances)
        return tables

    def _search(self, vectors: np.ndarray | None) -> Tables:
        """Tables from embeddings (instances, D); empty tables without embeddings."""
        cache, labels, tables = self._content.cache, self._content.labels, {}
        for name, width in self._widths.items():
            if vectors is None:
                tables[name] = Neighbours(np.full((len(self._instances), width), NONE, np.int32), self._instances)
            elif name == POSITIVES:
                tables[name] = find_positives(vectors, self._instances, cache, self._config)
            else:
                assert self._teacher is not None
                tables[name] = mine(vectors, self._teacher, self._instances, cache, labels, self._config, self._ceiling)
        return tables

    @torch.inference_mode()
    def _embed(self, network: Network) -> np.ndarray:
        """The student's unit embeddings (instances, D) of the middle of one view of each instance."""
        cache, source, views = self._content.cache, self._content.source, self._instances.first_views
        device, samples, embeddings = next(network.parameters()).device, whole_hops(self._crop), []
        for start in range(0, len(views), EMBEDDED_AT_ONCE):
            batch = views[start : start + EMBEDDED_AT_ONCE]
            room = np.maximum(cache.plan.views.samples[batch] - samples, 0)
            stored = load_crops(cache, source, batch, Crop(room // 2 // HOP * HOP, samples))
            features, _ = decode_crops(cache, source, {k: v.to(device) for k, v in stored.items()})
            embeddings.append(normalize(network(features)[EMBEDDING].float(), dim=-1).cpu())
        return torch.cat(embeddings).numpy()


def lists_of(count: int) -> int:
    """Number of inverted lists of an index of `count` vectors."""
    return int(2 ** int(np.log2(4 * np.sqrt(count))))


def most_lists(count: int) -> int:
    """Largest number of inverted lists that a search visits, of an index of `count` vectors."""
    return min(lists_of(count), GPU_WIDEST) if gpus() else lists_of(count)


def build(vectors: np.ndarray, nprobe: int) -> Any:
    """FAISS index of unit vectors by inner product, on the GPU where FAISS sees one.

    It is exact up to 100,000 vectors; above, it has inverted lists of 8-bit codes.

    Args:
        vectors: (n, D) unit vectors.
        nprobe: number of inverted lists that a search visits.
    Raises:
        UsageError: FAISS is missing, or installed twice.
    """
    faiss = load_faiss("mining")
    count, dim = vectors.shape
    index: Any
    if count <= EXACT:
        index = faiss.IndexFlatIP(dim)
    else:
        index = faiss.index_factory(dim, f"IVF{lists_of(count)},SQ8", faiss.METRIC_INNER_PRODUCT)
        index.nprobe = min(nprobe, most_lists(count))
    if gpus():
        index = faiss.index_cpu_to_all_gpus(index)
    if not index.is_trained:
        chosen = np.random.RandomState(0).permutation(count)[: 40 * lists_of(count)]
        index.train(vectors[chosen])
    index.add(vectors)
    return index


def set_nprobe(index: Any, nprobe: int) -> None:
    """Set the number of inverted lists that a search visits, for an index on the CPU or on GPUs."""
    faiss = load_faiss("mining")
    space = faiss.GpuParameterSpace() if gpus() else faiss.ParameterSpace()
    space.set_index_parameter(index, "nprobe", nprobe)


def gpus() -> int:
    """Number of GPUs on which FAISS searches: 0 with faiss-cpu."""
    faiss = load_faiss("mining")
    return int(faiss.get_num_gpus()) if hasattr(faiss, "index_cpu_to_all_gpus") else 0


def recall(vectors: np.ndarray, queries: np.ndarray, found: np.ndarray) -> float:
    """Recall: mean fraction of the k nearest vectors of each query (including itself) that a search gave.

    Args:
        vectors: (n, D) unit vectors.
        queries: (Q,) numbers of vectors.
        found: (Q, k) numbers of the neighbours that the search gave, in any order.
    """
    k = found.shape[1]
    similarity = torch.from_numpy(vectors[queries]) @ torch.from_numpy(vectors).mT
    true = similarity.topk(k, dim=1).indices.numpy()
    return float(np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(found, true, strict=True)]))
