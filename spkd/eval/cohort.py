"""Cohorts: embeddings of other speakers, from a manifest or from a cache of the very same model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spkd.cache import Cache
from spkd.cache.folder import CARD
from spkd.corpus.manifest import Manifest, Utterance
from spkd.errors import SpkdError
from spkd.eval.embed import embed
from spkd.eval.settings import ScoringConfig
from spkd.outputs.target import EMBEDDING
from spkd.teachers.base import EmbeddingModel, Teacher

UNKNOWN = -1
AT_ONCE = 4096  # views read together


@dataclass(frozen=True)
class Cohort:
    """Utterances that are no trial's.

    Attributes:
        vectors: (N, D) as the model gives them.
        speaker: (N,) counted from 0; UNKNOWN where there is no label.
        source: where they are from.
    """

    vectors: np.ndarray
    speaker: np.ndarray
    source: str

    @property
    def labelled(self) -> bool:
        return bool((self.speaker != UNKNOWN).all())


@dataclass(frozen=True)
class CohortSource:
    """A manifest or a cache from which a cohort is taken.

    Attributes:
        name: the file or folder.
        manifest: of its utterances; None for a cache.
        cache: None for a manifest.
    """

    name: str
    manifest: Manifest | None
    cache: Cache | None

    @classmethod
    def open(cls, name: str) -> CohortSource:
        """Raises UsageError: neither of them. SpkdError: damaged."""
        if (Path(name) / CARD).is_file():
            return cls(name, None, Cache.open(name))
        return cls(name, Manifest.load(name), None)

    def check_disjoint(self, tested: Sequence[Utterance]) -> None:
        """Raises SpkdError where the cohort holds speakers, utterances or audio of the trials: then a score is
        normalised, or a back-end is trained, by what it is to tell."""
        if self.cache is not None:
            plan = self.cache.plan
            ids, speakers, audio = set(plan.utterances), set(plan.speakers), set()
        else:
            assert self.manifest is not None
            ids, speakers = {u.id for u in self.manifest}, {u.speaker for u in self.manifest if u.speaker is not None}
            audio = {_audio(u) for u in self.manifest}
        for kind, shared in (
            ("speakers", sorted({u.speaker for u in tested if u.speaker in speakers})),
            ("utterances", sorted({u.id for u in tested if u.id in ids})),
            ("recordings", sorted({u.path for u in tested if _audio(u) in audio})),
        ):
            if shared:
                raise SpkdError(
                    f"cohort={self.name}: holds {len(shared)} of the {kind} that are tested "
                    f"({', '.join(map(str, shared[:3]))}{', ...' if len(shared) > 3 else ''}); take a cohort of others"
                )

    def embedded(self, config: ScoringConfig, model: EmbeddingModel) -> Cohort:
        """The cohort as embedded by a model.

        Raises:
            SpkdError: a cache of another model or without its embeddings, or no utterance that can be used.
        """
        if self.cache is not None:
            return _of_cache(self.name, self.cache, model)
        assert self.manifest is not None
        found = embed(model, self.manifest, config)
        if not len(found.vectors):
            raise SpkdError(f"cohort={self.name}: no utterance can be used ({next(iter(found.rejected.values()))})")
        return Cohort(found.vectors, indices([u.speaker for u in found.utterances]), self.name)


def _audio(utterance: Utterance) -> tuple[str, float, int | None]:
    return utterance.path, utterance.start, utterance.channel


def _of_cache(name: str, cache: Cache, model: EmbeddingModel) -> Cohort:
    card = model.described() if isinstance(model, Teacher) else None
    theirs = cache.card.teacher
    if card is None or (theirs.weights_sha256, theirs.details) != (card.weights_sha256, card.details):
        raise SpkdError(
            f"cohort={name}: a cache of {theirs.family} with other weights or settings than the model that "
            "is scored; name a manifest, or a cache of this model"
        )
    stored = cache.plan.views
    # At another speed, or with formants moved, a speaker is another pseudo-speaker.
    unchanged = (stored.speed == 1.0) & (stored.formants == 1.0)
    views = cache.usable_views[unchanged[cache.usable_views]]
    if not len(views):
        raise SpkdError(f"cohort={name}: no view at its own speed and with its own formants")
    vectors = np.concatenate(
        [
            cache.batch(views[first : first + AT_ONCE], [EMBEDDING])[EMBEDDING].float().numpy()
            for first in range(0, len(views), AT_ONCE)
        ]
    )
    names = [*cache.plan.speakers, None]  # unlabelled views have the number -1
    return Cohort(vectors, indices([names[number] for number in cache.speaker(views)]), name)


def indices(names: list[str | None]) -> np.ndarray:
    """Speakers as numbers counted from 0, in order of appearance; UNKNOWN for None."""
    number: dict[str, int] = {}
    return np.array([UNKNOWN if name is None else number.setdefault(name, len(number)) for name in names], np.int32)


def speaker_means(vectors: np.ndarray, speaker: np.ndarray) -> np.ndarray:
    """The mean of each speaker's vectors, of length 1: (N, D) -> (S, D)."""
    sums = np.zeros((int(speaker.max()) + 1, vectors.shape[1]), vectors.dtype)
    np.add.at(sums, speaker, vectors)
    return normalised(sums)


def normalised(vectors: np.ndarray) -> np.ndarray:
    """Rows of length 1."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
