"""`spkd cache cluster`: labels from clusters of a cache's embeddings, for speech whose speakers nobody has named."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import normalize

from spkd.cache import CacheSource
from spkd.cache.plan import UNLABELLED, factors_of
from spkd.config import without_unused
from spkd.errors import SpkdError, UsageError
from spkd.faiss_library import load_faiss
from spkd.files.text import counted
from spkd.outputs.target import EMBEDDING
from spkd.progress import track
from spkd.train.caches import open_caches
from spkd.train.mining import gpus
from spkd.train.settings import ClusterConfig

MOST_MERGED = 10_000  # centres that are merged by default: 400 MB of distances, and as many of scipy's copy
ITERATIONS = 20  # of k-means
CUTS = 50  # numbers of clusters whose silhouettes are compared
READ_AT_ONCE, COMPARED_AT_ONCE = 4096, 512  # views; vectors that are compared with all clusters
EQUAL = 1e-12  # cosine distance of vectors that are the same
NONE = -1


@dataclass(frozen=True)
class Voices:
    """One vector for each utterance: the unit mean of the unit embeddings of its views in the speaker's own voice.

    Views at another speed or formant factor are of pseudo-speakers, which follow the utterance into its cluster.

    Attributes:
        utterance: (N,) number of each utterance in the plan.
        vectors: (N, D) float32.
        without: number of utterances that have no such view.
    """

    utterance: np.ndarray
    vectors: np.ndarray
    without: int

    @classmethod
    def of(cls, cache: CacheSource) -> Voices:
        """The utterances of a cache. What is kept while it is read is one vector for each.

        Raises:
            UsageError: a cache without embeddings of one teacher, or a stream.
            SpkdError: an embedding is not finite, or fewer than two utterances have a view in their own voice.
        """
        if not cache.random_access:
            raise UsageError(f"{cache.name}: a stream cannot be clustered; pull or import the cache")
        if EMBEDDING not in cache.names:
            raise UsageError(f"{cache.name}: holds no embeddings; extract them: teacher.targets=[{EMBEDDING}]")
        count = len(cache.plan.utterances)
        vectors = torch.zeros(count, cache.dim(EMBEDDING))
        for utterance, embeddings in _own_voice(cache):
            vectors.index_add_(0, torch.from_numpy(utterance), normalize(embeddings, dim=-1))
        norms = torch.linalg.vector_norm(vectors, dim=1)  # none of the following takes as much memory as the vectors
        if not bool(norms.isfinite().all()):
            raise SpkdError(f"{cache.name}: embeddings are not finite; look for the shard with spkd cache verify")
        kept = np.flatnonzero(norms.numpy())
        if len(kept) < 2:
            raise SpkdError(
                f"{cache.name}: {counted(len(kept), 'utterance')} with a view in the speaker's own voice (speed and "
                "formant factor 1); clusters need two, so extract with view=full"
            )
        for start in range(0, len(kept), READ_AT_ONCE):
            rows = torch.from_numpy(kept[start : start + READ_AT_ONCE])
            vectors[start : start + len(rows)] = normalize(vectors[rows], dim=-1)
        return cls(kept, vectors[: len(kept)].numpy(), count - len(kept))


def _own_voice(cache: CacheSource) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """Utterances (B,) and embeddings (B, D) float32 of the views in the speaker's own voice, in pieces."""
    own, usable = int(factors_of(np.ones(1), np.ones(1))[0]), cache.usable_views
    with track("reading embeddings", len(usable)) as bar:
        for start in range(0, len(usable), READ_AT_ONCE):
            views = usable[start : start + READ_AT_ONCE]
            rows = cache.plan.views[views]
            is_own = factors_of(rows.speed, rows.formants) == own
            if is_own.any():
                stored = cache.stored(views[is_own], [EMBEDDING])
                yield rows.utterance[is_own].astype(np.int64), cache.decode(stored, [EMBEDDING])[EMBEDDING].float()
            bar.advance(len(views))


@dataclass(frozen=True)
class Clusters:
    """Clusters of vectors.

    Attributes:
        cluster: (N,) number of the cluster of each vector, from the largest cluster on; NONE where it was left out.
        sizes: (clusters,) number of vectors in each, descending.
        small: number of clusters that were left out.
        silhouette: mean silhouette of the centres; None where their number was not chosen by it.
    """

    cluster: np.ndarray
    sizes: np.ndarray
    small: int
    silhouette: float | None = None

    @classmethod
    def of(cls, merged: np.ndarray, smallest: int, silhouette: float | None) -> Clusters:
        """Number clusters by size, without those of fewer than `smallest` vectors.

        Args:
            merged: (N,) cluster of each vector.
        """
        _, first, number, sizes = np.unique(merged, return_index=True, return_inverse=True, return_counts=True)
        order = np.lexsort((first, -sizes))
        kept = order[sizes[order] >= smallest]
        renumbered = np.full(len(sizes), NONE, np.int64)
        renumbered[kept] = np.arange(len(kept))
        return cls(renumbered[number], sizes[kept], len(sizes) - len(kept), silhouette)

    def __len__(self) -> int:
        return len(self.sizes)

    def name(self, cluster: int) -> str:
        """Name of a cluster as a speaker."""
        return f"cluster-{cluster:0{len(str(len(self) - 1))}}"


