"""Cohorts: embeddings of other speakers, from a manifest or from a cache of the same model."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from spkd.cache import Cache
from spkd.cache.folder import CARD
from spkd.corpus.address import parse
from spkd.corpus.manifest import Manifest, Utterance, identity
from spkd.corpus.vad import finder_of
from spkd.corpus.vad.base import NONE
from spkd.errors import SpkdError, first_few
from spkd.eval.embed import embed
from spkd.eval.settings import ScoringConfig
from spkd.files import digest
from spkd.files.text import counted
from spkd.outputs.target import EMBEDDING
from spkd.teachers.base import EmbeddingModel, Teacher

UNKNOWN = -1
AT_ONCE = 4096  # views read together


@dataclass(frozen=True)
class Cohort:
    """Embeddings of utterances that are in no trial.

    Attributes:
        vectors: (N, D) embeddings as the model gives them.
        speaker: (N,) number of the speaker, from 0; UNKNOWN where there is no label.
        digest: digest of its utterances, or fingerprint of its cache: a path may lead to another cohort.
        remarks: sentences on views of a cache that are not whole utterances as they were recorded.
    """

    vectors: np.ndarray
    speaker: np.ndarray
    source: str
    digest: str
    remarks: tuple[str, ...] = ()

    @property
    def known_as(self) -> str:
        """Phrase that identifies it wherever it lies."""
        return f"the cohort {self.digest[:12]}"

    @property
    def place(self) -> str:
        """Sentence that says where it was."""
        return f"The cohort {self.digest[:12]} is {self.source}."

    @property
    def labelled(self) -> bool:
        return bool((self.speaker != UNKNOWN).all())


@dataclass(frozen=True)
class CohortSource:
    """Manifest or cache from which a cohort is taken.

    Attributes:
        manifest: manifest of the utterances; None for a cache.
        cache: the cache; None for a manifest.
    """

    name: str
    manifest: Manifest | None
    cache: Cache | None

    @classmethod
    def open(cls, name: str) -> CohortSource:
        """Open a manifest or a cache.

        Raises:
            UsageError: it is neither of them.
            SpkdError: it is damaged.
        """
        if (Path(name) / CARD).is_file():
            return cls(name, None, Cache.open(name))
        return cls(name, Manifest.load(name), None)

    def check_disjoint(self, tested: Sequence[Utterance]) -> None:
        """Check that the cohort shares no speakers, utterances or audio with the trials.

        Otherwise the normalisation or the back-end would be trained on the tested data.

        Raises:
            SpkdError: the cohort shares some.
        """
        if self.cache is not None:
            plan = self.cache.plan
            ids, speakers, audio = set(plan.utterances), set(plan.speakers), list[str]()
        else:
            assert self.manifest is not None
            ids, speakers = {u.id for u in self.manifest}, {u.speaker for u in self.manifest if u.speaker is not None}
            audio = in_both(tested, self.manifest)
        for kind, shared in (
            ("speakers", sorted({u.speaker for u in tested if u.speaker in speakers})),
            ("utterances", sorted({u.id for u in tested if u.id in ids})),
            ("recordings", audio),
        ):
            if shared:
                raise SpkdError(
                    f"cohort={self.name}: holds {len(shared)} of the {kind} that are tested "
                    f"({first_few(shared)}); take a cohort of others"
                )

    def embedded(self, config: ScoringConfig, model: EmbeddingModel) -> Cohort:
        """Cohort embedded by a model.

        Raises:
            SpkdError: the cache is of another model or lacks its embeddings, or no utterance can be used.
        """
        if self.cache is not None:
            return _of_cache(self.name, self.cache, model, config.vad)
        assert self.manifest is not None
        embeddings = embed(model, self.manifest, config)
        if not len(embeddings.vectors):
            raise SpkdError(
                f"cohort={self.name}: no utterance can be used ({next(iter(embeddings.rejected.values()))})"
            )
        speaker = indices([u.speaker for u in embeddings.utterances])
        used = digest.of_blocks(identity(u) for u in embeddings.utterances)
        return Cohort(embeddings.vectors, speaker, self.name, used)


def in_both(tested: Iterable[Utterance], others: Iterable[Utterance]) -> list[str]:
    """Paths of tested utterances whose audio overlaps that of other utterances, sorted.

    Files are compared, not their paths: links and different spellings of a path lead to one file.
    """
    stretches: dict[Hashable, list[Utterance]] = {}
    for utterance in others:
        stretches.setdefault(_file(utterance.path), []).append(utterance)
    return sorted({u.path for u in tested if any(_overlap(u, other) for other in stretches.get(_file(u.path), ()))})


@lru_cache(maxsize=1 << 20)
def _file(path: str) -> Hashable:
    """Identity of a file: device and number, with the place within a container; else its path without links."""
    address = parse(path)
    holder, place = (path, None) if address is None else (address.container, address.offset)
    try:
        status = os.stat(holder)
    except (OSError, ValueError):
        return os.path.realpath(holder), place
    return status.st_dev, status.st_ino, place


def _overlap(first: Utterance, second: Utterance) -> bool:
    """Whether two utterances of one file share audio. An utterance without a channel is of all channels."""
    if first.channel != second.channel and None not in (first.channel, second.channel):
        return False
    ends = [u.start + (np.inf if u.whole is None else u.whole) for u in (first, second)]
    return first.start < ends[1] and second.start < ends[0]


def _of_cache(name: str, cache: Cache, model: EmbeddingModel, vad: str) -> Cohort:
    card = model.described() if isinstance(model, Teacher) else None
    teacher = cache.card.teacher
    if card is None or (teacher.weights_sha256, teacher.details) != (card.weights_sha256, card.details):
        raise SpkdError(
            f"cohort={name}: a cache of {teacher.family} with other weights or settings than the model that "
            "is scored; name a manifest, or a cache of this model"
        )
    stored, described, usable = cache.plan.views, cache.card.views, cache.usable_views[:]
    # Views at another speed or with moved formants are of pseudo-speakers; trials have no added noise.
    views = usable[((stored.speed == 1.0) & (stored.formants == 1.0))[usable]]
    views = views[[not described.augmentation.changes(int(seed)) for seed in stored.seed[views]]]
    if not len(views):
        raise SpkdError(
            f"cohort={name}: no view as it was recorded, at its own speed, with its own formants and without noise, "
            "reverberation and coders; name a manifest"
        )
    # Of full:COUNT, several views may be the same.
    _, first = np.unique(np.stack([stored.utterance[views], stored.start[views]]), axis=1, return_index=True)
    views, remarks = views[np.sort(first)], list[str]()
    if left := len(usable) - len(views):
        remarks.append(
            f"Of the cohort {name}, {left:,} of {counted(len(usable), 'view')} are left out: at another "
            "speed, with moved formants, noise, reverberation or a coder, or the same as another."
        )
    if not described.plan.startswith("full"):
        remarks.append(f"Embeddings of the cohort {name} are not of whole utterances: its views are {described.plan}.")
    finder = finder_of(vad)
    there, here = (NONE if card is None else str(card) for card in (described.vad, finder and finder.card))
    if there != here:
        remarks.append(f"Embeddings of the cohort {name} are with view.vad={there}, those of trials with vad={here}.")
    vectors = np.concatenate(
        [
            cache.batch(views[first : first + AT_ONCE], [EMBEDDING])[EMBEDDING].float().numpy()
            for first in range(0, len(views), AT_ONCE)
        ]
    )
    names = [*cache.plan.speakers, None]  # unlabelled views have the number -1
    speaker = indices([names[number] for number in cache.speaker(views)])
    return Cohort(vectors, speaker, name, cache.fingerprint, tuple(remarks))


def indices(names: list[str | None]) -> np.ndarray:
    """Numbers (N,) of speakers, from 0 in order of appearance; UNKNOWN for None."""
    number: dict[str, int] = {}
    return np.array([UNKNOWN if name is None else number.setdefault(name, len(number)) for name in names], np.int32)


def speaker_means(vectors: np.ndarray, speaker: np.ndarray) -> np.ndarray:
    """Mean of the vectors (N, D) of each speaker, scaled to length 1: (S, D)."""
    sums = np.zeros((int(speaker.max()) + 1, vectors.shape[1]), vectors.dtype)
    np.add.at(sums, speaker, vectors)
    return normalised(sums)


def normalised(vectors: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1: (N, D) -> (N, D)."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
