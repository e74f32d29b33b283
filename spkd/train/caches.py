"""Several caches as one: corpora are joined one after the other, teachers of the same views next to each other."""

from __future__ import annotations

import itertools
import os
import shlex
from collections import Counter
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
from spkd.cache.mapped_plan import joined
from spkd.cache.read import Cache
from spkd.cache.source import CacheSource, SingleCache
from spkd.cache.verify import check_usable
from spkd.corpus.manifest import Manifest
from spkd.errors import SpkdError, UsageError, bracketed, first_few, public_address
from spkd.files import digest
from spkd.files.text import counted
from spkd.outputs.features import FEATURES
from spkd.outputs.target import CODES, LOGITS, Target
from spkd.progress import log

CONCATENATE, AVERAGE, SEPARATE = "concatenate", "average", "separate"


def open_caches(paths: Sequence[str], teachers: str = CONCATENATE, labelled: bool = True) -> CacheSource:
    """The cache at a path, an export to stream from (a folder or URL of tars), or several caches combined.

    Args:
        paths: folders of caches; or one folder or URL of an export.
        teachers: combination of the outputs of several teachers; see CombinedCache.
        labelled: whether the labels of the manifests are used.
    Raises:
        UsageError: no path, or a stream among several caches.
        SpkdError: caches that cannot be combined, or one that cannot be opened.
    """
    if not paths:
        raise UsageError("cache: name at least one")
    if len(paths) == 1:
        if (hint := bracketed("cache", paths[0])) and "://" not in paths[0] and not Path(paths[0]).exists():
            raise UsageError(f"cache={paths[0]}: no such folder{hint}")
        return _open(paths[0])
    places = Counter(path if "://" in path else os.path.realpath(path) for path in paths)
    if twice := next((path for path in paths if places[path if "://" in path else os.path.realpath(path)] > 1), None):
        raise UsageError(f"{public_address(twice)}: named twice among the caches; name each once")
    opened = [_open(path) for path in paths]
    streams = [cache.name for cache in opened if not cache.random_access]
    if streams:
        raise UsageError(f"{streams[0]}: a stream cannot be combined with other caches; import it: spkd cache import")
    corpora = _corpora(opened)
    if labelled:
        _note_shared_speakers([members[0] for members in corpora])
    return CombinedCache(corpora, teachers)


def _note_shared_speakers(corpora: Sequence[SingleCache]) -> None:
    """Print how many speakers of one corpus have the name of a speaker of another."""
    times = Counter(speaker for cache in corpora for speaker in set(cache.plan.speakers))
    if shared := sorted(speaker for speaker, count in times.items() if count > 1):
        log(
            f"note: {counted(len(shared), 'speaker')} of one cache with the name of a speaker of another "
            f"({first_few(shared)}), taken for the same; if they are not, give the manifests other names"
        )


def _open(path: str) -> SingleCache:
    if "://" in path or (Path(path) / INDEX).is_file():
        try:
            return Stream(path)
        except SpkdError as error:
            if f"{INDEX}: missing" not in str(error):
                raise
            raise SpkdError(
                f"{error}; only exports are streamed (a cache is copied here by "
                f"`spkd cache pull {shlex.quote(path)} FOLDER`)"
            ) from error
    cache = Cache.open(path)
    check_usable(cache)
    return cache


def _corpora(caches: Sequence[SingleCache]) -> list[list[SingleCache]]:
    """Caches grouped by corpus, with the teachers of every corpus in the order of the first.

    Raises:
        SpkdError: caches that share only some of their utterances, different views of the same utterances, the same
            teacher twice, or a corpus that lacks a teacher.
    """
    corpora: list[tuple[set[str], list[SingleCache]]] = []
    for cache in caches:
        cache_utterances = set(cache.plan.utterances)
        for utterances, members in corpora:
            common = len(cache_utterances & utterances)
            if common > 0 and cache_utterances != utterances:
                raise SpkdError(
                    f"{cache.name} and {members[0].name} have {counted(common, 'utterance')} in common; several "
                    "corpora must have none, several teachers all"
                )
            if common:
                if cache.card.views != members[0].card.views:
                    raise SpkdError(f"{cache.name} and {members[0].name}: other views of the same utterances")
                members.append(cache)
                break
        else:
            corpora.append((cache_utterances, [cache]))
    first = corpora[0][1]
    teachers = [cache.card.covered("teacher") for cache in first]
    for _, members in corpora:
        corpus_teachers = [cache.card.covered("teacher") for cache in members]
        if any(corpus_teachers.count(teacher) != 1 for teacher in teachers) or len(corpus_teachers) != len(teachers):
            given, expected = (", ".join(t["family"] for t in listed) for listed in (corpus_teachers, teachers))
            raise SpkdError(
                f"{members[0].name}: every corpus needs the same teachers, each once "
                f"({given}; {first[0].name}: {expected})"
            )
        members.sort(key=lambda cache: teachers.index(cache.card.covered("teacher")))
    return [members for _, members in corpora]


