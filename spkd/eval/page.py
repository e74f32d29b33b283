"""The HTML report of one evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from spkd.cache.describe import format_bytes
from spkd.eval import plots
from spkd.eval.metrics import Curve
from spkd.eval.score import Scored
from spkd.pages import figures, html


def evaluation(summary: dict[str, Any], at: Curve | None, scores: np.ndarray, scored: Scored, audio: bool) -> str:
    """The page of report.json's tree.

    Args:
        at: the curve; None without error rates. scores: (N,) of the trials.
        audio: whether the worst trials can be played.
    """
    trials, labels = summary["trials"], scored.trials.label
    name = " / ".join(model["name"] for model in summary["models"]) or "scores"
    parts = []
    if at is not None and labels is not None:
        parts += [results(summary)]
        drawn = plots.histogram(scores, labels, summary["results"]["eer_threshold"])
        parts += [html.figures(plots.det({name: at}), drawn)]
        parts += [_breakdown(column, groups) for column, groups in summary["breakdown"].items()]
        parts += [_worst(summary["worst"], scored, audio)]
    else:
        parts += [html.note("No trials of both kinds with labels: scores only.")]
    parts += [html.heading("How these numbers came about"), html.sentences(summary["how"])]
    defined = [f"{m['label']}: {m['meaning']}." for m in summary["metrics"] if m["meaning"]] if at is not None else []
    parts += [html.sentences(defined)] if defined else []
    parts += [html.heading("Trials"), html.facts({**_shown(trials), "manifest": summary["manifest"] or "none"})]
    for model in summary["models"]:
        parts += [html.heading(f"Model {model['name']}"), html.facts(model_facts(model))]
    parts += training(summary["training"])
    if summary["calibration"] is not None:
        one = {name: value for name, value in summary["calibration"].items() if name != "speakers"}
        parts += [html.heading("Calibration"), html.facts(_shown(one))]
    if summary["rejected"]:
        listed = [[name, reason] for name, reason in summary["rejected"].items()]
        parts += [
            html.heading("Utterances that could not be used"),
            html.table(["utterance", "reason"], listed, words=(0, 1)),
        ]
    parts += [html.note(f"spkd {summary['version']}, {summary['seconds']:g} s")]
    return html.page(f"{name} on {Path(trials['file']).name}", *parts)


def results(summary: dict[str, Any]) -> str:
    """Every metric with its interval."""
    rows = []
    for metric in summary["metrics"]:
        value = format_value(summary["results"][metric["key"]], metric)
        rows.append([metric["label"], value, interval(summary, metric)])
    return html.table(["", "value", "95 % interval" if summary["intervals"] else ""], rows)


def format_value(value: float, metric: dict[str, Any]) -> str:
    return f"{value:.{metric['decimals']}f}{metric['unit']}"


def interval(summary: dict[str, Any], metric: dict[str, Any]) -> str:
    """The confidence interval of a metric; "" where it has none."""
    limits = summary["intervals"].get(metric["key"])
    return "" if limits is None else " to ".join(f"{value:.{metric['decimals']}f}" for value in limits)


def model_facts(model: dict[str, Any]) -> dict[str, object]:
    """Size, speed and card of a model, for people."""
    shown: dict[str, object] = {}
    if "parameters" in model:
        shown["parameters"] = f"{model['parameters']:,}"
    if "bytes" in model:
        shown["weights"] = format_bytes(model["bytes"])
    if "macs_per_second" in model:
        shown["multiply-accumulates"] = (
            f"{model['macs_per_second'] / 1e6:,.0f} M per second of speech, features not counted"
        )
    if "real_time_factor" in model:
        factor = model["real_time_factor"]
        shown["time"] = f"{factor:g} of the audio's on one CPU thread, {1 / factor:,.0f} times real time"
    known = ("name", "parameters", "bytes", "macs_per_second", "real_time_factor")
    return shown | _shown({key: value for key, value in model.items() if key not in known})


def training(found: dict[str, Any] | None) -> list[str]:
    """How a student was trained, with its curves."""
    if found is None or not (found.get("settings") or found["curves"]):
        return []
    settings = found.get("settings", {})
    named = {
        "steps": found.get("steps"),
        "losses": ", ".join(settings.get("losses", {})),
        "batch size": settings.get("batch_size"),
        "teachers": ", ".join(settings.get("teacher_families", [])),
    }
    drawn = [figures.lines({name: points}, name) for name, points in found["curves"].items()]
    shown = {name: value for name, value in named.items() if value}
    return [html.heading("Training"), html.facts(shown), html.figures(*drawn)]


def _breakdown(column: str, groups: list[dict[str, Any]]) -> str:
    def percent(value: float | None) -> str:
        return "" if value is None else f"{value:.2f} %"

    rows = [
        [
            group["name"],
            f"{group['targets']:,}",
            f"{group['non_targets']:,}",
            percent(group["eer_percent"]),
            percent(group["miss_percent"]),
            percent(group["false_alarm_percent"]),
        ]
        for group in groups
    ]
    header = ["", "target", "non-target", "EER", "miss", "false alarm"]
    text = "EER of these trials alone; miss and false alarm at the threshold of the EER of all trials."
    return html.heading(f"By {column}") + html.table(header, rows) + html.note(text)


def _worst(worst: dict[str, list[dict[str, Any]]], scored: Scored, audio: bool) -> str:
    parts, kinds = [], (("targets", "Target trials of the lowest"), ("non_targets", "Non-target trials of the highest"))
    for kind, text in kinds:
        rows = []
        for trial in worst[kind]:
            row: list[object] = [trial["enrolment"], trial["test"], f"{trial['score']:.4f}", str(trial["line"])]
            if audio and scored.people is not None:
                row.append(html.clip(scored.people.enrolment[trial["enrolment"]][0]))
                row.append(html.clip(scored.people.test[trial["test"]]))
            rows.append(row)
        header = ["enrolment", "test", "score", "line"] + (
            ["enrolment audio", "test audio"] if audio and scored.people is not None else []
        )
        if rows:
            parts.append(html.table(header, rows, f"{text} scores", words=(0, 1, 4, 5)))
    return html.heading("Worst trials") + "".join(parts) if parts else ""


def _shown(tree: dict[str, Any]) -> dict[str, object]:
    """Facts without what is not known, numbers with separators."""
    return {
        name.replace("_", " "): f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
        for name, value in tree.items()
        if value is not None and value != ()
    }
