"""Draws docs/spkd.svg, the picture of the README: from audio to scores, and the EER of teacher and students.

python docs/figure.py    (figures come from benchmarks/results/papers.json)
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

HERE = Path(__file__).parent
RESULTS = HERE.parent / "benchmarks" / "results" / "papers.json"
INK, TEACHER, CACHE, STUDENT = "#222222", "#f2c6a0", "#cfe0f3", "#cfe8cf"


def box(axes: Axes, x: float, y: float, width: float, title: str, text: str, colour: str) -> None:
    shape = FancyBboxPatch((x, y), width, 1.5, boxstyle="round,pad=0.02,rounding_size=0.12", fc=colour, ec=INK, lw=0.8)
    axes.add_patch(shape)
    axes.text(x + width / 2, y + 1.18, title, ha="center", va="center", weight="bold", fontsize=10, color=INK)
    axes.text(x + width / 2, y + 0.52, text, ha="center", va="center", fontsize=8, color=INK, linespacing=1.35)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], label: str = "") -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, lw=1, color=INK))
    middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)
    axes.text(middle[0], middle[1] + 0.12, label, ha="center", fontsize=7.5, family="monospace", color=INK)


def way(axes: Axes) -> None:
    """Audio, teacher, cache, students, scores."""
    box(axes, 0.0, 1.0, 2.2, "audio", "manifest\nviews: crops, speeds,\nnoise (reproducible)", "white")
    box(axes, 3.1, 1.0, 2.2, "heavy teacher", "WavLM, d-vector,\nany spkd model\nruns once", TEACHER)
    box(axes, 6.2, 1.0, 2.4, "shared cache", "frames, stats,\nembeddings, fbank\nZarr v3, mapped", CACHE)
    for y, name in ((2.35, "colleague 1"), (1.0, "colleague 2"), (-0.35, "colleague 30")):
        scaled = FancyBboxPatch((10.1, y + 0.25), 2.2, 0.95, boxstyle="round,pad=0.02", fc=STUDENT, ec=INK, lw=0.8)
        axes.add_patch(scaled)
        axes.text(11.2, y + 0.92, "small student", ha="center", weight="bold", fontsize=9, color=INK)
        axes.text(11.2, y + 0.52, name, ha="center", fontsize=8, color=INK)
        arrow(axes, (8.65, 1.75), (10.05, y + 0.72))
    box(axes, 13.2, 1.0, 1.9, "scores", "EER, minDCF,\nDET, report", "white")
    arrow(axes, (2.25, 1.75), (3.05, 1.75))
    arrow(axes, (5.35, 1.75), (6.15, 1.75))
    arrow(axes, (12.35, 1.75), (13.15, 1.75))
    for x, text in ((5.7, "spkd extract"), (8.6, "spkd train"), (13.4, "spkd eval")):
        axes.text(x, 3.25, text, ha="center", fontsize=9, family="monospace", color=INK)
    axes.set(xlim=(-0.1, 15.2), ylim=(-0.4, 3.7))
    axes.set_axis_off()


def measured(axes: Axes, results: dict) -> None:
    """EER of teacher and students on three lists of unseen speakers."""
    lists = {"test_other": "test-other", "test_short": "test-short\n(3.7 s)", "speechocean": "speechocean"}
    methods = results["methods"]
    rows = (("untaught_4800", "student, no teacher", "#bdbdbd"), ("best_4800", "student, distilled", STUDENT))
    for i, name in enumerate(lists):
        teacher = results["teacher"][name]
        axes.bar(i - 0.28, teacher, 0.26, color=TEACHER, ec=INK, lw=0.6, label="teacher" if i == 0 else None)
        axes.text(i - 0.28, teacher + 0.08, f"{teacher:.2f}", ha="center", fontsize=8)
        for j, (method, label, colour) in enumerate(rows):
            row = methods[method][name]["eer_percent"]
            x = i + 0.28 * j
            axes.bar(x, row["mean"], 0.26, yerr=row["sd"], color=colour, ec=INK, lw=0.6, capsize=2,
                     error_kw={"lw": 0.8}, label=label if i == 0 else None)  # fmt: skip
            axes.text(x, row["mean"] + row["sd"] + 0.1, f"{row['mean']:.2f}", ha="center", fontsize=8)
    best = methods["best_4800"]
    axes.set_xticks(range(len(lists)), list(lists.values()))
    axes.set_ylabel("EER (%)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    axes.set_title(
        f"teacher 1.42 M parameters, student {best['parameters'] / 1e6:.2f} M, {best['seeds']} seeds", fontsize=9
    )


def main() -> None:
    results = json.loads(RESULTS.read_text())
    figure = Figure(figsize=(14, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2.6, 1))
    way(left)
    measured(right, results)
    with matplotlib.rc_context({"svg.hashsalt": "spkd"}):
        figure.savefig(HERE / "spkd.svg", metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    main()
