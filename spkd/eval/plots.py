"""Figures as SVG text."""

from __future__ import annotations

import io
from statistics import NormalDist

import matplotlib
import numpy as np

from spkd.eval.metrics import Curve, eer

TICKS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
RANGE = (0.0005, 0.5)


def det(curves: dict[str, Curve]) -> str:
    """Detection-error trade-off (Martin et al., Eurospeech 1997): both axes on the normal deviate scale."""
    from matplotlib.figure import Figure

    deviate = np.vectorize(NormalDist().inv_cdf)
    figure = Figure(figsize=(5.2, 5.0), layout="constrained")
    axes = figure.add_subplot()
    for label, at in curves.items():
        x = deviate(np.clip(at.false_alarm, 1e-6, 1 - 1e-6))
        y = deviate(np.clip(at.miss, 1e-6, 1 - 1e-6))
        (line,) = axes.plot(x, y, drawstyle="steps-post", label=label.replace("$", r"\$"))
        rate = float(np.clip(eer(at)[0], *RANGE))
        axes.plot(deviate(rate), deviate(rate), "o", color=line.get_color(), markersize=5)
    edge = deviate(np.array(RANGE))
    axes.plot(edge, edge, color="0.8", linewidth=0.8, zorder=0)
    names = [f"{100 * t:g}" for t in TICKS]
    axes.set(
        xlim=edge,
        ylim=edge,
        xticks=deviate(TICKS),
        yticks=deviate(TICKS),
        xlabel="false alarm (%)",
        ylabel="miss (%)",
    )
    axes.set_xticklabels(names)
    axes.set_yticklabels(names)
    axes.grid(color="0.92")
    axes.legend(frameon=False)
    return svg(figure)


def histogram(scores: np.ndarray, labels: np.ndarray, threshold: float) -> str:
    """Score densities of target and non-target trials, with the EER threshold."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    axes = figure.add_subplot()
    bins = np.linspace(scores.min(), scores.max(), 61)
    for label, name in ((1, "target"), (0, "non-target")):
        axes.hist(scores[labels == label], bins.tolist(), density=True, alpha=0.6, label=name)
    axes.axvline(threshold, color="0.3", linewidth=1, linestyle="--", label="EER threshold")
    axes.set(xlabel="score", ylabel="density")
    axes.legend(frameon=False)
    return svg(figure)


def svg(figure: matplotlib.figure.Figure) -> str:
    """A figure as an <svg> element that can stand in a page."""
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "spkd"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :]
