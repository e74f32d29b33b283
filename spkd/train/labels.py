"""Labels of the views: speaker classes and instances.

A pseudo-speaker is an utterance's speaker at another speed or formant factor, which sounds like another speaker
(speaker augmentation), so that it is a class of its own. An instance is one utterance at one speed and formant factor:
its views differ in crop and augmentation alone, and are of one speaker whatever the labels are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from spkd.cache import CacheSource
from spkd.outputs.target import EMBEDDING

READ_AT_ONCE = 4096  # views


@dataclass(frozen=True)
class Labels:
    """Speaker classes and instances.

    Attributes:
        names: name of each class: `speaker`, `speaker@speed` or `speaker@speed,formants`.
        label: (views,) class of each view, -1 where the speaker is unknown.
        instance: (views,) number of the instance of each view.
    """

    names: list[str]
    label: np.ndarray
    instance: np.ndarray

    @classmethod
    def of(cls, cache: CacheSource) -> Labels:
        views = cache.plan.views
        # Factors are hundredths below 1,000; one integer holds both, which sorts faster than rows do.
        hundredths = [np.rint(factor * 100).astype(np.int64) for factor in (views.speed, views.formants)]
        factors, pair = np.unique(1000 * hundredths[0] + hundredths[1], return_inverse=True)
        speaker = cache.speaker(np.arange(len(cache))).astype(np.int64)
        key = speaker * len(factors) + pair
        used, index = np.unique(key[speaker >= 0], return_inverse=True)
        label = np.full(len(cache), -1, np.int64)
        label[speaker >= 0] = index
        names = [cache.plan.speakers[k // len(factors)] + _suffix(int(factors[k % len(factors)])) for k in used]
        return cls(names, label, views.utterance.astype(np.int64) * len(factors) + pair)


def _suffix(factors: int) -> str:
    """Suffix of the name of a class: its speed and formant factor, where they differ from 1."""
    speed, formants = divmod(factors, 1000)
    if formants != 100:
        return f"@{speed / 100:.2f},{formants / 100:.2f}"
    return f"@{speed / 100:.2f}" if speed != 100 else ""


@dataclass(frozen=True)
class Groups:
    """Groups of views, such as those of one instance.

    Attributes:
        views: numbers of the views, group after group; those of group g are views[first[g] : first[g + 1]].
        first: (groups + 1,) place of the first view of each group in `views`, and the end.
        group: (all views,) group of each view, -1 where it is in none.
    """

    views: np.ndarray
    first: np.ndarray
    group: np.ndarray

    @classmethod
    def of(cls, instance: np.ndarray, views: np.ndarray) -> Groups:
        _, number = np.unique(instance[views], return_inverse=True)
        group = np.full(len(instance), -1, np.int64)
        group[views] = number
        first = np.concatenate([[0], np.cumsum(np.bincount(number))])
        return cls(views[np.argsort(number, kind="stable")], first, group)

    def __len__(self) -> int:
        return len(self.first) - 1

    @property
    def first_views(self) -> np.ndarray:
        """Number (groups,) of the first view of each group."""
        return self.views[self.first[:-1]]

    def same(self, views: np.ndarray, random: np.random.RandomState) -> np.ndarray:
        """Random view (B,) of the group of each view."""
        return self.pick(self.group[views], random)

    def pick(self, group: np.ndarray, random: np.random.RandomState) -> np.ndarray:
        """Random view of each of the given groups."""
        size = self.first[group + 1] - self.first[group]
        return self.views[self.first[group] + (random.random_sample(group.shape) * size).astype(np.int64)]


def mean_embeddings(cache: CacheSource, group: np.ndarray, groups: int) -> Tensor:
    """Mean of the teacher's normalised embeddings of each group of views, normalised: (groups, D).

    Args:
        cache: cache with embeddings of one teacher.
        group: (views,) group of every view, -1 where it is in none.
        groups: number of groups.
    """
    total = torch.zeros(groups, cache.dim(EMBEDDING))
    for start in range(0, len(cache.usable_views), READ_AT_ONCE):
        views = cache.usable_views[start : start + READ_AT_ONCE]
        views = views[group[views] >= 0]
        embeddings = cache.decode(cache.stored(views, [EMBEDDING]), [EMBEDDING])[EMBEDDING]
        total.index_add_(0, torch.from_numpy(group[views]), normalize(embeddings.float(), dim=-1))
    return normalize(total, dim=-1)
