"""Fitting of codecs, and measurement of their errors, on outputs of the teacher for a few views."""

from __future__ import annotations

import numpy as np
import torch

from spkd.cache import codec as codecs
from spkd.cache.codebook import Codebook
from spkd.corpus.audio import AudioError
from spkd.corpus.loader import ViewLoader, iterate_batches
from spkd.errors import SpkdError
from spkd.extract.settings import ExtractConfig
from spkd.extract.targets import extract_targets
from spkd.outputs.head import Head
from spkd.outputs.target import EMBEDDING, LOGITS, Target
from spkd.progress import track
from spkd.teachers.base import Teacher

HELD_OUT = 512  # rows on which the error of a codec that learns is measured
PLAIN = 32  # rows for a codec that does not learn; few, since at utterance level each row takes a view
ROWS_PER_VIEW = 256  # most frames of one view, since frames of a view are similar
SEED = 0


def calibrate(
    teacher: Teacher,
    loader: ViewLoader,
    targets: list[Target],
    head: Head | None,
    logits_stored: bool,
    config: ExtractConfig,
) -> Codebook:
    """Fit the codec of every target on a random sample of views, and measure its error on held-out rows.

    Args:
        head: the teacher's classifier, from which logits follow; None where there is none.
        logits_stored: whether logits are stored as a target instead.
    Returns:
        The fitted codecs, with their errors.
    Raises:
        SpkdError: fewer usable rows than a codec needs, or outputs that are not finite or too small for a codec.
    """
    fitted = {target.name: codecs.make_codec(target.codec, target.dim) for target in targets}
    wanted = {n: codec.training_rows + HELD_OUT if codec.training_rows else PLAIN for n, codec in fitted.items()}
    rows = sample(teacher, loader, targets, wanted, config)
    errors, stored_as = {}, {target.name: target.codec for target in targets}
    for name, codec in fitted.items():
        held_out = rows[name]
        if codec.training_rows:
            held_out, training = np.split(rows[name], [min(HELD_OUT, len(rows[name]) // 4)])
            codecs.fit(name, codec, training)
        if len(held_out):
            errors[name] = codecs.error(codec, held_out)
            if name == LOGITS:
                errors[name] |= codecs.divergence(held_out, codecs.decoded(codec, held_out))
            if name == EMBEDDING and head is not None and not logits_stored:
                live, read = (head.logits(torch.from_numpy(e)) for e in (held_out, codecs.decoded(codec, held_out)))
                errors[LOGITS] = codecs.divergence(live.numpy(), read.numpy())
            if not np.isfinite(list(errors[name].values())).all():
                raise SpkdError(
                    f"target {name}: values that are not finite as {stored_as[name]}; try storage.codec=float32"
                )
            if codec.most_lost is not None and (share := codecs.lost(codec, held_out)) > codec.most_lost:
                raise SpkdError(
                    f"target {name}: values up to {np.abs(held_out).max():.2g} are too small for {stored_as[name]}, "
                    f"which loses {100 * share:.3g} % of them; try storage.codec=float32"
                )
    return Codebook(fitted, errors)


def sample(
    teacher: Teacher, loader: ViewLoader, targets: list[Target], wanted: dict[str, int], config: ExtractConfig
) -> dict[str, np.ndarray]:
    """Outputs of the teacher for views in random order, until there are enough rows.

    Args:
        wanted: name of each target -> number of rows.
    Returns:
        Name of each target -> (n, dim) rows, as many as wanted, or fewer where the views give fewer.
    Raises:
        SpkdError: no view can be loaded, or outputs that are not finite.
    """
    limits = teacher.limits(config.min_seconds)
    order = np.random.RandomState(SEED).permutation(len(loader.views))
    rows: dict[str, list[np.ndarray]] = {target.name: [] for target in targets}
    count, rejected = dict.fromkeys(rows, 0), dict[int, AudioError]()
    total = sum(wanted.values())
    with track("calibrating codecs", total, "rows") as bar:
        for start in range(0, len(order), config.batch_size):
            # Load the next views that the teacher accepts.
            views = order[start : start + config.batch_size]
            views = views[[loader.refusal(int(view), *limits) is None for view in views]]
            batches = iterate_batches(
                loader, views, config.batch_size, config.workers, rejected.__setitem__, teacher.takes_lengths
            )
            for batch in batches:
                samples = loader.views.samples[batch.views]
                outputs = extract_targets(teacher, batch, targets)
                # Keep as many of their rows as are still wanted.
                for target in targets:
                    name, values = target.name, outputs[target.name]
                    flat = values if values.ndim == 2 else _spread(values, target.num_frames(samples))
                    if not np.isfinite(flat).all():
                        cause = "are its weights damaged?" if teacher.precision is None else "try precision=fp32"
                        raise SpkdError(f"target {name}: the teacher's outputs are not finite; {cause}")
                    flat = flat[: wanted[name] - count[name]]
                    rows[name].append(flat)
                    count[name] += len(flat)
                    bar.advance(len(flat))
            if all(count[name] >= wanted[name] for name in wanted):
                break
    if not all(rows.values()):
        reason = loader.refusal(0, *limits) or next((error.reason for error in rejected.values()), "")
        raise SpkdError(f"{loader.manifest.source}: no view can be loaded ({reason})")
    return {name: np.concatenate(values) for name, values in rows.items()}


def _spread(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Frames of a batch of views, at equal distances in each view, and at most ROWS_PER_VIEW of each.

    Args:
        values: (B, T, D) frames.
        counts: (B,) number of frames of each view; further frames are padding.
    Returns:
        (rows, D).
    """
    views = zip(values, counts, strict=True)
    return np.concatenate([frames[: int(n) : -(-int(n) // ROWS_PER_VIEW)] for frames, n in views])
