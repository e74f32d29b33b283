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

from spkd.cache import CacheSource, Plan
from spkd.cache.lazy import Computed, as_array
from spkd.cache.plan import FACTORS_BELOW, class_keys, factors_of
from spkd.outputs.target import EMBEDDING

READ_AT_ONCE = 4096  # views
CANDIDATES = 1 << 20  # views of the same utterances that are looked at together


@dataclass(frozen=True)
class Labels:
    """Speaker classes and instances.

    Numbers of the views are computed where they are asked for (`spkd.cache.lazy`).

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
        tables, speakers = cache.plan.tables, cache.plan.speakers
        speaker, factors = np.divmod(tables.classes, FACTORS_BELOW)
        used, number = np.unique(speaker, return_inverse=True)
        listed = [speakers[int(i)] for i in used]
        names = [listed[i] + _suffix(f) for i, f in zip(number.tolist(), factors.tolist(), strict=True)]
        count = len(cache)
        label, instance = Computed(count, _label, cache.plan), Computed(count, _instance, cache.plan)
        return cls(names, as_array(label), as_array(instance))


def _label(views: np.ndarray, plan: Plan) -> np.ndarray:
    rows = plan.views[views]
    keys = class_keys(plan.speaker[rows.utterance], factors_of(rows.speed, rows.formants))
    return np.where(keys < 0, -1, np.searchsorted(plan.tables.classes, keys))


def _instance(views: np.ndarray, plan: Plan) -> np.ndarray:
    rows, factors = plan.views[views], plan.tables.factors
    pair = np.searchsorted(factors, factors_of(rows.speed, rows.formants))
    return rows.utterance.astype(np.int64) * len(factors) + pair


@dataclass(frozen=True)
class Siblings:
    """Views of one instance, which are looked up among those of its utterance."""

    cache: CacheSource
    instance: np.ndarray

    def same(self, views: np.ndarray, random: np.random.RandomState) -> np.ndarray:
        """Random usable view (B,) of the instance of each usable view (B,)."""
        plan, share = self.cache.plan, random.random_sample(views.shape)
        first, last = plan.tables.views_of(plan.views.utterance[views])
        rows = max(CANDIDATES // int((last - first).max()), 1)
        pieces = (slice(start, start + rows) for start in range(0, len(views), rows))
        return np.concatenate([self._picked(views[p], first[p], last[p], share[p]) for p in pieces])

    def _picked(self, views: np.ndarray, first: np.ndarray, last: np.ndarray, share: np.ndarray) -> np.ndarray:
        """View (B,) of the instance of each view: the first one where its share is 0, the last one where it is 1."""
        candidates = first[:, None] + np.arange(int((last - first).max()))
        inside = candidates < last[:, None]
        candidates = np.where(inside, candidates, views[:, None])
        is_same = inside & (self.instance[candidates] == self.instance[views][:, None])
        is_same &= self.cache.are_usable(candidates)
        number = (share * is_same.sum(1)).astype(np.int64)
        place = (is_same.cumsum(1) > number[:, None]).argmax(1)
        return candidates[np.arange(len(views)), place]


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
        views = np.asarray(views)
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
    """
    total = torch.zeros(groups, cache.dim(EMBEDDING))
    for start in range(0, len(cache.usable_views), READ_AT_ONCE):
        views = cache.usable_views[start : start + READ_AT_ONCE]
        views = views[group[views] >= 0]
        embeddings = cache.decode(cache.stored(views, [EMBEDDING]), [EMBEDDING])[EMBEDDING]
        total.index_add_(0, torch.from_numpy(group[views]), normalize(embeddings.float(), dim=-1))
    return normalize(total, dim=-1)
