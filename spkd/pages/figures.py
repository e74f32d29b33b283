"""Figures as SVG text, for self-contained pages."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib

MOST_POINTS = 400  # of a curve


def curves(path: Path) -> dict[str, list[list[float]]]:
    """name -> [[step, value], ...] of a log.jsonl, at most `MOST_POINTS` points each; lines that a kill left torn are
    skipped."""
    found: dict[str, list[list[float]]] = {}
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            for name, value in entry.items():
                if name != "step" and isinstance(value, int | float):
                    found.setdefault(name, []).append([entry["step"], value])
    return {name: points[:: max(len(points) // MOST_POINTS, 1)] for name, points in found.items()}


def lines(curves: Mapping[str, Sequence[Sequence[float]]], name: str) -> str:
    """Values by training step: label -> [[step, value], ...]."""

    def draw(axes: matplotlib.axes.Axes) -> None:
        for label, points in curves.items():
            axes.plot([p[0] for p in points], [p[1] for p in points], label=plain(label), linewidth=1.2)
        axes.set(xlabel="step", ylabel=plain(name))
        axes.grid(color="0.92")
        if len(curves) > 1:
            axes.legend(frameon=False, fontsize=9)

    return drawn((5.2, 2.8), draw)


def plain(label: str) -> str:
    """A label in which matplotlib finds no formula."""
    return label.replace("$", r"\$")


def drawn(size: tuple[float, float], draw: Callable[[matplotlib.axes.Axes], None]) -> str:
    """A figure of one set of axes, of a size in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    draw(figure.add_subplot())
    return svg(figure)


def svg(figure: matplotlib.figure.Figure) -> str:
    """A figure as an <svg> element that can stand in a page."""
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "spkd"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :]
