"""Views that two caches have in common, against a search through both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from spkd.cache import Cache
from spkd.corpus.manifest import Manifest
from spkd.errors import UsageError
from spkd.mapping.pairs import read_pairs
from tests.eval.students import save_untrained

NOISE = ("view.noise=synthetic", "view.noise_prob=0.5")


@pytest.fixture
def students(corpus: Path) -> Path:
    save_untrained(Path("a"), corpus, embedding=4)
    save_untrained(Path("b"), corpus, seed=1, embedding=5)
    Manifest.load(corpus / "manifest.csv")
    return corpus


def extracted(spkd: Callable, name: str, manifest: str, *views: str) -> Cache:
    given = (f"teacher.weights={name}", f"manifest={manifest}", f"cache={name}-cache", "storage.codec=float32", *views)
    spkd("extract", "teacher=checkpoint", *given).ok()
    return Cache.open(f"{name}-cache")


def known(cache: Cache, with_seed: bool = False) -> dict[tuple, int]:
    """Everything that makes a view -> its number, the first of several that are the same."""
    found: dict[tuple, int] = {}
    views = cache.plan.views
    for number in range(len(cache)):
        key = (
            cache.plan.utterances[int(views.utterance[number])],
            int(views.start[number]),
            int(views.samples[number]),
            round(float(views.speed[number]), 4),
            round(float(views.formants[number]), 4),
            *([int(views.seed[number])] if with_seed else []),
        )
        found.setdefault(key, number)
    return found


def expected(a: Cache, b: Cache, common: list[tuple], first: dict, second: dict) -> set[tuple]:
    """Both embeddings of each common view."""
    rows = [
        cache.batch(np.array([found[key] for key in common]), ["embedding"])["embedding"].numpy()
        for cache, found in ((a, first), (b, second))
    ]
    return {(*one.tolist(), *other.tolist()) for one, other in zip(*rows, strict=True)}


def rows_of(a: Cache, b: Cache, most: int = 1000, seed: int = 0) -> tuple[set[tuple], tuple[int, int, int]]:
    pairs = read_pairs(a, b, most, seed)
    return {(*x.tolist(), *y.tolist()) for x, y in zip(pairs.old, pairs.new, strict=True)}, pairs.counts


def test_views_are_matched_by_what_they_are(spkd: Callable, students: Path) -> None:
    every = Manifest.load(students / "manifest.csv").utterances
    Manifest(every[:12]).save(Path("first.csv"))
    Manifest(tuple(reversed(every[6:]))).save(Path("second.csv"))
    a = extracted(spkd, "a", "first.csv", "view.speeds=[1.0,0.9]")
    b = extracted(spkd, "b", "second.csv", "view.speeds=[1.1,1.0,0.95]")
    first, second = known(a), known(b)
    common = sorted(first.keys() & second.keys())
    assert {(key[0], key[3]) for key in common} == {(u.id, 1.0) for u in every[6:12]}
    found, counts = rows_of(a, b)
    assert found == expected(a, b, common, first, second)
    assert counts == (24, 36, 6)
    pairs = read_pairs(a, b, 1000, 0)
    assert (pairs.labelled, pairs.people.speakers.count, pairs.people.utterances.count) == (True, 2, 6)
    # A draw is of the same views, by the seed.
    some, counts = rows_of(a, b, most=4)
    assert (len(some), some < found, counts, some) == (4, True, (24, 36, 6), rows_of(a, b, most=4)[0])
    assert rows_of(a, b, most=4, seed=1)[0] != some


def test_repeated_views_count_once_and_noise_is_matched_by_its_seed(spkd: Callable, students: Path) -> None:
    corpus = str(students / "manifest.csv")
    views = ("view=full:6", "view.speeds=[0.9,1.0]")
    a, b = extracted(spkd, "a", corpus, *views), extracted(spkd, "b", corpus, *views)
    first, second = known(a), known(b)
    assert len(first) < len(a)
    found, counts = rows_of(a, b)
    assert found == expected(a, b, sorted(first), first, second)
    assert counts == (len(a), len(b), len(first))
    # With the same noise, views of the same seed are the same; with another, those without noise alone.
    spkd("extract", "teacher=checkpoint", "teacher.weights=a", f"manifest={corpus}", "cache=a1", *views, *NOISE).ok()
    spkd("extract", "teacher=checkpoint", "teacher.weights=b", f"manifest={corpus}", "cache=b1", *views, *NOISE).ok()
    a, b = Cache.open("a1"), Cache.open("b1")
    first, second = known(a, with_seed=True), known(b, with_seed=True)
    found, counts = rows_of(a, b)
    assert found == expected(a, b, sorted(first), first, second)
    assert counts == (len(a), len(b), len(a))
    b = Cache.open("b-cache")
    clean = [n for n in range(len(a)) if not a.card.views.augmentation.changes(int(a.plan.views.seed[n]))]
    assert 0 < len(clean) < len(a)
    views_of = known(a)
    distinct = {key for key, n in views_of.items()} & known(b).keys()
    counts = rows_of(a, b)[1]
    keys = {key for number in clean for key, n in known(a, with_seed=True).items() if n == number}
    assert counts[2] == len({key[:5] for key in keys} & distinct)


def test_caches_without_a_view_in_common_are_refused(spkd: Callable, students: Path) -> None:
    every = Manifest.load(students / "manifest.csv").utterances
    Manifest(every[:9]).save(Path("first.csv"))
    Manifest(every[9:]).save(Path("second.csv"))
    a = extracted(spkd, "a", "first.csv")
    with pytest.raises(UsageError, match="no view is in both .no utterance is, as .*; extract both from one manifest"):
        read_pairs(a, extracted(spkd, "b", "second.csv"), 10, 0)
    given = ("teacher=checkpoint", "teacher.weights=b", "manifest=first.csv")
    spkd("extract", *given, "cache=crops", "view=crops:1,0.4").ok()
    with pytest.raises(UsageError, match="no view is in both .view.plan=full and crops:1,0.4; extract both with"):
        read_pairs(a, Cache.open("crops"), 10, 0)
    spkd("extract", *given, "cache=spoken", "view.vad=energy").ok()
    with pytest.raises(UsageError, match="no view is in both .silence is left out by nothing and by energy"):
        read_pairs(a, Cache.open("spoken"), 10, 0)
    spkd("extract", "teacher=none", "manifest=first.csv", "cache=features", "fbank=true").ok()
    with pytest.raises(UsageError, match="features: holds no embeddings .fbank."):
        read_pairs(a, Cache.open("features"), 10, 0)
