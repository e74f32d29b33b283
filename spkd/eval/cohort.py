"""Cohorts: embeddings of other speakers, from a manifest or from a cache of the very same model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spkd.cache import Cache
from spkd.cache.folder import CARD
from spkd.corpus.manifest import Manifest
from spkd.errors import SpkdError
from spkd.eval.embed import embed
from spkd.eval.settings import ScoringConfig
from spkd.outputs.target import EMBEDDING
from spkd.teachers.base import Teacher

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


def load_cohort(config: ScoringConfig, model: Teacher) -> Cohort:
    """The cohort that the settings name, embedded by the model.

    Raises:
        UsageError: no such manifest. SpkdError: a cache of another model or without its embeddings, or no utterance
            that can be used.
    """
    source = config.cohort.source or ""
    if (Path(source) / CARD).is_file():
        return _of_cache(Path(source), model)
    found = embed(model, Manifest.load(source), config)
    if not len(found.vectors):
        raise SpkdError(f"cohort={source}: no utterance can be used ({next(iter(found.rejected.values()))})")
    return Cohort(found.vectors, indices([u.speaker for u in found.utterances]), source)


def _of_cache(path: Path, model: Teacher) -> Cohort:
    cache, card = Cache.open(path), model.described()
    theirs = cache.card.teacher
    if (theirs.weights_sha256, theirs.details) != (card.weights_sha256, card.details):
        raise SpkdError(
            f"cohort={path}: a cache of {theirs.family} with other weights or settings than the model that "
            "is scored; name a manifest, or a cache of this model"
        )
    views = cache.usable_views[cache.plan.views.speed[cache.usable_views] == 1.0]
    if not len(views):
        raise SpkdError(f"cohort={path}: no view at its own speed")
    vectors = np.concatenate(
        [
            cache.batch(views[first : first + AT_ONCE], [EMBEDDING])[EMBEDDING].float().numpy()
            for first in range(0, len(views), AT_ONCE)
        ]
    )
    names = [*cache.plan.speakers, None]  # unlabelled views have the number -1
    return Cohort(vectors, indices([names[number] for number in cache.speaker(views)]), str(path))


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
