"""Embeddings of the utterances of a manifest, each computed once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from spkd.corpus.audio import SAMPLE_RATE, AudioError
from spkd.corpus.fetched import copy_to
from spkd.corpus.loader import iterate_batches
from spkd.corpus.manifest import Manifest, Utterance, measure
from spkd.corpus.settings import ViewConfig
from spkd.corpus.vad import finder_of
from spkd.corpus.vad.base import NONE
from spkd.corpus.vad.find import speech_alone
from spkd.corpus.view import ViewPlan
from spkd.device import resolve
from spkd.errors import SpkdError, UsageError, listed
from spkd.eval.settings import EmbedConfig
from spkd.files.atomic import check_not_among, check_writable
from spkd.files.text import counted
from spkd.files.vectors import check_free, check_names, files_of, write_vectors
from spkd.outputs.target import EMBEDDING
from spkd.progress import log, track
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
    """Embeddings of whole utterances, or of their speech.

    Raises:
        UsageError: the model gives no embeddings, or `vad` is none that is known.
        SpkdError: some embeddings are not finite.
    """
    if EMBEDDING not in model.targets:
        raise UsageError(f"model={config.model.name} gives no embeddings to score")
    manifest, rejected = measured(manifest, config)
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


def measured(manifest: Manifest, config: EmbedConfig) -> tuple[Manifest, dict[str, str]]:
    """The utterances with their durations and, where it is asked for, their speech.

    Returns:
        Those that can be used, and the id of each other -> the reason.
    """
    manifest, rejected = measure(manifest)
    manifest, silent = speech_alone(manifest, finder_of(config.vad), config.workers)
    return manifest, rejected | silent


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
    copy_to(config, audio)
    check_names(out, audio.index_of)
    model = load_model(config.model, resolve(config.device))
    for note in notes_on_vad([model], config.vad):
        log(f"note: {note}")
    embeddings = embed(model, audio, config)
    if not embeddings.utterances:
        name, reason = next(iter(embeddings.rejected.items()))
        raise SpkdError(f"{manifest}: none of {counted(len(audio), 'utterance')} can be used; {name}: {reason}")
    return write_vectors(
        out, zip((u.id for u in embeddings.utterances), embeddings.vectors, strict=True)
    ), embeddings.rejected


def notes_on_vad(models: Sequence[EmbeddingModel], vad: str) -> list[str]:
    """Sentences on students that were trained on speech found in another way, or on whole utterances.

    Args:
        vad: the setting `vad`.
    """
    if all(model.training is None or model.training.steps is None for model in models):
        return []
    finder, notes = finder_of(vad), []
    here = NONE if finder is None else str(finder.card)
    for training in (model.training for model in models if model.training is not None):
        if training.steps is not None and (trained := training.facts.vad or (NONE,)) != (here,):
            notes.append(f"The student was trained with vad={listed(trained, 'and')}, and is used with vad={here}.")
    return list(dict.fromkeys(notes))


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
