"""Embeddings of the utterances of a manifest, each computed once."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from spkd.corpus.audio import SAMPLE_RATE, AudioError
from spkd.corpus.loader import iterate_batches
from spkd.corpus.manifest import Manifest, Utterance, measure
from spkd.corpus.settings import ViewConfig
from spkd.corpus.view import ViewPlan
from spkd.device import resolve
from spkd.errors import SpkdError, UsageError
from spkd.eval.settings import EmbedConfig
from spkd.files.atomic import check_not_among, check_writable
from spkd.files.text import counted
from spkd.files.vectors import check_free, check_names, files_of, write_vectors
from spkd.outputs.target import EMBEDDING
from spkd.progress import track
from spkd.teachers import check_model, load_model
from spkd.teachers.base import EmbeddingModel


@dataclass(frozen=True)
class Embeddings:
    """N embedded utterances, in the order of the manifest.

    Attributes:
        utterances: the N utterances, with their durations.
        vectors: (N, D) float32 embeddings as the model gives them.
    """

    utterances: list[Utterance]
    vectors: np.ndarray
    rejected: dict[str, str]


def embed(model: EmbeddingModel, manifest: Manifest, config: EmbedConfig) -> Embeddings:
    """Embeddings of whole utterances.

    Raises:
        UsageError: the model gives no embeddings.
        SpkdError: some embeddings are not finite.
    """
    if EMBEDDING not in model.targets:
        raise UsageError(f"model={config.model.name} gives no embeddings to score")
    manifest, rejected = measure(manifest)
    plan = ViewPlan.parse(ViewConfig())
    views = plan.views(manifest)
    loader = model.view_loader(manifest, views, plan, config.min_seconds)
    vectors = np.empty((len(views), model.targets[EMBEDDING].dim), np.float32)
    done = np.zeros(len(views), bool)

    def reject(view: int, error: AudioError) -> None:
        rejected[manifest[view].id] = error.reason

    with track("embedding", len(views), "utterances") as bar:
        batches = iterate_batches(
            loader, np.arange(len(views)), config.batch_size, config.workers, reject, model.takes_lengths
        )
        for batch in batches:
            embeddings = model.extract(batch.waves, [EMBEDDING], lengths=batch.lengths)[EMBEDDING]
            if wrong := int((~np.isfinite(embeddings).all(1)).sum()):
                raise SpkdError(
                    f"model={config.model.name}: {wrong} of {len(embeddings)} embeddings in one batch are not finite "
                    f"(first of {manifest[int(batch.views[~np.isfinite(embeddings).all(1)][0])].id})"
                )
            vectors[batch.views], done[batch.views] = embeddings, True
            bar.advance(len(batch.views))
    loader.report_remarks()
    kept = np.flatnonzero(done)
    if len(kept) < len(vectors):
        vectors = vectors[kept]
    return Embeddings([manifest[int(view)] for view in kept], vectors, rejected)


def embed_to_file(config: EmbedConfig, manifest: str | Path) -> tuple[int, dict[str, str]]:
    """Write the embeddings of a manifest's utterances into `config.out`.

    Returns:
        The number of embeddings written, and the utterances that could not be used, with the reasons.
    Raises:
        UsageError: an unknown format of vectors, or no such model.
        SpkdError: as `embed`, none of the utterances can be used, or `out` cannot be written, or would replace files
            beside it that nobody named.
    """
    out = Path(config.out)
    check_free(out)
    check_model(config.model)
    for file in files_of(out):
        check_writable(file)
    check_not_among(files_of(out), [manifest, Path(manifest, "wav.scp")])  # of a Kaldi folder
    audio = Manifest.load(manifest)
    check_names(out, audio.index_of)
    embeddings = embed(load_model(config.model, resolve(config.device)), audio, config)
    if not embeddings.utterances:
        name, reason = next(iter(embeddings.rejected.items()))
        raise SpkdError(f"{manifest}: none of {counted(len(audio), 'utterance')} can be used; {name}: {reason}")
    return write_vectors(
        out, zip((u.id for u in embeddings.utterances), embeddings.vectors, strict=True)
    ), embeddings.rejected


def real_time_factor(model: EmbeddingModel, seconds: float = 4.0, repeats: int = 5) -> float:
    """Real-time factor of one utterance on one CPU thread: median processing time over audio time, with features."""
    wave = 0.1 * torch.randn(1, round(seconds * SAMPLE_RATE), generator=torch.Generator().manual_seed(0))
    return median_time(lambda: model.extract(wave, [EMBEDDING]), repeats) / seconds


def median_time(run: Callable[[], object], repeats: int) -> float:
    """Median time (s) of a call on one CPU thread, after a call that is not counted."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run()
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return float(np.median(times))
    finally:
        torch.set_num_threads(threads)
