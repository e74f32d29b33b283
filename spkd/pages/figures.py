"""Figures as SVG, for self-contained HTML pages."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence

import matplotlib

FARTHEST = 1e30  # largest value that is drawn; figures compute differences and squares of values, also in float32


def lines(curves: Mapping[str, Sequence[Sequence[float]]], name: str) -> str:
    """Figure of curves over training steps, as an <svg> element.

    Args:
        curves: label of each curve -> its points [[step, value], ...].
        name: name of the values, at the vertical axis.
    """

    def draw(axes: matplotlib.axes.Axes) -> None:
        for label, points in curves.items():
            values = [min(max(value, -FARTHEST), FARTHEST) for _, value in points]
            axes.plot([step for step, _ in points], values, label=plain(label), linewidth=1.2)
        axes.set(xlabel="step", ylabel=plain(name))
        axes.grid(color="0.92")
        if len(curves) > 1:
            axes.legend(frameon=False, fontsize=9)

    return drawn((5.2, 2.8), draw)


def plain(label: str) -> str:
    """A label that matplotlib does not read as a formula."""
    return label.replace("$", r"\$")


def drawn(size: tuple[float, float], draw: Callable[[matplotlib.axes.Axes], None]) -> str:
    """Figure with one set of axes, as an <svg> element.

    Args:
        size: width and height (inches).
        draw: function that draws on the axes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    draw(figure.add_subplot())
    return svg(figure)


def svg(figure: matplotlib.figure.Figure) -> str:
    """A figure as an <svg> element for an HTML page."""
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "spkd"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :]