def cluster(vectors: np.ndarray, config: ClusterConfig) -> Clusters:
    """Clusters of unit vectors: k-means, then merging of its centres by average linkage of their cosines.

    As Miara, Lepage and Dehak (Interspeech 2024, arXiv 2406.02285) cluster: their code has 50,000 clusters of k-means
    for VoxCeleb2, merged by Ward's linkage to 7,500. Linkage by cosine is this project's choice.

    Without `speakers` and `similarity`, the number of clusters is the one with the largest mean silhouette of the
    centres (Rousseeuw, J. Comput. Appl. Math. 20, 1987): of CUTS numbers between 2 and that of the centres in geometric
    steps, and then of CUTS between the neighbours of the best.

    Args:
        vectors: (N, D) float32.
    Raises:
        UsageError: more clusters than vectors or centres, too few to choose by the silhouette, or FAISS is missing.
        SpkdError: all clusters were left out, or embeddings that are nearly all equal.
    """
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import pdist

    count = min(config.centres or MOST_MERGED, len(vectors))
    if config.centres > len(vectors):
        raise UsageError(f"centres={config.centres}: more than {counted(len(vectors), 'utterance')}")
    if config.speakers > count:
        raise UsageError(f"speakers={config.speakers}: more than {counted(count, 'centre')} of k-means (centres=)")
    chosen = not config.speakers and config.similarity is None
    if count < 3 if chosen else count < 2:
        raise UsageError(f"{counted(count, 'centre')}: too few to choose a number of clusters; give speakers=NUMBER")
    centres, nearest = (vectors, np.arange(count)) if count == len(vectors) else k_means(vectors, count, config.seed)
    if len(centres) < (3 if chosen else 2):
        raise SpkdError(
            f"k-means leaves {counted(len(centres), 'centre')} of {count:,}: the embeddings are nearly all equal"
        )
    tree = linkage(pdist(centres, "cosine"), "average")
    silhouette = None
    if config.similarity is not None:
        merged = fcluster(tree, 1 - config.similarity, "distance")
    elif config.speakers:
        merged = fcluster(tree, config.speakers, "maxclust")
    else:
        silhouette, merged = _clearest(centres, tree)
    found = Clusters.of(merged[nearest], config.smallest, silhouette)
    if not len(found):
        raise SpkdError(f"no cluster has {config.smallest} utterances; lower smallest, or merge more of them")
    return found


def _clearest(centres: np.ndarray, tree: np.ndarray) -> tuple[float, np.ndarray]:
    """The largest mean silhouette of the cuts of a tree of scipy, and the cluster (N,) of each centre in this cut."""
    from scipy.cluster.hierarchy import fcluster

    low, high, found = 2, len(centres) - 1, dict[int, float]()
    for _ in range(2):
        numbers = np.unique(np.rint(np.geomspace(low, high, CUTS)).astype(int)).tolist()
        with track("comparing numbers of clusters", len(numbers), "numbers") as bar:
            for number in numbers:
                found[number] = mean_silhouette(centres, fcluster(tree, number, "maxclust"))
                bar.advance(1)
        place = numbers.index(max(numbers, key=found.__getitem__))
        low, high = numbers[max(place - 1, 0)], numbers[min(place + 1, len(numbers) - 1)]
    best = max(found, key=found.__getitem__)
    return found[best], fcluster(tree, best, "maxclust")


