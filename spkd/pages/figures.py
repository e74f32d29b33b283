"""Figures as SVG, for self-contained HTML pages."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

# Imported from the root folder, since matplotlib obeys a file matplotlibrc in the current one, which may start LaTeX. A
# Python interpreter also looks for modules in the current folder, so it must be one without any.
with contextlib.chdir(Path(__file__).anchor):
    import matplotlib

# Room on the left, below, on the right and above (inches), also for the widest ticks; where matplotlib is to find how
# much is needed, it takes longer for that than for the drawing.
MARGINS = (0.95, 0.5, 0.12, 0.25)
# Colours of matplotlib's that are those of the page (`html.STYLE`), light or dark: axes, their grid, lines that help.
OF_PAGE = {"#000000": "currentColor", "#ebebeb": "var(--line)", "#cccccc": "var(--line)", "#4d4d4d": "var(--soft)"}
FARTHEST = 1e30  # largest value that is drawn; figures compute differences and squares of values, also in float32


def lines(curves: Mapping[str, Sequence[Sequence[float]]], name: str) -> str:
    """Figure of curves over training steps, as an <svg> element.

    Args:
        curves: label of each curve -> its points [[step, value], ...].
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
    """
    from matplotlib.figure import Figure

    (width, height), (left, bottom, right, top) = size, MARGINS
    place = (left / width, bottom / height, (width - left - right) / width, (height - bottom - top) / height)
    figure = Figure(figsize=size)
    draw(figure.add_axes(place))
    return svg(figure)


def svg(figure: matplotlib.figure.Figure) -> str:
    """A figure as an <svg> element for an HTML page."""
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "spkd"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = out.getvalue()
    return re.sub(r"(?<=: )#[0-9a-f]{6}", lambda found: OF_PAGE.get(found[0], found[0]), text[text.index("<svg") :])
