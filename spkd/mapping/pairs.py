"""Embeddings of the views that two caches have in common."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from spkd.cache import Cache
from spkd.corpus.people import Names, People
from spkd.corpus.view import Views
from spkd.errors import UsageError
from spkd.outputs.target import EMBEDDING
from spkd.seeding import Purpose, random_state

AT_ONCE = 1 << 14  # utterances whose views are compared together
READ = 4096  # views that are read together


@dataclass(frozen=True)
class Pairs:
    """Embeddings of N views by two models.

    Attributes:
        old: (N, D_old) float32.
        new: (N, D_new) float32.
        speaker: (N,) number of the speaker from 0; an utterance without a label has a number of its own.
        labelled: whether all of them have a label.
        people: their speakers and utterances.
        counts: views of the old cache, of the new one, and in both.
    """

    old: np.ndarray
    new: np.ndarray
    speaker: np.ndarray
    labelled: bool
    people: People
    counts: tuple[int, int, int]

    def __len__(self) -> int:
        return len(self.old)


def read_pairs(old: Cache, new: Cache, most: int, seed: int) -> Pairs:
    """Embeddings of the views that both caches have.

    Args:
        most: most views, of which so many are drawn at random.
    Raises:
        UsageError: a cache without embeddings, or no view that both have.
        SpkdError: a damaged cache.
    """
    for cache in (old, new):
        if EMBEDDING not in cache.names:
            raise UsageError(
                f"{cache.name}: holds no embeddings ({', '.join(cache.names)}); extract them with "
                f"teacher.targets=[{EMBEDDING}]"
            )
    places, found = _drawn(_common(old, new), most, seed)
    counts = len(old.usable_views), len(new.usable_views), found
    if not found:
        raise UsageError(f"{old.name} and {new.name}: no view is in both ({_difference(old, new)})")
    left, right = _embeddings(old, places[:, 0]), _embeddings(new, places[:, 1])
    speaker, utterance = new.speaker(places[:, 1]), new.plan.views.utterance[places[:, 1]]
    groups = np.where(speaker < 0, -1 - np.asarray(utterance, np.int64), speaker)
    people = People(
        Names.of({new.plan.speakers[number] for number in np.unique(speaker[speaker >= 0]).tolist()}),
        Names.of({new.plan.utterances[number] for number in np.unique(utterance).tolist()}),
    )
    number = np.unique(groups, return_inverse=True)[1]
    return Pairs(left, right, number, bool((speaker >= 0).all()), people, counts)


def _common(old: Cache, new: Cache) -> Iterator[np.ndarray]:
    """Numbers (K, 2) of the views that are the same in both caches, in pieces."""
    if old.card.views.vad != new.card.views.vad:
        return
    number = {name: index for index, name in enumerate(old.plan.utterances)}
    for first in range(0, len(new.plan.utterances), AT_ONCE):
        names = new.plan.utterances[first : first + AT_ONCE]
        shared = np.array([(number[n], first + i) for i, n in enumerate(names) if n in number], np.int64).reshape(-1, 2)
        if len(shared):
            yield _same(old, new, shared)


def _same(old: Cache, new: Cache, shared: np.ndarray) -> np.ndarray:
    """Numbers (K, 2) of the views that are the same in both, of utterances (U, 2) that are.

    Of several views of an utterance that are the same, the first counts.
    """
    views, keys = [], []
    for cache, other, utterances in ((old, new, shared[:, 0]), (new, old, shared[:, 1])):
        begin, end = (np.asarray(edge, np.int64) for edge in cache.plan.tables.views_of(utterances))
        owner = np.repeat(np.arange(len(shared)), end - begin)
        numbers = np.arange(len(owner)) - np.repeat(np.cumsum(end - begin) - (end - begin), end - begin) + begin[owner]
        usable = cache.are_usable(numbers)
        numbers, owner = numbers[usable], owner[usable]
        columns = cache.plan.views[numbers]
        known = _comparable(cache, other, columns)
        views.append(numbers[known])
        keys.append(_keys(cache, other, owner, columns)[known])
    whole = np.concatenate(keys)
    ids = np.unique(whole, axis=0, return_inverse=True)[1].reshape(-1) if len(whole) else np.empty(0, np.int64)
    _, left, right = np.intersect1d(ids[: len(keys[0])], ids[len(keys[0]) :], return_indices=True)
    return np.stack([views[0][left], views[1][right]], 1)


def _comparable(cache: Cache, other: Cache, columns: Views) -> np.ndarray:
    """(N,): whether views can be the same in both caches, whose formulas and folders of noise may differ."""
    ours, theirs = cache.card.views, other.card.views
    known = np.ones(len(columns), bool)
    if ours.formants_version != theirs.formants_version:
        known &= np.asarray(columns.formants) == 1.0
    if ours.augmentation != theirs.augmentation:
        known &= ~np.array([ours.augmentation.changes(int(seed)) for seed in columns.seed], bool)
    return known


def _keys(cache: Cache, other: Cache, owner: np.ndarray, columns: Views) -> np.ndarray:
    """(N, 6) whole numbers that are the same for views that are: utterance, stretch, factors and augmentation."""
    ours = cache.card.views.augmentation
    acts = ours == other.card.views.augmentation and bool(ours.noise or ours.rir or ours.coders)
    factors = [np.rint(100 * np.asarray(column, np.float64)) for column in (columns.speed, columns.formants)]
    seed = columns.seed if acts else np.zeros(len(owner))
    return np.stack([np.asarray(c, np.int64) for c in (owner, columns.start, columns.samples, *factors, seed)], 1)


def _drawn(pieces: Iterator[np.ndarray], most: int, seed: int) -> tuple[np.ndarray, int]:
    """At most so many of the pairs (K, 2) of all pieces, in their order, and the number of all."""
    random, found = random_state(Purpose.MAP, seed, 0), 0
    kept, rank = np.empty((0, 2), np.int64), np.empty(0)
    for piece in pieces:
        found += len(piece)
        kept, rank = np.concatenate([kept, piece]), np.concatenate([rank, random.random_sample(len(piece))])
        if len(kept) > most:
            first = np.sort(np.argpartition(rank, most)[:most])
            kept, rank = kept[first], rank[first]
    return kept, found


def _embeddings(cache: Cache, views: np.ndarray) -> np.ndarray:
    pieces = (views[first : first + READ] for first in range(0, len(views), READ))
    return np.concatenate([cache.batch(piece, [EMBEDDING])[EMBEDDING].float().numpy() for piece in pieces])


def _difference(old: Cache, new: Cache) -> str:
    """Phrase that says why no view is in both."""
    views = [cache.card.views for cache in (old, new)]
    if views[0].vad != views[1].vad:
        return f"silence is left out by {views[0].vad or 'nothing'} and by {views[1].vad or 'nothing'}"
    names = set(old.plan.utterances)
    if not any(name in names for name in new.plan.utterances):
        return (
            f"no utterance is, as {old.plan.utterances[0]} and {new.plan.utterances[0]}; extract both from one manifest"
        )
    return f"view.plan={views[0].plan} and {views[1].plan}; extract both with the same views"
