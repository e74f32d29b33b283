"""Does the teacher still give what the cache holds? It is run again on some views, and its outputs are compared."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from spkd.cache.read import Cache
from spkd.corpus.loader import WaveBatch
from spkd.corpus.manifest import Manifest
from spkd.errors import SpkdError
from spkd.extract.settings import VerifyConfig
from spkd.extract.targets import extract_targets
from spkd.outputs.target import Target
from spkd.teachers.base import Teacher

LEAST = 0.9999  # cosine between cached and live, where a codec loses no more than float16 does
SEED = 0


@dataclass(frozen=True)
class Agreement:
    """Of one target: the least and the mean cosine between a cached row and the live one, and the least that is
    asked."""

    target: str
    codec: str
    least: float
    mean: float
    asked: float

    @property
    def holds(self) -> bool:
        return self.least >= self.asked


def compare(cache: Cache, teacher: Teacher, manifest: Manifest, config: VerifyConfig, count: int) -> list[Agreement]:
    """Recompute `count` random views and compare every target with what is cached.

    float16 and float32 must agree to a cosine of 0.9999 in every row; under a lossy codec the worst row must not be
    worse than what the card recorded by more than as much again.

    Raises:
        SpkdError: another teacher, manifest or augmentation than the cache's.
    """
    mine, theirs = teacher.described(), cache.card.teacher
    for name in ("family", "weights_sha256"):
        if getattr(mine, name) != getattr(theirs, name):
            raise SpkdError(
                f"{cache.root}: made by another teacher ({name} is {getattr(theirs, name)!r}, not "
                f"{getattr(mine, name)!r})"
            )
    loader = cache.view_loader(manifest, config.view.noise, config.view.rir)
    chosen = np.random.RandomState(SEED).permutation(cache.usable_views)[:count]
    cosines: dict[str, list[np.ndarray]] = {name: [] for name in cache.targets}
    for view in chosen:
        wave = torch.from_numpy(np.ascontiguousarray(loader(int(view))))[None]
        live = extract_targets(teacher, WaveBatch(np.array([view]), wave), list(cache.targets.values()))
        for name, values in cache.batch(np.array([view]), list(cache.targets)).items():
            a = live[name].reshape(-1, values.shape[-1]).astype(np.float64)
            b = values.double().numpy().reshape(a.shape)
            norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
            cosines[name].append((a * b).sum(1) / np.maximum(norms, 1e-30))
    return [_agreement(cache, target, np.concatenate(cosines[name])) for name, target in cache.targets.items()]


def _agreement(cache: Cache, target: Target, cosine: np.ndarray) -> Agreement:
    asked, lossless = LEAST, cache.codebook.codecs[target.name].lossless
    recorded = cache.card.errors.get(target.name, {}).get("cosine_min")
    if not lossless and recorded is not None:
        asked = min(LEAST, 1 - 2 * (1 - recorded))
    return Agreement(target.name, target.codec, float(cosine.min()), float(cosine.mean()), asked)
