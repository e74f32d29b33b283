"""Several caches as one: other corpora one after the other, other teachers over the same views side by side."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from spkd.cache.crop import Crop
from spkd.cache.exchange.stream import Stream
from spkd.cache.exchange.tars import INDEX
from spkd.cache.plan import Plan
from spkd.cache.read import Cache
from spkd.cache.source import CacheSource, SingleCache
from spkd.corpus.manifest import Manifest
from spkd.errors import SpkdError, UsageError
from spkd.files import digest
from spkd.outputs.features import FEATURES
from spkd.outputs.target import LOGITS, Target

CONCATENATE, AVERAGE, SEPARATE = "concatenate", "average", "separate"


def open_caches(paths: Sequence[str], teachers: str = CONCATENATE) -> CacheSource:
    """One cache, one export to stream from (a folder or URL of tars), or several caches together.

    Args:
        teachers: how the outputs of several teachers are combined: see CombinedCache.
    Raises:
        SpkdError: caches that do not go together, or one that cannot be opened.
    """
    if not paths:
        raise UsageError("cache: name at least one")
    if len(paths) == 1:
        return _open(paths[0])
    opened = [_open(path) for path in paths]
    streams = [cache.name for cache in opened if not cache.random_access]
    if streams:
        raise UsageError(f"{streams[0]}: a stream cannot be combined with other caches; import it: spkd cache import")
    return CombinedCache(_corpora(opened), teachers)


def _open(path: str) -> SingleCache:
    if "://" in path or (Path(path) / INDEX).is_file():
        try:
            return Stream(path)
        except SpkdError as error:
            if f"{INDEX}: missing" not in str(error):
                raise
            raise SpkdError(
                f"{error}; only exports are streamed (a cache is copied here by `spkd cache pull {path} FOLDER`)"
            ) from error
    return Cache.open(path)


def _corpora(caches: Sequence[SingleCache]) -> list[list[SingleCache]]:
    """Caches by corpus; the teachers of every corpus in the order of the first.

    Raises:
        SpkdError: caches with some utterances in common and others not, other views of the same utterances, one teacher
            twice, or a corpus that lacks a teacher.
    """
    corpora: list[tuple[set[str], list[SingleCache]]] = []
    for cache in caches:
        mine = set(cache.plan.utterances)
        for utterances, members in corpora:
            common = len(mine & utterances)
            if common > 0 and mine != utterances:
                raise SpkdError(
                    f"{cache.name} and {members[0].name} have {common} utterances in common; several corpora must have "
                    "none, several teachers all"
                )
            if common:
                if cache.card.views != members[0].card.views:
                    raise SpkdError(f"{cache.name} and {members[0].name}: other views of the same utterances")
                members.append(cache)
                break
        else:
            corpora.append((mine, [cache]))
    first = corpora[0][1]
    teachers = [cache.card.covered("teacher") for cache in first]
    for _, members in corpora:
        theirs = [cache.card.covered("teacher") for cache in members]
        if any(theirs.count(teacher) != 1 for teacher in teachers) or len(theirs) != len(teachers):
            found, expected = (", ".join(t["family"] for t in listed) for listed in (theirs, teachers))
            raise SpkdError(
                f"{members[0].name}: every corpus needs the same teachers, each once "
                f"({found}; {first[0].name}: {expected})"
            )
        members.sort(key=lambda cache: teachers.index(cache.card.covered("teacher")))
    return [members for _, members in corpora]


class CombinedCache(CacheSource):
    """Corpora of one or several teachers.

    The outputs of several teachers at utterance level are L2-normalised, and concatenated (and divided by the root of
    their number, so that cosines are the teachers' mean), or averaged, or given separately as NAME@0, NAME@1, ...;
    frames are concatenated or averaged as they are. Speakers of one name are one speaker, in whatever corpus.

    Attributes:
        corpora: of each corpus its caches, one for each teacher, in one order.
    """

    def __init__(self, corpora: Sequence[Sequence[SingleCache]], teachers: str) -> None:
        self.corpora, self._teachers = corpora, teachers
        self.name = " + ".join(cache.name for cache in self.members)
        self.plan = Plan.join([members[0].plan for members in corpora])
        self._first = np.cumsum([0, *(len(members[0]) for members in corpora)])
        self._map = [[_same_views(members[0], cache) for cache in members] for members in corpora]
        self.rejected = {}
        for first, members, maps in zip(self._first, corpora, self._map, strict=False):
            for cache, views in zip(members, maps, strict=True):
                back = np.argsort(views)
                self.rejected |= {int(first + back[view]): reason for view, reason in cache.rejected.items()}
        self._apart: set[str] = set()  # frames of teachers or corpora that do not stand for the same times
        self._targets = self._agree()

    @property
    def corpora_views(self) -> list[np.ndarray]:
        return [np.arange(first, last) for first, last in itertools.pairwise(self._first)]

    @property
    def members(self) -> list[SingleCache]:
        return [cache for members in self.corpora for cache in members]

    @property
    def fingerprint(self) -> str:
        parts = [self._teachers, *(cache.fingerprint for cache in self.members)]
        return digest.of_bytes(" ".join(parts).encode())

    @property
    def names(self) -> list[str]:
        return list(self._targets)

    def target(self, name: str) -> Target:
        return self._targets[name]

    def manifest(self, manifest: Manifest) -> Manifest:
        parts = [members[0].manifest(manifest) for members in self.corpora]
        return Manifest(tuple(u for part in parts for u in part), manifest.source)

    def _agree(self) -> dict[str, Target]:
        """What is served: what every corpus has of every teacher, and features where any teacher's cache has them."""
        first = self.corpora[0]
        shared = [name for name in first[0].names if all(name in cache.names for cache in self.members)]
        served: dict[str, Target] = {}
        for name in shared:
            together = len(first) > 1 and self._teachers != SEPARATE
            if name in FEATURES or (name == LOGITS and together):  # classes of several teachers do not add up
                continue
            targets = [cache.target(name) for cache in first]
            times = [[_times(cache.target(name)) for cache in members] for members in self.corpora]
            if any(of_corpus != times[0] for of_corpus in times) or (together and len(set(times[0])) > 1):
                self._apart.add(name)
            for members in self.corpora:
                for cache, target in zip(members, targets, strict=True):
                    if cache.dim(name) != target.dim:
                        raise SpkdError(f"{cache.name}: {name} has {cache.dim(name)} numbers, elsewhere {target.dim}")
            if self._teachers == SEPARATE:
                served |= {f"{name}@{k}": target for k, target in enumerate(targets)}
            elif self._teachers == AVERAGE:
                if len({target.dim for target in targets}) > 1:
                    raise UsageError(
                        f"teachers=average: {name} has {' and '.join(str(t.dim) for t in targets)} numbers"
                    )
                served[name] = targets[0]
            else:
                served[name] = replace(targets[0], dim=sum(target.dim for target in targets))
        for name, target in FEATURES.items():
            if all(any(name in cache.names for cache in members) for members in self.corpora):
                served[name] = target
        return served

    def stored(self, views: np.ndarray, names: Sequence[str], crop: Crop | None = None) -> dict[str, Tensor]:
        for name in names:
            if name.rsplit("@", 1)[0] in self._apart:
                raise SpkdError(
                    f"{self.name}: {name} are frames of different times (hop or window); "
                    "give teachers=separate for several teachers, and train on one corpus of such a teacher"
                )
        corpus = np.searchsorted(self._first, views, side="right") - 1
        batch = {"order": torch.from_numpy(np.argsort(np.argsort(corpus, kind="stable"), kind="stable"))}
        for c in np.unique(corpus):
            here = np.flatnonzero(corpus == c)
            mine = None if crop is None else Crop(crop.start[here], crop.samples, crop.grid)
            local = views[here] - self._first[c]
            for k, cache in enumerate(self.corpora[c]):
                wanted = self._asked(int(c), k, names)
                stored = cache.stored(self._map[c][k][local], wanted, mine) if wanted else {}
                batch |= {f"{c}/{k}/{name}": values for name, values in stored.items()}
        return batch

    def decode(self, stored: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        pieces: dict[str, list[Tensor]] = {name: [] for name in names}
        for c in sorted({int(key.split("/")[0]) for key in stored if key != "order"}):
            outputs = []
            for k, cache in enumerate(self.corpora[c]):
                prefix = f"{c}/{k}/"
                mine = {key.removeprefix(prefix): v for key, v in stored.items() if key.startswith(prefix)}
                outputs.append(cache.decode(mine, self._asked(c, k, names)))
            for name in names:
                pieces[name].append(self._combine(name, outputs))
        order = stored["order"]
        return {name: torch.cat(parts)[order] for name, parts in pieces.items()}

    def _asked(self, corpus: int, teacher: int, names: Sequence[str]) -> list[str]:
        """Which targets of one cache `names` need."""
        asked = []
        for name in names:
            if name in FEATURES:
                holder = next((k for k, cache in enumerate(self.corpora[corpus]) if name in cache.names), None)
                asked += [name] if teacher == holder else []
            elif "@" not in name:
                asked.append(name)
            elif int(name.rsplit("@", 1)[1]) == teacher:
                asked.append(name.rsplit("@", 1)[0])
        return asked

    def _combine(self, name: str, outputs: list[dict[str, Tensor]]) -> Tensor:
        if "@" in name:
            base, teacher = name.rsplit("@", 1)
            return outputs[int(teacher)][base]
        values = [output[name] for output in outputs if name in output]
        if len(values) == 1:
            return values[0]
        values = [v.float() for v in values]
        if values[0].ndim == 2:
            values = [normalize(v, dim=-1) for v in values]
        if self._teachers == AVERAGE:
            return torch.stack(values).mean(0)
        return torch.cat(values, -1) / (len(values) ** 0.5 if values[0].ndim == 2 else 1.0)


def _times(target: Target) -> tuple[int | None, int, float]:
    """What decides for which times its rows stand, and how many there are."""
    return target.hop, target.window, target.middle


def _same_views(first: SingleCache, other: SingleCache) -> np.ndarray:
    """(views,): where `other` holds each view of `first`.

    Raises:
        SpkdError: the views are not the same.
    """
    mine, theirs = first.plan.views, other.plan.views
    if other is first:
        return np.arange(len(mine))
    index_of = {name: i for i, name in enumerate(other.plan.utterances)}
    to_theirs = np.array([index_of[name] for name in first.plan.utterances])
    start = np.searchsorted(theirs.utterance, np.arange(len(other.plan.utterances)))
    own_start = np.searchsorted(mine.utterance, mine.utterance)
    found = start[to_theirs[mine.utterance]] + np.arange(len(mine)) - own_start
    same = len(mine) == len(theirs) and bool((found < len(theirs)).all())
    for name in ("start", "samples", "speed", "seed", "formants"):
        same = same and np.array_equal(getattr(mine, name), getattr(theirs, name)[found])
    if not same:
        raise SpkdError(f"{other.name} and {first.name}: other views of the same utterances")
    return found
