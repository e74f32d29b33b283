"""Embeddings of a manifest's utterances, each computed once."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from spkd.audio import SAMPLE_RATE
from spkd.cache import EMBEDDING
from spkd.config import EvalConfig, ViewConfig
from spkd.errors import UsageError
from spkd.manifest import Manifest, measure
from spkd.progress import say, track
from spkd.view import Player, ViewPlan, play


class Embedder(Protocol):
    """A model under evaluation: a teacher of any family, or a student's checkpoint."""

    min_samples: int

    @property
    def targets(self) -> Mapping[str, Any]: ...

    def say(self, waves: Tensor, names: list[str]) -> dict[str, np.ndarray]: ...

    def card(self) -> dict[str, Any]: ...


def embed(model: Embedder, manifest: Manifest, config: EvalConfig) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """One L2-normalised embedding (D,) per utterance id, of the whole utterance; and the rejected with reasons.

    Raises:
        UsageError: the model gives no embeddings.
    """
    if EMBEDDING not in model.targets:
        raise UsageError(f"model={config.model} gives no embeddings to score")
    manifest, rejected = measure(manifest)
    plan = ViewPlan.parse(ViewConfig())
    views = plan.views(manifest)
    min_seconds = max(config.min_seconds, model.min_samples / SAMPLE_RATE)
    player = Player(manifest, views, plan.augmentation, min_seconds, say)
    embeddings: dict[str, np.ndarray] = {}

    def reject(row: int, reason: str) -> None:
        rejected[manifest[row].id] = reason

    with track("embedding", len(views), "utterances") as bar:
        for batch in play(player, np.arange(len(views)), config.batch_size, config.workers, reject):
            vectors = model.say(batch.waves, [EMBEDDING])[EMBEDDING]
            vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
            embeddings |= {manifest[int(row)].id: vector for row, vector in zip(batch.rows, vectors, strict=True)}
            bar.advance(len(batch.rows))
    return embeddings, rejected


def real_time_factor(model: Embedder, seconds: float = 4.0, repeats: int = 5) -> float:
    """Median processing time over audio time for one utterance on one CPU thread, features included."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        wave = 0.1 * torch.randn(1, round(seconds * SAMPLE_RATE), generator=torch.Generator().manual_seed(0))
        model.say(wave, [EMBEDDING])
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            model.say(wave, [EMBEDDING])
            times.append(time.perf_counter() - start)
        return float(np.median(times)) / seconds
    finally:
        torch.set_num_threads(threads)
