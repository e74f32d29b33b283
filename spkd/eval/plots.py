"""Figures of scored trials."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

from spkd.eval.metrics import Curve, eer
from spkd.pages.figures import FARTHEST, drawn, plain

if TYPE_CHECKING:
    import matplotlib

TICKS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
RANGE = (0.0005, 0.5)
FINEST = 0.002  # distance (normal deviates) of the drawn points of a DET curve: less than the width of its line
BINS = 60


def det(curves: Mapping[str, Curve]) -> str:
    """Detection-error trade-off (Martin et al., Eurospeech 1997): both axes on the normal deviate scale."""
    deviate = np.vectorize(NormalDist().inv_cdf)

    def draw(axes: matplotlib.axes.Axes) -> None:
        for label, errors in curves.items():
            x, y = _thinned(errors, deviate)
            (line,) = axes.plot(x, y, drawstyle="steps-post", label=plain(label))
            rate = float(np.clip(eer(errors)[0], *RANGE))
            axes.plot(deviate(rate), deviate(rate), "o", color=line.get_color(), markersize=5)
        edge = deviate(np.array(RANGE))
        axes.plot(edge, edge, color="0.8", linewidth=0.8, zorder=0)
        names = [f"{100 * t:g}" for t in TICKS]
        axes.set(xlim=edge, ylim=edge, xlabel="false alarm (%)", ylabel="miss (%)")
        axes.set_xticks(deviate(TICKS), names)
        axes.set_yticks(deviate(TICKS), names)
        axes.grid(color="0.92")
        axes.legend(frameon=False, fontsize=9)

    return drawn((5.2, 5.0), draw)


def _thinned(errors: Curve, deviate: Callable) -> tuple[np.ndarray, np.ndarray]:
    """Points of a curve that differ visibly in the figure."""
    within = np.array([1e-6, 1 - 1e-6])
    low, high = deviate(within)
    grid = np.linspace(low, high, int((high - low) / FINEST))
    rates = np.array([NormalDist().cdf(value) for value in grid])
    # From each kept point to the next, at least one of the rates moves by a step of the grid.
    steps = np.searchsorted(rates, errors.false_alarm) * (len(grid) + 1) - np.searchsorted(rates, errors.miss)
    kept = np.flatnonzero(np.diff(steps, prepend=steps[0] - 1, append=steps[-1] + 1)[:-1])
    kept = np.unique(np.concatenate([[0], np.maximum(kept - 1, 0), kept, [len(steps) - 1]]))
    return deviate(np.clip(errors.false_alarm[kept], *within)), deviate(np.clip(errors.miss[kept], *within))


def histogram(scores: np.ndarray, labels: np.ndarray, threshold: float) -> str:
    """Score densities of target and non-target trials, with the EER threshold."""
    scores, threshold = np.clip(scores, -FARTHEST, FARTHEST), float(np.clip(threshold, -FARTHEST, FARTHEST))
    edges = np.linspace(scores.min(), scores.max(), BINS + 1)
    counted = [(np.histogram(scores[labels == k], edges)[0], name) for k, name in ((1, "target"), (0, "non-target"))]

    def draw(axes: matplotlib.axes.Axes) -> None:
        for counts, name in counted:
            density = counts / max(counts.sum(), 1) / max(edges[1] - edges[0], 1e-12)
            axes.stairs(density, edges, fill=True, alpha=0.6, label=name)
        axes.axvline(threshold, color="#4d4d4d", linewidth=1, linestyle="--", label="EER threshold")
        axes.set(xlabel="score", ylabel="density")
        axes.legend(frameon=False, fontsize=9)

    return drawn((5.2, 3.4), draw)
