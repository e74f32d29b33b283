"""Which views share a batch. Every sampler is a function of (seed, epoch), so that a run resumes exactly."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from spkd.cache import CacheSource
from spkd.config import SamplerConfig
from spkd.errors import SpkdError, UsageError
from spkd.seeding import Purpose, random_state
from spkd.train.mining import Neighbours

Order = Callable[[int], np.ndarray]  # epoch -> its views in order, batch after batch
WINDOW = 50  # batches of neighbouring lengths among which views are shuffled


def make_order(
    config: SamplerConfig,
    cache: CacheSource,
    batch_size: int,
    seed: int,
    table: Neighbours | None = None,
) -> Order | None:
    """The order of a run's views; None for the cache's own, shuffled.

    Args:
        table: of each instance its nearest others, for hard batches.
    Raises:
        UsageError: settings that the batch or the caches do not allow. SpkdError: a cache without labels.
    """
    if config.name == "shuffled":
        return None
    if not cache.random_access:
        raise UsageError(f"sampler={config.name}: a stream comes in its own order; pull or import the cache")
    views = cache.usable_views
    if config.name == "speakers":
        if not cache.labelled:
            raise SpkdError(f"sampler=speakers: {cache.name} has utterances without speaker")
        return _by_speaker(views, cache.speaker(views), _divided(config.per_speaker, batch_size, "per_speaker"), seed)
    if config.name == "lengths":
        return _by_length(views, cache.plan.views.samples[views], batch_size, seed)
    if config.name == "shares":
        return _by_shares(cache, config.shares, batch_size, seed)
    assert table is not None
    return _hard(views, table, _divided(config.group, batch_size, "group"), seed)


def _divided(count: int, batch_size: int, key: str) -> int:
    if batch_size % count or count >= batch_size:
        raise UsageError(f"sampler.{key}={count}: batch_size={batch_size} is no multiple of it")
    return count


def _by_speaker(views: np.ndarray, speaker: np.ndarray, count: int, seed: int) -> Order:
    """Batches of `count` views of each of their speakers. Every view comes once in an epoch; the last of a speaker are
    filled up with others of the speaker."""
    _, number = np.unique(speaker, return_inverse=True)
    by_speaker = [views[number == one] for one in range(int(number.max()) + 1)]

    def order(epoch: int) -> np.ndarray:
        random = random_state(Purpose.ORDER, seed, epoch)
        groups, times = [], []
        for mine in by_speaker:
            shuffled = random.permutation(mine)
            parts = -(-len(mine) // count)
            filled = np.concatenate([shuffled, random.choice(mine, parts * count - len(mine))])
            groups += np.split(filled, parts)
            # Spread evenly over the epoch, so that a batch has as many speakers as it has places.
            times += ((np.arange(parts) + random.random_sample()) / parts).tolist()
        return np.concatenate([groups[index] for index in np.argsort(times, kind="stable")])

    return order


def _by_length(views: np.ndarray, samples: np.ndarray, batch_size: int, seed: int) -> Order:
    """Batches of views of similar length, in random order."""
    ascending = views[np.argsort(samples, kind="stable")]

    def order(epoch: int) -> np.ndarray:
        random = random_state(Purpose.ORDER, seed, epoch)
        place = np.arange(len(ascending)) + random.random_sample(len(ascending)) * batch_size * min(
            WINDOW, max(len(ascending) // (4 * batch_size), 1)
        )
        near = ascending[np.argsort(place, kind="stable")]
        whole = len(near) // batch_size * batch_size
        batches = near[:whole].reshape(-1, batch_size)
        return batches[random.permutation(len(batches))].ravel() if len(batches) else near

    return order


def _by_shares(cache: CacheSource, shares: list[float], batch_size: int, seed: int) -> Order:
    """Batches with a fixed share of each corpus; an epoch passes once over the corpus that lasts longest, and the
    others begin again."""
    corpora = cache.corpora_views
    if len(corpora) < 2 or len(shares) != len(corpora) or not 0.999 < sum(shares) < 1.001:
        raise UsageError(
            f"sampler.shares={shares}: give one share for each of {len(corpora)} corpora (cache=[a,b]), 1 in all"
        )
    counts = np.floor(np.cumsum(shares) * batch_size + 0.5).astype(int)
    counts = np.diff(counts, prepend=0)
    if (counts < 1).any():
        raise UsageError(f"sampler.shares={shares}: a share below one view in batch_size={batch_size}")
    usable = [views[cache.is_usable[views]] for views in corpora]
    batches = max(max(len(views) // count for views, count in zip(usable, counts, strict=True)), 1)

    def order(epoch: int) -> np.ndarray:
        parts = []
        for number, (views, count) in enumerate(zip(usable, counts, strict=True)):
            first = epoch * batches * count
            needed = np.arange(first, first + batches * count)
            rounds = range(int(needed[0]) // len(views), int(needed[-1]) // len(views) + 1)
            passes = {r: random_state(Purpose.ORDER, seed, r, number).permutation(views) for r in rounds}
            chosen = np.array([passes[int(n) // len(views)][int(n) % len(views)] for n in needed])
            parts.append(chosen.reshape(batches, count))
        return np.concatenate(parts, axis=1).ravel()

    return order


def _hard(views: np.ndarray, table: Neighbours, count: int, seed: int) -> Order:
    """Batches of groups: a view, and views of random neighbours of its instance."""

    def order(epoch: int) -> np.ndarray:
        random = random_state(Purpose.ORDER, seed, epoch)
        leads = random.permutation(views)[: max(len(views) // count, 1)]
        drawn = table.draw(leads, count - 1, random)
        others = np.where(drawn.found, drawn.views, random.choice(views, drawn.views.shape))
        return np.concatenate([leads[:, None], others], axis=1).ravel()

    return order
