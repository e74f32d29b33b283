"""Comparison of a cache with the outputs of its teacher, which is run again on some views."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from spkd.cache.codec import cosines, decoded
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
from spkd.files.text import counted, differences
from spkd.outputs.target import Target
from spkd.progress import log
from spkd.teachers import load_teacher
from spkd.teachers.base import Teacher

LEAST = 0.9999  # least cosine between a cached row and the teacher's, for codecs that lose no more than float16
MORE = 2.0  # most that a lossy codec's 1 - cosine of a row may have grown by
SEED = 0


@dataclass(frozen=True)
class Agreement:
    """Agreement of a target in the cache with the outputs of the teacher.

    Attributes:
        least: lowest cosine between a cached row and the teacher's.
        mean: mean cosine.
        rows: number of rows.
        differing: number of rows that differ by more than the codec explains.
    """

    target: str
    codec: str
    least: float
    mean: float
    rows: int
    differing: int


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
    if differing := [
        f"{each.target} differs from the teacher's output in {each.differing:,} of {counted(each.rows, 'row')}, by "
        f"more than {each.codec} explains"
        for each in agreements
        if each.differing
    ]:
        raise SpkdError(f"{root}: {'; '.join(differing)}")


def compare(cache: Cache, teacher: Teacher, manifest: Manifest, config: VerifyConfig, count: int) -> list[Agreement]:
    """Run the teacher again on random views, and compare every target with the cache.

    With float16 and float32, the cosine must be at least LEAST in every row. With a lossy codec, 1 - cosine may be
    MORE times what the codec loses of the teacher's row itself: rows differ in what a codec keeps of them, and the
    worst of few rows on the card is no bound for all.

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
    pairs: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {name: [] for name in cache.targets}
    for view in chosen:
        wave = torch.from_numpy(np.ascontiguousarray(loader(int(view))))[None]
        live = extract_targets(teacher, WaveBatch(np.array([view]), wave), list(cache.targets.values()))
        for name, values in cache.batch(np.array([view]), list(cache.targets)).items():
            rows = live[name].reshape(-1, values.shape[-1])
            pairs[name].append((rows, values.float().numpy().reshape(rows.shape)))
    return [
        _agreement(cache, target, *map(np.concatenate, zip(*pairs[name], strict=True)))
        for name, target in cache.targets.items()
    ]


def _agreement(cache: Cache, target: Target, live: np.ndarray, cached: np.ndarray) -> Agreement:
    codec, cosine = cache.codebook.codecs[target.name], cosines(live, cached)
    asked = np.full(len(cosine), LEAST)
    if not codec.lossless:
        asked = np.minimum(asked, 1 - MORE * (1 - cosines(live, decoded(codec, live))))
    least, mean = float(cosine.min()), float(cosine.mean())
    return Agreement(target.name, target.codec, least, mean, len(cosine), int((cosine < asked).sum()))
