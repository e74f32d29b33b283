"""Comparison of a cache with the outputs of its teacher, which is run again on some views."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from spkd.cache.read import Cache
from spkd.config import without_unused
from spkd.corpus.fetched import copy_to
from spkd.corpus.loader import WaveBatch
from spkd.corpus.manifest import Manifest
from spkd.corpus.view import unused_folders
from spkd.device import resolve
from spkd.errors import SpkdError
from spkd.extract.settings import VerifyConfig
from spkd.extract.targets import extract_targets
from spkd.files.text import differences
from spkd.outputs.target import Target
from spkd.progress import log
from spkd.teachers import load_teacher
from spkd.teachers.base import Teacher

LEAST = 0.9999  # least cosine between a cached row and the teacher's, for codecs that lose no more than float16
SEED = 0


@dataclass(frozen=True)
class Agreement:
    """Agreement of a target in the cache with the outputs of the teacher.

    Attributes:
        least: lowest cosine between a cached row and the teacher's.
        mean: mean cosine.
        asked: cosine that the lowest must reach.
    """

    target: str
    codec: str
    least: float
    mean: float
    asked: float


def check(root: Path, config: VerifyConfig, count: int) -> None:
    """Compare a cache with its teacher, and log a line for each target.

    Raises:
        UsageError: as `compare` and `copy_to`.
        SpkdError: as `compare` and `copy_to`, or a target that differs from the teacher's output.
    """
    teacher = load_teacher(config.teacher, resolve(config.device))
    manifest = Manifest.load(config.manifest)
    copy_to(config, manifest)
    agreements = compare(Cache.open(root), teacher, manifest, config, count)
    for each in agreements:
        log(f"live: {each.target} ({each.codec}): cosine at least {each.least:.6f}, mean {each.mean:.6f}")
    for each in agreements:
        if each.least < each.asked:
            raise SpkdError(f"{root}: {each.target} differs from the teacher's output (cosine below {each.asked:.6f})")


def compare(cache: Cache, teacher: Teacher, manifest: Manifest, config: VerifyConfig, count: int) -> list[Agreement]:
    """Run the teacher again on random views, and compare every target with the cache.

    With float16 and float32, the cosine must be at least 0.9999 in every row. With a lossy codec, 1 - cosine may be at
    most twice the largest that the card has recorded.

    Raises:
        UsageError: a folder of audio that the cache's views do not need.
        SpkdError: another teacher, settings of it, manifest or augmentation than those of the cache.
    """
    config = without_unused(config, unused_folders([cache.card.views], "view."))
    there, here = (card.covered("teacher") for card in (cache.card, replace(cache.card, teacher=teacher.described())))
    if differing := differences(there, json.loads(json.dumps(here))):
        raise SpkdError(f"{cache.root}: made by another teacher, or with other settings of it ({differing})")
    loader = cache.view_loader(manifest, config.view.noise, config.view.rir)
    chosen = np.random.RandomState(SEED).permutation(cache.usable_views[:])[:count]
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
