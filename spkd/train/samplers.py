"""Samplers: the views that share a batch.

Every sampler is a function of (seed, epoch), so that a run is resumed exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spkd.cache import CacheSource
from spkd.errors import SpkdError, UsageError
from spkd.registry import SAMPLERS, NoSettings
from spkd.seeding import Purpose, random_state
from spkd.train.batches import Order
from spkd.train.mining import Neighbours
from spkd.train.settings import HardSettings, SamplerConfig, SharesSettings, SpeakersSettings

WINDOW = 50  # batches of neighbouring lengths among which views are shuffled


@dataclass(frozen=True)
class SamplerContext:
    """Views that a sampler orders, and its further inputs.

    Attributes:
        cache: cache of the views.
        batch_size: number of views in a batch.
        seed: seed of the order.
        table: nearest instances of each instance, where they are mined.
    """

    cache: CacheSource
    batch_size: int
    seed: int
    table: Neighbours | None = None

    def divided(self, count: int, key: str) -> int:
        """Number of views in a group. Raises UsageError where the batch size is not a multiple of it."""
        if self.batch_size % count or count >= self.batch_size:
            raise UsageError(f"sampler.{key}={count}: batch_size={self.batch_size} is no multiple of it")
        return count


def make_order(config: SamplerConfig, context: SamplerContext) -> Order:
    """Order of a run's views.

    Raises:
        UsageError: settings that the batch or the caches do not allow.
        SpkdError: a cache without labels.
    """
    if config.name != "shuffled" and not context.cache.random_access:
        raise UsageError(f"sampler={config.name}: a stream comes in its own order; pull or import the cache")
    order: Order = SAMPLERS[config.name](config.settings, context)
    return order


def shuffled(settings: NoSettings, context: SamplerContext) -> Order:
    """Batches of random views."""
    return shuffled_views(context.cache, context.seed)


def by_speaker(settings: SpeakersSettings, context: SamplerContext) -> Order:
    """Batches with several views of each of their speakers. Raises SpkdError where a view has no speaker label."""
    cache, views = context.cache, context.cache.usable_views
    if not cache.labelled:
        raise SpkdError(f"sampler=speakers: {cache.name} has utterances without speaker")
    count = context.divided(settings.views, "speakers.views")
    return _by_speaker(views, cache.speaker(views), count, context.seed)


def by_length(settings: NoSettings, context: SamplerContext) -> Order:
    """Batches of views of similar length."""
    views = context.cache.usable_views
    return _by_length(views, context.cache.plan.views.samples[views], context.batch_size, context.seed)


def by_shares(settings: SharesSettings, context: SamplerContext) -> Order:
    """Batches with a share of each corpus. Raises UsageError for shares that the corpora do not allow."""
    return _by_shares(context.cache, settings.shares, context.batch_size, context.seed)


def by_neighbours(settings: HardSettings, context: SamplerContext) -> Order:
    """Batches of groups: a view, and views of random neighbours of its instance."""
    assert context.table is not None
    count = context.divided(settings.group, "hard.group")
    return _hard(context.cache.usable_views, context.table, count, context.seed)


def shuffled_views(cache: CacheSource, seed: int, chosen: np.ndarray | None = None) -> Order:
    """The cache's random order, which differs in every epoch.

    Args:
        cache: cache of the views.
        seed: seed of the order.
        chosen: (views,) whether a view is used; None: all.
    """

    def order(epoch: int) -> np.ndarray:
        views = cache.order(seed, epoch)
        return views if chosen is None else views[chosen[views]]

    return order


def _by_speaker(views: np.ndarray, speaker: np.ndarray, count: int, seed: int) -> Order:
    """Batches of `count` views of each of their speakers.

    Every view comes once in an epoch; the last group of a speaker is filled up with further views of the speaker.
    """
    _, number = np.unique(speaker, return_inverse=True)
    by_speaker = [views[number == speaker_number] for speaker_number in range(int(number.max()) + 1)]

    def order(epoch: int) -> np.ndarray:
        random = random_state(Purpose.ORDER, seed, epoch)
        groups, times = [], []
        for its_views in by_speaker:
            groups_of_speaker = -(-len(its_views) // count)
            permuted = random.permutation(its_views)
            filled = np.concatenate([permuted, random.choice(its_views, groups_of_speaker * count - len(its_views))])
            groups += np.split(filled, groups_of_speaker)
            # The groups of a speaker are spread over the epoch, so that those of a batch are of different speakers.
            times += ((np.arange(groups_of_speaker) + random.random_sample()) / groups_of_speaker).tolist()
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
    """Batches with a fixed share of each corpus.

    An epoch passes once over the corpus that lasts longest; the others begin again when they end.
    """
    corpora = cache.corpora_views
    if len(corpora) < 2 or len(shares) != len(corpora) or not 0.999 < sum(shares) < 1.001:
        raise UsageError(
            f"sampler.shares.shares={shares}: give one share for each of {len(corpora)} corpora (cache=[a,b]), 1 in all"
        )
    counts = np.floor(np.cumsum(shares) * batch_size + 0.5).astype(int)
    counts = np.diff(counts, prepend=0)
    if (counts < 1).any():
        raise UsageError(f"sampler.shares.shares={shares}: a share below one view in batch_size={batch_size}")
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
        neighbours = np.where(drawn.found, drawn.views, random.choice(views, drawn.views.shape))
        return np.concatenate([leads[:, None], neighbours], axis=1).ravel()

    return order
