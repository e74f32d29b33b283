"""`spkd eval`: score a trial list with one model."""

from __future__ import annotations

import io
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spkd import __version__, digest
from spkd.config import EvalConfig
from spkd.errors import SpkdError, did_you_mean
from spkd.eval import plots, report
from spkd.eval.embed import embed
from spkd.eval.metrics import METRICS, Curve, compute, curve
from spkd.eval.names import match
from spkd.eval.trials import Trials
from spkd.files import writable_folder, write_bytes, write_json
from spkd.manifest import Manifest
from spkd.progress import log
from spkd.teachers import Teacher

SCORES = "scores.txt"
AT_ONCE = 1 << 16  # trials scored together
HOW = (
    "Each utterance is embedded once, whole, and L2-normalised; a trial's score is the cosine of its two embeddings, "
    "without centring or score normalisation. EER interpolates linearly between the two operating points around the "
    "crossing; minDCF has C_miss = C_fa = 1 and is divided by the cost of the better blind decision. Trials with an "
    "utterance that could not be used are left out and listed."
)


@dataclass(frozen=True)
class Scored:
    """Trials that could be scored.

    Attributes:
        trials: all of the list.
        kept: (N,) which of them.
        scores: (N,).
        rejected: utterances that could not be used, with the reasons.
        curve: of the errors, where the list is labelled.
    """

    trials: Trials
    kept: np.ndarray
    scores: np.ndarray
    rejected: dict[str, str]
    curve: Curve | None


def evaluate(config: EvalConfig, model: Teacher, manifest: Manifest, trials: Trials) -> dict[str, Any]:
    """Score the trials, write scores.txt, report.json and report.html into `config.out`. Returns the report.

    Raises:
        SpkdError: as `score`, or `out` cannot be written.
    """
    out = writable_folder(config.out)
    started = time.time()
    if trials.label is not None and len(np.unique(trials.label)) < 2:
        kind = "target" if trials.label[0] else "non-target"
        log(f"note: {trials.source} holds only {kind} trials: scores are written, but no error rates")
    scored = score(config, model, manifest, trials)
    write_bytes(out / SCORES, _score_lines(scored))
    summary = summarise(config, model, scored, time.time() - started)
    write_json(out / "report.json", summary)
    write_bytes(out / "report.html", _html(summary, scored).encode())
    return summary


def _score_lines(scored: Scored) -> bytes:
    names, trials = scored.trials.utterances, scored.trials
    out = io.StringIO()
    for first in range(0, len(scored.kept), AT_ONCE):
        kept = scored.kept[first : first + AT_ONCE]
        sides = (trials.enrolment[kept].tolist(), trials.test[kept].tolist(), scored.scores[first : first + AT_ONCE])
        out.writelines(f"{names[a]} {names[b]} {s:.6f}\n" for a, b, s in zip(*sides, strict=True))
    return out.getvalue().encode()


def score(config: EvalConfig, model: Teacher, manifest: Manifest, trials: Trials) -> Scored:
    """Cosine scores of every trial whose two utterances can be used.

    Raises:
        SpkdError: a trial names an utterance that the manifest lacks, none can be scored, or a score is not finite.
    """
    wanted = trials.utterances
    found = match(wanted, manifest.index_of)
    if missing := [name for name in wanted if name not in found]:
        index = wanted.index(missing[0])
        line = trials.line[int(np.argmax((trials.enrolment == index) | (trials.test == index)))]
        raise SpkdError(
            f"{trials.source}:{line}: utterance {missing[0]!r} is not in {manifest.source} "
            f"({len(missing)} such of {len(wanted)}){did_you_mean(missing[0], list(manifest.index_of)[:10_000])}"
        )
    part = Manifest(tuple(manifest[manifest.index_of[name]] for name in dict.fromkeys(found.values())), manifest.source)
    embeddings, rejected = embed(model, part, config)
    if not embeddings:
        raise SpkdError(
            f"{trials.source}: none of its {len(wanted)} utterances can be used ({next(iter(rejected.values()))})"
        )
    row_of: dict[str, int] = {}
    matrix = np.empty((len(embeddings), len(next(iter(embeddings.values())))), np.float32)
    for row, name in enumerate(list(embeddings)):
        row_of[name], matrix[row] = row, embeddings.pop(name)
    matrix /= np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), 1e-12)
    place = np.array([row_of.get(found[name], -1) for name in wanted])
    left, right = place[trials.enrolment], place[trials.test]
    kept = np.flatnonzero((left >= 0) & (right >= 0))
    scores = np.empty(len(kept), np.float32)
    for first in range(0, len(kept), AT_ONCE):
        some = kept[first : first + AT_ONCE]
        scores[first : first + AT_ONCE] = np.einsum("nd,nd->n", matrix[left[some]], matrix[right[some]])
    if wrong := int((~np.isfinite(scores)).sum()):
        raise SpkdError(f"{trials.source}: {wrong:,} of {len(scores):,} scores are not finite")
    labels = None if trials.label is None else trials.label[kept]
    both = labels is not None and len(np.unique(labels)) == 2
    return Scored(trials, kept, scores, rejected, curve(scores, labels) if both and labels is not None else None)


def summarise(config: EvalConfig, model: Teacher, scored: Scored, seconds: float) -> dict[str, Any]:
    """The report as one tree: results first, then everything that decides them."""
    trials = scored.trials
    results = {} if scored.curve is None else compute(scored.curve)
    labels = None if trials.label is None else trials.label[scored.kept]
    return {
        "spkd_report": 1,
        "results": results,
        "trials": {
            "file": trials.source,
            "sha256": digest.of_file(Path(trials.source)),
            "scored": len(scored.kept),
            "left_out": len(trials) - len(scored.kept),
            "targets": None if labels is None else int(labels.sum()),
            "non_targets": None if labels is None else int((1 - labels).sum()),
        },
        "model": {"name": config.model, "parameters": model.num_parameters, **model.card().to_json()},
        "manifest": config.manifest,
        "rejected": scored.rejected,
        "how": HOW,
        "seconds": round(seconds, 2),
        "version": __version__,
    }


def _html(summary: dict[str, Any], scored: Scored) -> str:
    results, trials = summary["results"], summary["trials"]
    parts = []
    if scored.curve is not None and scored.trials.label is not None:
        rows = [[metric.label, metric.format(results[metric.key])] for metric in METRICS]
        parts += [report.table(["measure", "value"], rows)]
        parts += [
            report.figures(
                plots.det({summary["model"]["name"]: scored.curve}),
                plots.histogram(scored.scores, scored.trials.label[scored.kept], results["eer_threshold"]),
            )
        ]
    else:
        parts += [report.note("No trials of both classes with labels: scores only.")]
    parts += [report.heading("How these numbers came about"), report.note(summary["how"])]
    parts += [report.heading("Trials"), report.facts({**trials, "manifest": summary["manifest"]})]
    parts += [report.heading("Model"), report.facts({k: v for k, v in summary["model"].items() if v is not None})]
    if summary["rejected"]:
        listed = [[name, reason] for name, reason in summary["rejected"].items()]
        parts += [report.heading("Utterances that could not be used"), report.table(["utterance", "reason"], listed)]
    return report.page(f"spkd eval: {Path(trials['file']).name}", *parts)
