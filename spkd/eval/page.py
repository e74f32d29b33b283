"""HTML report of one evaluation."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape

import numpy as np
import soundfile

from spkd.corpus.audio import SAMPLE_RATE, AudioError, decode
from spkd.corpus.manifest import Utterance
from spkd.eval import plots
from spkd.eval.breakdown import Group
from spkd.eval.metrics import Curve
from spkd.eval.report import ModelSummary, Report, WorstTrial
from spkd.eval.score import Scored
from spkd.eval.training import TrainingSummary
from spkd.files.text import format_bytes
from spkd.pages import figures, html

CLIP_SECONDS = 20.0  # length of the clip of an utterance in a page (s)


def evaluation(report: Report, errors: Curve | None, scores: np.ndarray, scored: Scored, audio: bool) -> str:
    """Page of a report.

    Args:
        errors: error rates at all thresholds; None without error rates.
        scores: (N,) scores of the trials.
        audio: whether the page can play the worst trials.
    """
    labels, name = scored.trials.label, " / ".join(model.name for model in report.models) or "scores"
    parts = [html.sentences(report.notes)] if report.notes else []
    if errors is not None and labels is not None:
        drawn = plots.histogram(scores, labels, report.results["eer_threshold"])
        parts += [results(report), html.figures(plots.det({name: errors}), drawn)]
        parts += [_breakdown(column, groups) for column, groups in report.breakdown.items()]
        parts += [_worst(report, scored, audio)]
    else:
        parts += [html.note("No trials of both kinds with labels: scores only.")]
    parts += [html.heading("How these numbers came about"), html.sentences((*report.backend, *report.how))]
    if defined := [f"{m.label}: {m.meaning}." for m in report.metrics if m.meaning and errors is not None]:
        parts += [html.sentences(defined)]
    listed = _shown(asdict(report.trials) | {"manifest": report.manifest or "none"})
    parts += [html.heading("Trials"), html.facts(listed)]
    for model in report.models:
        parts += [html.heading(f"Model {model.name}"), html.facts(model_facts(model))]
    parts += training(report.training)
    if report.calibration is not None:
        facts = {name: value for name, value in asdict(report.calibration).items() if name != "speakers"}
        parts += [html.heading("Calibration"), html.facts(_shown(facts))]
    if report.rejected:
        rows = [[name, reason] for name, reason in report.rejected.items()]
        parts += [html.heading("Utterances that could not be used")]
        parts += [html.table(["utterance", "reason"], rows, words=(0, 1))]
    parts += [html.note(f"spkd {report.version}, {report.seconds:g} s")]
    return html.page(f"{name} on {report.trials.name}", *parts)


def results(report: Report) -> str:
    """Table of every metric with its interval."""
    rows = [[m.label, m.format(report.results[m.key]), report.interval(m)] for m in report.metrics]
    return html.table(["", "value", "95 % interval" if report.intervals else ""], rows)


def model_facts(model: ModelSummary) -> dict[str, object]:
    """Size, speed and card of a model, formatted for people."""
    size, shown = model.efficiency, dict[str, object]()
    if size.parameters is not None:
        shown["parameters"] = f"{size.parameters:,}"
    if size.embedding_size is not None:
        shown["embedding"] = f"{size.embedding_size:,} numbers"
    if size.bytes is not None:
        shown["weights"] = format_bytes(size.bytes)
    if size.macs_per_second is not None:
        shown["multiply-accumulates"] = (
            f"{size.macs_per_second / 1e6:,.0f} M per second of speech, features not counted"
        )
    if (factor := size.real_time_factor) is not None:
        shown["time"] = f"{factor:g} of the audio's on one CPU thread, {1 / factor:,.0f} times real time"
    return shown | _shown(model.card.to_json())


def training(summary: TrainingSummary | None) -> list[str]:
    """Training of a student, with its curves."""
    if summary is None or not (summary.settings or summary.curves):
        return []
    facts = {
        "steps": summary.steps,
        "losses": ", ".join(summary.losses),
        "batch size": summary.batch_size,
        "teachers": ", ".join(summary.teachers),
    }
    drawn = [figures.lines({name: points}, name) for name, points in summary.curves.items()]
    shown = {name: value for name, value in facts.items() if value}
    return [html.heading("Training"), html.facts(shown), html.figures(*drawn)]


def _breakdown(column: str, groups: Sequence[Group]) -> str:
    def percent(value: float | None) -> str:
        return "" if value is None else f"{value:.2f} %"

    rows = [
        [
            group.name,
            f"{group.targets:,}",
            f"{group.non_targets:,}",
            percent(group.eer_percent),
            percent(group.miss_percent),
            percent(group.false_alarm_percent),
        ]
        for group in groups
    ]
    header = ["", "target", "non-target", "EER", "miss", "false alarm"]
    text = "EER of these trials alone; miss and false alarm at the threshold of the EER of all trials."
    return html.heading(f"By {column}") + html.table(header, rows) + html.note(text)


def _worst(report: Report, scored: Scored, audio: bool) -> str:
    people = scored.people if audio else None
    header = ["enrolment", "test", "score", "line"] + ([] if people is None else ["enrolment audio", "test audio"])

    def row(trial: WorstTrial) -> list[object]:
        cells: list[object] = [trial.enrolment, trial.test, f"{trial.score:.4g}", str(trial.line)]
        if people is not None:
            cells += [clip(people.enrolment[trial.enrolment][0]), clip(people.test[trial.test])]
        return cells

    kinds = (
        (report.worst.targets, "Target trials of the lowest scores"),
        (report.worst.non_targets, "Non-target trials of the highest scores"),
    )
    parts = [
        html.table(header, [row(t) for t in trials], title, words=(0, 1, 4, 5)) for trials, title in kinds if trials
    ]
    return html.heading("Worst trials") + "".join(parts) if parts else ""


def clip(utterance: Utterance) -> html.Html:
    """Player of the utterance's first 20 s, with the sound in the page; the reason where it cannot be loaded."""
    try:
        seconds = min(utterance.whole or CLIP_SECONDS, CLIP_SECONDS)
        wave = decode(utterance.path, utterance.start, seconds, utterance.channel).wave
    except AudioError as error:
        return html.Html(escape(error.reason))
    sound = io.BytesIO()
    soundfile.write(sound, wave, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    data = base64.b64encode(sound.getvalue()).decode()
    return html.Html(f'<audio controls preload="none" src="data:audio/flac;base64,{data}"></audio>')


def _shown(tree: Mapping[str, object]) -> dict[str, object]:
    """Facts formatted for people: unknown ones are left out, numbers have separators."""
    return {
        name.replace("_", " "): f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
        for name, value in tree.items()
        if value is not None and value != ()
    }
