"""Comparison of a cache with the outputs of its teacher, which is run again on some views."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from spkd.cache.read import Cache
from spkd.cache.source import unused_folders
from spkd.config import without_unused
from spkd.corpus.loader import WaveBatch
from spkd.corpus.manifest import Manifest
from spkd.errors import SpkdError
from spkd.extract.settings import VerifyConfig
from spkd.extract.targets import extract_targets
from spkd.outputs.target import Target
from spkd.teachers.base import Teacher

LEAST = 0.9999  # least cosine between a cached row and the teacher's, for codecs that lose no more than float16
SEED = 0


@dataclass(frozen=True)
class Agreement:
    """Agreement of a target in the cache with the outputs of the teacher.

    Attributes:
        target: name of the target.
        codec: its codec.
        least: lowest cosine between a cached row and the teacher's.
        mean: mean cosine.
        asked: cosine that the lowest must reach.
    """

    target: str
    codec: str
    least: float
    mean: float
    asked: float

    @property
    def holds(self) -> bool:
        """Whether the lowest cosine reaches the one that is asked."""
        return self.least >= self.asked


def compare(cache: Cache, teacher: Teacher, manifest: Manifest, config: VerifyConfig, count: int) -> list[Agreement]:
    """Run the teacher again on random views, and compare every target with the cache.

    With float16 and float32, the cosine must be at least 0.9999 in every row. With a lossy codec, 1 - cosine may be at
    most twice the largest that the card has recorded.

    Args:
        cache: the cache.
        teacher: the teacher.
        manifest: the utterances.
        config: settings of the command.
        count: number of views.
    Returns:
        The agreement of each target.
    Raises:
        UsageError: a typed folder of noise or impulse responses that the cache's views do not have.
        SpkdError: another teacher, manifest or augmentation than those of the cache.
    """
    given, recorded = teacher.described(), cache.card.teacher
    for name in ("family", "weights_sha256"):
        if getattr(given, name) != getattr(recorded, name):
            raise SpkdError(
                f"{cache.root}: made by another teacher ({name} is {getattr(recorded, name)!r}, not "
                f"{getattr(given, name)!r})"
            )
    config = without_unused(config, unused_folders([cache], config.view.noise, "view."))
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