def k_means(vectors: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Centres of k-means on the sphere by FAISS, on GPUs where it sees some, without those of no vector.

    Args:
        vectors: (N, D) unit vectors, float32.
    Returns:
        (at most count, D) unit vectors.
        (N,) number of the nearest centre of each vector.
    """
    faiss = load_faiss("spkd cache cluster")
    # No sample is drawn: it would be a copy.
    points = {"min_points_per_centroid": 1, "max_points_per_centroid": len(vectors) // count + 1}
    means = faiss.Kmeans(vectors.shape[1], count, niter=ITERATIONS, spherical=True, seed=seed, gpu=gpus() > 0, **points)
    means.train(vectors)
    nearest = means.index.search(vectors, 1)[1][:, 0]
    used, nearest = np.unique(nearest, return_inverse=True)
    return means.centroids[used], nearest


def mean_silhouette(vectors: np.ndarray, cluster: np.ndarray) -> float:
    """Mean silhouette of unit vectors by cosine distance (Rousseeuw 1987, eq. 1 to 3).

    s = (b - a) / max(a, b), where a is the mean distance of a vector to the others of its cluster, and b the least mean
    distance to another cluster; 0 for a vector alone in its cluster. The mean cosine distance of x to a set of vectors
    is 1 - x . m, m being their mean, so that no distances of pairs are needed.

    Args:
        vectors: (N, D).
        cluster: (N,), two clusters at least.
    """
    _, cluster, size = np.unique(cluster, return_inverse=True, return_counts=True)
    vectors = vectors.astype(np.float64)  # differences of nearly parallel vectors are below the precision of float32
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    sums = np.zeros((len(size), vectors.shape[1]))
    np.add.at(sums, cluster, vectors)
    total = 0.0
    for start in range(0, len(vectors), COMPARED_AT_ONCE):
        own = cluster[start : start + COMPARED_AT_ONCE]
        rows, number = vectors[start : start + len(own)] @ sums.T, size[own]
        places = np.arange(len(own)), own
        within = (number - rows[places]) / np.maximum(number - 1, 1)
        distances = 1 - rows / size
        distances[places] = np.inf
        nearest = distances.min(1)
        largest = np.maximum(np.maximum(within, nearest), EQUAL)
        total += float(np.where(number > 1, (nearest - within) / largest, 0.0).sum())
    return total / len(vectors)


def purity(cluster: np.ndarray, speaker: np.ndarray) -> float:
    """Purity: fraction of the vectors whose speaker is the most frequent one of their cluster.

    Args:
        cluster, speaker: (N,) numbers.
    """
    pairs, count = np.unique(np.stack([cluster, speaker]), axis=1, return_counts=True)
    order = np.lexsort((-count, pairs[0]))
    first = np.flatnonzero(np.diff(pairs[0][order], prepend=-2))
    return float(count[order][first].sum() / len(cluster))


def normalised_mutual_information(cluster: np.ndarray, speaker: np.ndarray) -> float:
    """Mutual information over the mean of both entropies (Strehl and Ghosh, JMLR 3, 2002, with the arithmetic mean).

    It is 1 where clusters are speakers, also where both are one.

    Args:
        cluster, speaker: (N,) numbers.
    """
    pairs = np.stack([np.unique(each, return_inverse=True)[1] for each in (cluster, speaker)])
    (a, b), both = np.unique(pairs, axis=1, return_counts=True)
    of_clusters, of_speakers = (np.bincount(each) / pairs.shape[1] for each in pairs)
    joint = both / pairs.shape[1]
    shared = float((joint * np.log(joint / (of_clusters[a] * of_speakers[b]))).sum())
    entropies = [float(-(p * np.log(p)).sum()) for p in (of_clusters, of_speakers)]
    return shared / (sum(entropies) / 2) if sum(entropies) else 1.0


def labels_of(paths: Sequence[str | Path], config: ClusterConfig) -> tuple[list[tuple[str, str]], list[str]]:
    """Utterances of caches with their clusters, in the order of the caches, and lines that describe the clusters.

    Args:
        paths: folders of caches of one teacher over several corpora, or of several teachers over one.
    Raises:
        UsageError, SpkdError: as open_caches, Voices.of and cluster.
    """
    cache = open_caches([str(path) for path in paths], labelled=False)
    voices = Voices.of(cache)
    if (config.centres or MOST_MERGED) >= len(voices.vectors):
        config = without_unused(config, {"seed": "there is no k-means: each utterance is merged by itself"})
    clusters = cluster(voices.vectors, config)
    kept = np.flatnonzero(clusters.cluster != NONE)
    utterances = cache.plan.utterances
    rows = [(utterances[int(voices.utterance[i])], clusters.name(int(clusters.cluster[i]))) for i in kept]
    speaker = np.asarray(cache.plan.speaker[voices.utterance[kept]])
    return rows, _lines(clusters, voices, clusters.cluster[kept], speaker, config)


def _lines(
    clusters: Clusters, voices: Voices, cluster: np.ndarray, speaker: np.ndarray, config: ClusterConfig
) -> list[str]:
    """Lines that describe clusters.

    Args:
        cluster: (utterances,) cluster of each utterance that has one.
        speaker: (utterances,) its speaker in the manifest.
    """
    sizes, left_out = clusters.sizes, int((clusters.cluster == NONE).sum())
    chosen = "" if clusters.silhouette is None else f" (mean silhouette {clusters.silhouette:.3f})"
    lines = [
        f"{counted(len(clusters), 'cluster')}{chosen} of {counted(len(cluster), 'utterance')}; utterances in one: "
        f"at least {sizes[-1]:,}, median {np.median(sizes):g}, at most {sizes[0]:,}"
    ]
    made = len(clusters) + clusters.small
    if config.speakers > made:
        lines.append(f"note: speakers={config.speakers}, but distances that are equal leave {counted(made, 'cluster')}")
    if clusters.silhouette is not None and made == 2:
        lines.append("note: two clusters may be women and men, or two channels; where you know better, give speakers=")
    if left_out:
        lines.append(
            f"{counted(left_out, 'utterance')} left out, in {counted(clusters.small, 'cluster')} of fewer than "
            f"{config.smallest} (smallest={config.smallest})"
        )
    if voices.without:
        lines.append(f"{counted(voices.without, 'utterance')} left out, without a view in the speaker's own voice")
    known = speaker != UNLABELLED
    if known.any():
        pure = purity(cluster[known], speaker[known])
        information = normalised_mutual_information(cluster[known], speaker[known])
        lines.append(
            f"purity {pure:.3f}, NMI {information:.3f} over {counted(int(known.sum()), 'utterance')} of "
            f"{counted(len(np.unique(speaker[known])), 'speaker')} of the manifest"
        )
    return lines
