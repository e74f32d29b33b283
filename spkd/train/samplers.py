"""Samplers: the views that share a batch.

Every sampler is a function of (seed, epoch), so that a run is resumed exactly. Its order can be pickled: it goes to the
loader's processes, which not every system forks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

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
    """Batches with several views of each of their speakers.

    Every view comes once in an epoch; the last group of a speaker is filled up with further views of the speaker.

    Raises:
        SpkdError: a view has no speaker label.
    """
    cache, views = context.cache, context.cache.usable_views[:]
    if not cache.labelled:
        raise SpkdError(f"sampler=speakers: {cache.name} has utterances without speaker")
    count = context.divided(settings.views, "speakers.views")
    # Views, speaker after speaker.
    speaker = cache.speaker(views)
    ascending = np.argsort(speaker, kind="stable")
    firsts = np.flatnonzero(np.diff(speaker[ascending])) + 1
    return partial(_groups_of_speakers, views[ascending], firsts, count, context.seed)


def _groups_of_speakers(views: np.ndarray, firsts: np.ndarray, count: int, seed: int, epoch: int) -> np.ndarray:
    """Views of an epoch, in groups of one speaker.

    Args:
        views: (N,) views, speaker after speaker.
        firsts: (speakers - 1,) place of the first view of each speaker after the first one.
        count: number of views in a group.
    """
    random = random_state(Purpose.ORDER, seed, epoch)
    filled, times = [], []
    for its_views in np.split(views, firsts):
        groups = -(-len(its_views) // count)
        filled += [random.permutation(its_views), random.choice(its_views, groups * count - len(its_views))]
        # The groups of a speaker are spread over the epoch, so that those of a batch are of different speakers.
        times.append((np.arange(groups) + random.random_sample()) / groups)
    groups_of_all = np.concatenate(filled).reshape(-1, count)
    return groups_of_all[np.argsort(np.concatenate(times), kind="stable")].ravel()


def by_length(settings: NoSettings, context: SamplerContext) -> Order:
    """Batches of views of similar length, in random order."""
    views, batch_size = context.cache.usable_views[:], context.batch_size
    ascending = views[np.argsort(context.cache.plan.views.samples[views], kind="stable")]
    return partial(_neighbouring_lengths, ascending, batch_size, context.seed)


def _neighbouring_lengths(ascending: np.ndarray, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """Views of an epoch, in batches of neighbouring places among those `ascending` (N,) by length."""
    random = random_state(Purpose.ORDER, seed, epoch)
    place = np.arange(len(ascending)) + random.random_sample(len(ascending)) * batch_size * min(
        WINDOW, max(len(ascending) // (4 * batch_size), 1)
    )
    near = ascending[np.argsort(place, kind="stable")]
    whole = len(near) // batch_size * batch_size
    batches = near[:whole].reshape(-1, batch_size)
    return batches[random.permutation(len(batches))].ravel() if len(batches) else near


def by_shares(settings: SharesSettings, context: SamplerContext) -> Order:
    """Batches with a fixed share of each corpus.

    An epoch passes once over the corpus that lasts longest; the others begin again when they end.

    Raises:
        UsageError: shares that the corpora do not allow.
    """
    corpora, shares, batch_size = context.cache.corpora_views, settings.shares, context.batch_size
    if len(corpora) < 2:
        raise UsageError("sampler=shares: divides batches among several caches, and one is given (cache=[a,b])")
    if len(shares) != len(corpora) or not 0.999 < sum(shares) < 1.001:
        raise UsageError(
            f"sampler.shares.shares={shares}: give one share for each of {len(corpora)} corpora (cache=[a,b]), 1 in all"
        )
    counts = np.floor(np.cumsum(shares) * batch_size + 0.5).astype(int)
    counts = np.diff(counts, prepend=0)
    if (counts < 1).any():
        raise UsageError(f"sampler.shares.shares={shares}: a share below one view in batch_size={batch_size}")
    usable = [views[context.cache.are_usable(views)] for views in corpora]
    batches = max(max(len(views) // count for views, count in zip(usable, counts, strict=True)), 1)
    return partial(_counts_of_corpora, usable, counts, batches, context.seed)


def _counts_of_corpora(
    usable: Sequence[np.ndarray], counts: np.ndarray, batches: int, seed: int, epoch: int
) -> np.ndarray:
    """Views of an epoch, in batches with a number of views, one of `counts`, of each corpus.

    Args:
        usable: views of each corpus.
        batches: number of batches in an epoch.
    """
    parts = []
    for number, (views, count) in enumerate(zip(usable, counts, strict=True)):
        first = epoch * batches * count
        needed = np.arange(first, first + batches * count)
        rounds = range(int(needed[0]) // len(views), int(needed[-1]) // len(views) + 1)
        passes = [random_state(Purpose.ORDER, seed, r, number).permutation(views) for r in rounds]
        chosen = np.concatenate(passes)[needed - rounds[0] * len(views)]
        parts.append(chosen.reshape(batches, count))
    return np.concatenate(parts, axis=1).ravel()


def by_neighbours(settings: HardSettings, context: SamplerContext) -> Order:
    """Batches of groups: a view, and views of random neighbours of its instance."""
    assert context.table is not None
    count = context.divided(settings.group, "hard.group")
    return partial(_groups_of_neighbours, context.cache.usable_views[:], context.table, count, context.seed)


def _groups_of_neighbours(views: np.ndarray, table: Neighbours, count: int, seed: int, epoch: int) -> np.ndarray:
    """Views of an epoch, in groups of `count`: one of `views`, and neighbours by the table."""
    random = random_state(Purpose.ORDER, seed, epoch)
    leads = random.permutation(views)[: max(len(views) // count, 1)]
    drawn = table.draw(leads, count - 1, random)
    neighbours = np.where(drawn.found, drawn.views, random.choice(views, drawn.views.shape))
    return np.concatenate([leads[:, None], neighbours], axis=1).ravel()


def shuffled_views(cache: CacheSource, seed: int, chosen: np.ndarray | None = None) -> Order:
    """The cache's random order, which differs in every epoch.

    Args:
        chosen: (views,) whether a view is used; None: all.
    """
    return partial(_random_order, cache, chosen, seed)


def _random_order(cache: CacheSource, chosen: np.ndarray | None, seed: int, epoch: int) -> np.ndarray:
    views = cache.order(seed, epoch)
    return views if chosen is None else views[:][chosen[views]]
