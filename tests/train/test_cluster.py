"""`spkd cache cluster`: vectors of utterances, clusters of them, and the lines that describe them."""

from __future__ import annotations

import csv
import gzip
import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spkd.cache import Cache
from spkd.corpus.manifest import Manifest
from spkd.errors import SpkdError
from spkd.train.cluster import (
    NONE,
    Voices,
    cluster,
    k_means,
    mean_silhouette,
    normalised_mutual_information,
    purity,
)
from spkd.train.settings import ClusterConfig
from tests.conftest import save_teacher

metrics = pytest.importorskip("sklearn.metrics")
pytest.importorskip("faiss")


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def speakers(count: int, each: int, noise: float, seed: int = 0, dim: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors around random directions, and the number of the direction of each, in random order."""
    random = np.random.RandomState(seed)
    of = random.permutation(np.repeat(np.arange(count), each))
    return unit(random.randn(count, dim)[of] + noise * random.randn(count * each, dim)), of


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two partitions are equal, whatever the numbers of their parts."""
    return bool(((a[:, None] == a) == (b[:, None] == b)).all())


def by_hand(vectors: np.ndarray, similarity: float) -> np.ndarray:
    """Average linkage from its definition: the two clusters with the largest mean cosine of all pairs are merged, as
    long as it is large enough."""
    cosines, parts = vectors.astype(np.float64) @ vectors.T, [[i] for i in range(len(vectors))]
    while len(parts) > 1:
        means = {
            (i, j): cosines[np.ix_(parts[i], parts[j])].mean() for i, j in itertools.combinations(range(len(parts)), 2)
        }
        (i, j), most = max(means.items(), key=lambda item: item[1])
        if most < similarity:
            break
        parts[i] += parts.pop(j)
    found = np.zeros(len(vectors), int)
    for number, part in enumerate(parts):
        found[part] = number
    return found


@pytest.mark.parametrize("similarity", [-0.2, 0.1, 0.4, 0.8])
def test_merging_is_average_linkage(similarity: float) -> None:
    vectors, _ = speakers(6, 4, 0.9, dim=5)
    found = cluster(vectors, ClusterConfig(similarity=similarity))
    expected = by_hand(vectors, similarity)
    assert same(found.cluster, expected)
    assert found.sizes.tolist() == sorted(Counter(expected.tolist()).values(), reverse=True)
    assert found.cluster[np.bincount(found.cluster)[found.cluster] == found.sizes[0]].min() == 0  # the largest is first


@pytest.mark.parametrize("config", [ClusterConfig(), ClusterConfig(centres=90), ClusterConfig(speakers=23, centres=90)])
def test_clusters_of_distinct_voices_are_the_speakers(config: ClusterConfig) -> None:
    """Their number is found by the silhouette, also of the centres of k-means."""
    vectors, of = speakers(23, 8, 0.15, dim=32)
    found = cluster(vectors, config)
    assert same(found.cluster, of)
    assert (found.silhouette is None) == (config.speakers > 0)
    again = cluster(vectors, config)
    assert np.array_equal(again.cluster, found.cluster)


@pytest.mark.parametrize("given", [{}, {"speakers": 2}, {"similarity": 0.5}], ids=str)
def test_equal_vectors_have_no_clusters(given: dict[str, Any]) -> None:
    vectors = np.repeat(np.eye(1, 8, dtype=np.float32), 9, 0)
    with pytest.raises(SpkdError, match="k-means leaves 1 centre of 5: the embeddings are nearly all equal"):
        cluster(vectors, ClusterConfig(centres=5, **given))


def test_k_means_gives_the_nearest_unit_centre_of_each_vector() -> None:
    vectors, _ = speakers(10, 30, 0.8)
    centres, nearest = k_means(vectors, 40, seed=3)
    assert np.allclose(np.linalg.norm(centres, axis=1), 1, atol=1e-5)
    assert np.array_equal(nearest, (vectors @ centres.T).argmax(1))
    assert set(nearest.tolist()) == set(range(len(centres)))
    other, _ = k_means(vectors, 40, seed=4)
    assert not np.array_equal(other, centres)


def test_small_clusters_are_left_out() -> None:
    vectors, of = speakers(5, 6, 0.1, dim=32)
    kept = np.flatnonzero((of > 1) | (np.arange(len(of)) < 3) & (of == 0) | (of == 1))
    counts = np.bincount(of[kept], minlength=5)
    found = cluster(vectors[kept], ClusterConfig(similarity=0.7, smallest=4))
    assert ((found.cluster == NONE) == (counts[of[kept]] < 4)).all()
    assert found.small == int(((counts > 0) & (counts < 4)).sum())


@pytest.mark.parametrize("seed", range(3))
def test_the_silhouette_is_that_of_scikit_learn(seed: int) -> None:
    vectors, of = speakers(7, 5, 1.0, seed)
    for labels in (
        of,
        np.where(np.arange(35) < 4, np.arange(35) + 10, of),
        np.random.RandomState(seed).randint(3, size=35),
    ):
        expected = metrics.silhouette_score(vectors.astype(np.float64), labels, metric="cosine")
        assert mean_silhouette(vectors, labels) == pytest.approx(expected, abs=1e-6)


def test_the_silhouette_of_nearly_parallel_vectors_is_none_of_rounding() -> None:
    """As of a network of random weights: groups at angles of 1e-4, whose cosines differ by less than float32 has."""
    vectors, of = speakers(4, 6, 0.1)
    near = unit(np.eye(16)[0] + 1e-4 * vectors)
    assert 0 < mean_silhouette(near, of) <= 1
    assert mean_silhouette(np.repeat(near[:1], 6, axis=0), np.arange(6) % 2) == pytest.approx(0, abs=1e-3)
    assert mean_silhouette(np.repeat(near[:2], 6, axis=0), np.arange(12) // 6) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_purity_and_nmi_are_those_of_their_formulas(seed: int) -> None:
    random = np.random.RandomState(seed)
    a, b = random.randint(9, size=200), random.randint(5, size=200)
    b[:120] = a[:120] % 5
    assert normalised_mutual_information(a, b) == pytest.approx(metrics.normalized_mutual_info_score(a, b), abs=1e-12)
    table = metrics.cluster.contingency_matrix(b, a)
    assert purity(a, b) == pytest.approx(table.max(0).sum() / 200)
    assert normalised_mutual_information(a, a) == pytest.approx(1)
    assert (purity(a, a), purity(np.zeros(200, int), b)) == (1, np.bincount(b).max() / 200)
    assert normalised_mutual_information(np.zeros(5, int), np.ones(5, int)) == 1  # as scikit-learn has it


@pytest.fixture
def given_vectors(spkd: Callable, corpus: Path) -> np.ndarray:
    """A cache of the corpus whose embeddings are these: three voices of two speakers each, the last utterance alone."""
    save_teacher(Path("teacher"), 8)
    manifest = Manifest.load(corpus / "manifest.csv")
    axes = np.repeat(np.eye(4)[:3], 6, axis=0)
    vectors = axes + 0.05 * np.random.RandomState(0).randn(18, 4)
    vectors[-1] = [0, 0, 0, 1]
    np.save("v.npy", (7 * vectors).astype(np.float32))
    Path("v.txt").write_text("".join(f"{u.id}\n" for u in manifest))
    spkd("cache", "import", "v.npy", "cache", "--manifest", corpus / "manifest.csv").ok()
    return unit(vectors)


def rows(path: str = "labels.csv") -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.usefixtures("given_vectors")
def test_the_command_writes_a_table_and_says_what_it_holds(spkd: Callable, corpus: Path) -> None:
    done = spkd("cache", "cluster", "cache", "smallest=2").ok()
    ids = [u.id for u in Manifest.load(corpus / "manifest.csv")]
    # Of the names of the largest clusters the first begins with the first utterance.
    expected = [0] * 6 + [1] * 6 + [2] * 5
    assert rows() == [{"utt": i, "speaker": f"cluster-{n}"} for i, n in zip(ids, expected, strict=False)]
    lines = done.out.splitlines()
    assert lines[0].startswith("labels.csv: 3 clusters (mean silhouette 0.")
    assert lines[0].endswith("of 17 utterances; utterances in one: at least 5, median 6, at most 6")
    assert lines[1] == "labels.csv: 1 utterance left out, in 1 cluster of fewer than 2 (smallest=2)"
    # Of 17, the clusters hold 3 + 3, 3 + 3 and 3 + 2 of two speakers each.
    speakers = np.repeat(np.arange(6), 3)[:17]
    nmi = metrics.normalized_mutual_info_score(speakers, expected)
    assert lines[2:] == [
        f"labels.csv: purity {9 / 17:.3f}, NMI {nmi:.3f} over 17 utterances of 6 speakers of the manifest"
    ]
    # Again, with none left out, and none written twice.
    assert "labels.csv: exists already" in spkd("cache", "cluster", "cache").err
    spkd("cache", "cluster", "cache", "smallest=2", "--out", "again.csv").ok()
    assert Path("again.csv").read_bytes() == Path("labels.csv").read_bytes()
    spkd("cache", "cluster", "cache", "smallest=2", "--out", "zipped.csv.gz").ok()
    assert gzip.decompress(Path("zipped.csv.gz").read_bytes()) == Path("labels.csv").read_bytes()
    out = spkd("cache", "cluster", "cache", "--out", "all.csv").ok().out
    assert (len(rows("all.csv")), rows("all.csv")[-1]["speaker"], "left out" in out) == (18, "cluster-3", False)


@pytest.mark.usefixtures("given_vectors")
@pytest.mark.parametrize(
    ("given", "code", "message"),
    [
        (["nowhere"], 2, "nowhere: no teacher cache"),
        (["cache", "centres=19"], 2, "centres=19: more than 18 utterances"),
        (["cache", "speakers=19"], 2, "speakers=19: more than 18 centres of k-means (centres=)"),
        (["cache", "centres=5", "speakers=6"], 2, "speakers=6: more than 5 centres of k-means"),
        (["cache", "centres=1"], 2, "1 centre: too few"),
        (["cache", "centres=2"], 2, "2 centres: too few to choose a number of clusters; give speakers=NUMBER"),
        (["cache", "speakers=3", "similarity=0.5"], 2, "similarity=0.5 has no effect: speakers=3 sets the number"),
        (["cache", "smallest=7"], 1, "no cluster has 7 utterances; lower smallest"),
        (["cache", "--out", "teacher"], 1, "teacher: cannot be written (it is a folder)"),
        (["none"], 2, "none: holds no embeddings; extract them: teacher.targets=[embedding]"),
        (["tars"], 2, "tars: a stream cannot be clustered; pull or import the cache"),
        (["one"], 1, "one: 1 utterance with a view in the speaker's own voice"),
        (["faster"], 1, "faster: 0 utterances with a view in the speaker's own voice"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_clustered_is_refused(
    spkd: Callable, corpus: Path, given: list[str], code: int, message: str
) -> None:
    manifest, teacher = f"manifest={corpus / 'manifest.csv'}", ["teacher=checkpoint", "teacher.weights=teacher"]
    match given[0]:
        case "none":
            spkd("extract", "teacher=none", manifest, "cache=none").ok()
        case "tars":
            spkd("cache", "export", "cache", "tars").ok()
        case "one":
            Manifest(Manifest.load(corpus / "manifest.csv").utterances[:1]).save(Path("one.csv"))
            spkd("extract", *teacher, "manifest=one.csv", "cache=one").ok()
        case "faster":
            spkd("extract", *teacher, manifest, "cache=faster", "view.speeds=[1.1]").ok()
    done = spkd("cache", "cluster", *given)
    assert (done.code, message in done.err, len(done.err.splitlines())) == (code, True, 1), done.err
    assert not Path("labels.csv").exists()


def test_views_in_other_voices_follow_those_in_the_speakers_own(spkd: Callable, extraction: list[str]) -> None:
    """The mean of two noisy views at speed 1, from the values in the cache, in float64."""
    save_teacher(Path("teacher"), 8)
    noise = ["view.noise=synthetic", "view.noise_prob=1"]
    spkd(*extraction, "cache=crops", "view=crops:6,0.5", "view.speeds=[0.9,1.0]", *noise).ok()
    cache = Cache.open("crops")
    voices = Voices.of(cache)
    speed, utterance = cache.plan.views.speed[:], cache.plan.views.utterance[:]
    stored = cache.batch(np.arange(len(speed)), ["embedding"])["embedding"].numpy().astype(np.float64)
    stored /= np.linalg.norm(stored, axis=1, keepdims=True)
    own = {u: stored[(utterance == u) & (speed == 1)] for u in range(18)}
    assert {len(views) for views in own.values()} > {1, 2}
    kept = [u for u, views in own.items() if len(views)]
    assert (voices.utterance.tolist(), voices.without) == (kept, 18 - len(kept))
    expected = np.array([own[u].mean(0) for u in kept])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert np.abs(voices.vectors - expected).max() < 1e-6


def test_several_caches_are_clustered_together(spkd: Callable, corpus: Path) -> None:
    """Without labels in their manifests, and so without a line about them."""
    save_teacher(Path("teacher"), 8)
    everything = Manifest.load(corpus / "manifest.csv").utterances
    for name, some in (("a", everything[:9]), ("b", everything[9:]), ("both", everything)):
        lines = [f"{u.id},{u.path}" for u in some]
        Path(f"{name}.csv").write_text("\n".join(["utt,path", *lines]))
        given = ["teacher=checkpoint", "teacher.weights=teacher", f"manifest={name}.csv", f"cache={name}"]
        spkd("extract", *given).ok()
    one = spkd("cache", "cluster", "both", "speakers=4", "--out", "one.csv").ok()
    two = spkd("cache", "cluster", "a", "b", "speakers=4", "--out", "two.csv").ok()
    assert Path("one.csv").read_bytes() == Path("two.csv").read_bytes()
    assert (len(rows("two.csv")), "purity" in one.out + two.out) == (18, False)
