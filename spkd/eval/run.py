"""`spkd eval`: score a trial list with one model."""

from __future__ import annotations

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
from spkd.eval.trials import Trials
from spkd.files import writable_folder, write_bytes, write_json
from spkd.manifest import Manifest
from spkd.teachers import Teacher

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
        SpkdError: a trial names an utterance that the manifest lacks, none can be scored, or `out` cannot be written.
    """
    out = writable_folder(config.out)
    started = time.time()
    scored = score(config, model, manifest, trials)
    lines = (
        f"{trials.enrolment[i]} {trials.test[i]} {s:.6f}\n" for i, s in zip(scored.kept, scored.scores, strict=True)
    )
    write_bytes(out / "scores.txt", "".join(lines).encode())
    summary = summarise(config, model, scored, time.time() - started)
    write_json(out / "report.json", summary)
    write_bytes(out / "report.html", _html(summary, scored).encode())
    return summary


def score(config: EvalConfig, model: Teacher, manifest: Manifest, trials: Trials) -> Scored:
    """Cosine scores of every trial whose two utterances can be used."""
    wanted = trials.utterances
    unknown = [name for name in wanted if name not in manifest.index_of]
    if unknown:
        where = next(
            n for n, e, t in zip(trials.line, trials.enrolment, trials.test, strict=True) if unknown[0] in (e, t)
        )
        raise SpkdError(
            f"{trials.source}:{where}: utterance {unknown[0]!r} is not in {manifest.source} "
            f"({len(unknown)} such of {len(wanted)}){did_you_mean(unknown[0], list(manifest.index_of)[:10_000])}"
        )
    part = Manifest(tuple(manifest[manifest.index_of[name]] for name in wanted), manifest.source)
    embeddings, rejected = embed(model, part, config)
    if not embeddings:
        raise SpkdError(
            f"{trials.source}: none of its {len(wanted)} utterances can be used ({next(iter(rejected.values()))})"
        )
    place = {name: i for i, name in enumerate(embeddings)}
    matrix = np.stack(list(embeddings.values()))
    kept = np.array(
        [i for i, pair in enumerate(zip(trials.enrolment, trials.test, strict=True)) if all(u in place for u in pair)],
        int,
    )
    left = matrix[[place[trials.enrolment[i]] for i in kept]]
    right = matrix[[place[trials.test[i]] for i in kept]]
    scores = np.einsum("nd,nd->n", left, right)
    at = None
    if trials.label is not None:
        try:
            at = curve(scores, trials.label[kept])
        except ValueError as error:
            raise SpkdError(f"{trials.source}: {error}") from error
    return Scored(trials, kept, scores, rejected, at)


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
        parts += [report.note("The trial list has no labels: scores only.")]
    parts += [report.heading("How these numbers came about"), report.note(summary["how"])]
    parts += [report.heading("Trials"), report.facts({**trials, "manifest": summary["manifest"]})]
    parts += [report.heading("Model"), report.facts({k: v for k, v in summary["model"].items() if v is not None})]
    if summary["rejected"]:
        listed = [[name, reason] for name, reason in summary["rejected"].items()]
        parts += [report.heading("Utterances that could not be used"), report.table(["utterance", "reason"], listed)]
    return report.page(f"spkd eval: {Path(trials['file']).name}", *parts)