class CombinedCache(CacheSource):
    """Corpora of one or several teachers.

    Outputs of several teachers at utterance level are L2-normalised. Then they are concatenated (and divided by the
    square root of the number of teachers, so that a cosine is the mean of the teachers' cosines), or averaged, or given
    separately as NAME@0, NAME@1, ... Frames are concatenated or averaged without normalisation. Speakers of the same
    name are one speaker, in whatever corpus.

    Attributes:
        corpora: caches of each corpus, one for each teacher, in the same order everywhere.
    """

    def __init__(self, corpora: Sequence[Sequence[SingleCache]], teachers: str) -> None:
        self.corpora, self._teachers = corpora, teachers
        self.name = " + ".join(cache.name for cache in self.members)
        self.plan = joined([members[0].plan for members in corpora])
        self._first = np.cumsum([0, *(len(members[0]) for members in corpora)])
        self._map = [[_same_views(members[0], cache) for cache in members] for members in corpora]
        self.rejected = {}
        for first, members, maps in zip(self._first, corpora, self._map, strict=False):
            for cache, views in zip(members, maps, strict=True):
                back = None if views is None else np.argsort(views)
                self.rejected |= {
                    int(first + (view if back is None else back[view])): why for view, why in cache.rejected.items()
                }
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
        return Manifest.join(parts, manifest.source)

    def _agree(self) -> dict[str, Target]:
        """Targets served: those that every corpus has of every teacher, and features that any teacher's cache has."""
        first = self.corpora[0]
        shared = [name for name in first[0].names if all(name in cache.names for cache in self.members)]
        served: dict[str, Target] = {}
        for name in shared:
            together = len(first) > 1 and self._teachers != SEPARATE
            if name in FEATURES or (name == LOGITS and together):  # classes of several teachers do not add up
                continue
            if name.endswith(CODES) and (together or not self._of_one_codebook(name.removesuffix(CODES))):
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

    def _of_one_codebook(self, name: str) -> bool:
        """Whether the codes of a target stand for the same vectors in all corpora."""
        first = [cache.codebook.codecs[name] for cache in self.corpora[0]]
        return all(
            (cache.target(name).codec, cache.dim(name)) == (own.target(name).codec, own.dim(name))
            and all(np.array_equal(v, cache.codebook.codecs[name].parameters[k]) for k, v in codec.parameters.items())
            for members in self.corpora[1:]
            for cache, own, codec in zip(members, self.corpora[0], first, strict=True)
        )

    def stored(self, views: np.ndarray, names: Sequence[str], crop: Crop | None = None) -> dict[str, Tensor]:
        for name in names:
            if name.rsplit("@", 1)[0] in self._apart:
                raise SpkdError(
                    f"{self.name}: {name} are frames of different times (hop or window); "
                    "give teachers=separate for several teachers, and train on one corpus of such a teacher"
                )
        views = np.asarray(views)
        corpus = np.searchsorted(self._first, views, side="right") - 1
        batch = {"order": torch.from_numpy(np.argsort(np.argsort(corpus, kind="stable"), kind="stable"))}
        for c in np.unique(corpus):
            rows = np.flatnonzero(corpus == c)
            corpus_crop = None if crop is None else Crop(crop.start[rows], crop.samples, crop.grid)
            local = views[rows] - self._first[c]
            for k, cache in enumerate(self.corpora[c]):
                wanted = self._asked(int(c), k, names)
                views_of = self._map[c][k]
                theirs = local if views_of is None else views_of[local]
                stored = cache.stored(theirs, wanted, corpus_crop) if wanted else {}
                batch |= {f"{c}/{k}/{name}": values for name, values in stored.items()}
        return batch

    def decode(self, stored: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        pieces: dict[str, list[Tensor]] = {name: [] for name in names}
        for c in sorted({int(key.split("/")[0]) for key in stored if key != "order"}):
            outputs = []
            for k, cache in enumerate(self.corpora[c]):
                prefix = f"{c}/{k}/"
                of_cache = {key.removeprefix(prefix): v for key, v in stored.items() if key.startswith(prefix)}
                outputs.append(cache.decode(of_cache, self._asked(c, k, names)))
            for name in names:
                pieces[name].append(self._combine(name, outputs))
        order = stored["order"]
        return {name: torch.cat(parts)[order] for name, parts in pieces.items()}

    def _asked(self, corpus: int, teacher: int, names: Sequence[str]) -> list[str]:
        """Names of the targets to read from one cache for the targets `names` of all."""
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
    """Hop, window and position of the first row of a target: they determine the times and the number of its rows."""
    return target.hop, target.window, target.middle


def _same_views(first: SingleCache, other: SingleCache) -> np.ndarray | None:
    """Place (views,) in `other` of each view of `first`; None where it is the same place."""
    if other is first:
        return None
    index_of = {name: i for i, name in enumerate(other.plan.utterances)}
    to_other = np.array([index_of[name] for name in first.plan.utterances])
    begins, ends = other.plan.tables.views_of(to_other)
    own_begins, own_ends = first.plan.tables.views_of(np.arange(len(to_other)))
    same = np.array_equal(ends - begins, own_ends - own_begins)
    places = np.repeat(begins - own_begins, own_ends - own_begins) + np.arange(len(first))
    for name in ("start", "samples", "speed", "seed", "formants") if same else ():
        same = same and np.array_equal(getattr(first.plan.views, name), getattr(other.plan.views, name)[places])
    if not same:
        raise SpkdError(f"{other.name} and {first.name}: other views of the same utterances")
    return None if np.array_equal(places, np.arange(len(first))) else places
