"""`spkd report`: several evaluations on one page, and a table for papers."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from spkd.errors import SpkdError, UsageError
from spkd.eval import plots
from spkd.eval.bootstrap import Difference, SpeakerTrials, compare
from spkd.eval.metrics import METRICS, Curve, MetricDescription, curve
from spkd.eval.report import MODELS, SCORES, SPEAKERS, Report, names_of_lists
from spkd.eval.score import subset
from spkd.eval.speakers import numbered
from spkd.eval.trials import Trials, in_order_of, read_scores
from spkd.files import digest
from spkd.files.atomic import check_holds_no_other, check_replaces_none, writable_folder, write_bytes, write_json
from spkd.files.text import format_bytes, numbered_lines, short_names
from spkd.pages import figures, html
from spkd.version import __version__

NAME = "comparison"
SUFFIXES = ("json", "md", "csv", "tex", "html")  # of the files that are written, in this order
KEY = "spkd_comparison"  # of comparison.json


@dataclass(frozen=True)
class System:
    """One evaluation: a system on a list of trials."""

    label: str
    folder: Path
    report: Report

    @property
    def trials(self) -> str:
        """Identity of the list: its digest."""
        return self.report.trials.sha256

    def file(self, name: str) -> Path:
        """Path of a file of the evaluation. Raises SpkdError where it is missing, or is not that of the report."""
        path = self.folder / name
        if not path.is_file():
            raise SpkdError(f"{path}: missing; evaluate again")
        if digest.of_file(path) != self.report.files.get(name):
            raise SpkdError(f"{path}: damaged (it is not the file that the report was written with); evaluate again")
        return path

    @cached_property
    def scores(self) -> tuple[Trials, np.ndarray]:
        """Labelled trials, and their scores (N,). Raises SpkdError where labels of both kinds are lacking."""
        trials, scores = read_scores(self.file(SCORES))
        if not trials.has_both_kinds:
            raise SpkdError(f"{self.folder}: its scores have no labels of both kinds")
        return trials, scores

    @cached_property
    def curve(self) -> Curve:
        trials, scores = self.scores
        assert trials.label is not None
        return curve(scores, trials.label)


def load_systems(folders: Sequence[str]) -> list[System]:
    """Evaluations in folders.

    A label stands for one system, on several lists maybe. Folders of one name that hold several systems, or scores from
    files, of which nobody knows the system, are distinguished by the folders before it.

    Args:
        folders: folders; `LABEL=FOLDER` gives one a name.
    Raises:
        UsageError: a folder without an evaluation, or without error rates, or one label for several systems.
        SpkdError: a damaged report.
    """
    systems, unnamed = [], dict[int, str]()
    for place, (label, typed) in enumerate(map(_label_and_folder, folders)):
        folder = os.path.normpath(typed)
        report = Report.read(folder)
        if not report.results:
            raise UsageError(f"{folder}: has no error rates (a list without labels, or of one kind)")
        systems.append(System(label or Path(folder).name or folder, Path(folder), report))
        if not label:
            unnamed[place] = folder
    several, short = _labels_of_several(systems, _identity), short_names(unnamed.values())
    systems = [
        replace(s, label=short[unnamed[n]]) if n in unnamed and s.label in several else s for n, s in enumerate(systems)
    ]
    # Whoever gives several evaluations one name says that they are of one system, unless their weights differ.
    if several := _labels_of_several(systems, lambda system: system.report.weights):
        label, shared = next(iter(several.items()))
        raise UsageError(
            f"{label}: a name of several systems ({', '.join(str(s.folder) for s in shared)}); give each its own "
            "name (NAME=FOLDER)"
        )
    return systems


def _label_and_folder(item: str) -> tuple[str, str]:
    """The parts of `LABEL=FOLDER`, of which both may have equals signs; no label where all of it is a folder."""
    if "://" in item:  # an address, for the error that names it without its query
        return "", item
    splits = [("", item), *((item[:i], item[i + 1 :]) for i, sign in enumerate(item) if sign == "=")]
    return next((split for split in splits if Path(split[1] or item).is_dir()), splits[-1])


def _identity(system: System) -> Hashable:
    """What evaluations of one system share: weights and back-end. Scores from files are of a system each."""
    return (system.report.weights, system.report.backend) if system.report.weights else str(system.folder)


def _labels_of_several(systems: Sequence[System], identity: Callable[[System], Hashable]) -> dict[str, list[System]]:
    """Labels that are not of one system: of several identities, or twice on one list."""
    by_label: dict[str, list[System]] = {}
    for system in systems:
        by_label.setdefault(system.label, []).append(system)
    return {
        label: some
        for label, some in by_label.items()
        if len({s.trials for s in some}) < len(some) or len(set(map(identity, some))) > 1
    }


Differences = dict[str, dict[str, Difference]]


def compare_systems(systems: Sequence[System], out: str | Path, resamplings: int, seed: int) -> Differences:
    """Write comparison.html, .md, .csv, .tex and .json into `out`.

    Returns:
        Difference of each system from the first one, by label, by the name of each list.
    """
    check_holds_no_other(out, "a comparison")
    check_replaces_none(out, [f"{NAME}.{suffix}" for suffix in SUFFIXES], {f"{NAME}.json": KEY})
    folder = writable_folder(out)
    lists = names_of_lists([system.report for system in systems])
    differences = {
        name: _differences([s for s in systems if s.trials == sha], resamplings, seed) for sha, name in lists.items()
    }
    header, rows = paper_table(systems)
    tree = {
        KEY: 1,
        "systems": [
            {
                "label": s.label,
                "trials": lists[s.trials],
                "results": s.report.results,
                "intervals": s.report.intervals,
            }
            for s in systems
        ],
        "differences": {name: {k: asdict(v) for k, v in by_label.items()} for name, by_label in differences.items()},
        "version": __version__,
    }
    write_json(folder / f"{NAME}.json", tree)
    write_bytes(folder / f"{NAME}.md", markdown(header, rows).encode())
    write_bytes(folder / f"{NAME}.csv", separated(header, rows).encode())
    write_bytes(folder / f"{NAME}.tex", latex(header, rows).encode())
    write_bytes(folder / f"{NAME}.html", _html(systems, lists, differences, header, rows).encode())
    return differences


def _differences(systems: Sequence[System], resamplings: int, seed: int) -> dict[str, Difference]:
    """EER of each system minus that of the first on the same list, over the trials that all of them scored."""
    if len(systems) < 2 or not resamplings:
        return {}
    eer, (first, _) = METRICS[0], systems[0].scores
    shared = first
    for system in systems[1:]:
        shared = _common(shared, system.scores[0])
    # With an enrolment map, the name of a model may be that of an utterance of somebody else.
    names = [MODELS if MODELS in systems[0].report.files else SPEAKERS, SPEAKERS]
    enrolment, test = (_speakers(systems[0].file(name)) for name in names)
    for name, speaker, side in zip(names, (enrolment, test), (shared.enrolment, shared.test), strict=True):
        if missing := [shared.names[i] for i in np.unique(side) if shared.names[i] not in speaker]:
            raise SpkdError(f"{systems[0].folder / name}: no speaker of {missing[0]!r}")
    assert shared.label is not None
    trials = SpeakerTrials(*numbered(shared, enrolment, test), shared.label)
    base = in_order_of(shared, *systems[0].scores)
    try:
        return {
            system.label: compare(in_order_of(shared, *system.scores), base, trials, eer, resamplings, seed)
            for system in systems[1:]
        }
    except ValueError as error:
        raise SpkdError(f"{systems[0].report.trials.file}: {error}") from error


def in_words(difference: Difference) -> str:
    """Difference of EERs (%) with its interval, for a printed line."""
    limits = f"{difference.low:+.3f} to {difference.high:+.3f}"
    return f"{difference.value:+.3f} % ({limits}), p {p_value(difference.p)}"


def p_value(p: float) -> str:
    """A p-value as a relation, such as `= 0.012` or `< 0.001`."""
    return f"= {p:.3f}" if p >= 0.001 else "< 0.001"


def _common(trials: Trials, other: Trials) -> Trials:
    """Trials that two lists share."""
    if trials.names == other.names and len(trials) == len(other):
        return trials
    kept = np.flatnonzero(np.isin(trials.keys, trials.keys_of(other)))
    if not len(kept):
        raise SpkdError(f"{trials.source} and {other.source} have no trial in common")
    return subset(trials, kept)


def _speakers(path: Path) -> dict[str, str]:
    speakers = {}
    for number, line in numbered_lines(path, comments=False):
        name, _, speaker = line.rpartition("\t" if "\t" in line else " ")
        if not name:
            raise SpkdError(f"{path}:{number}: {line[:100]!r} is not `name speaker`")
        speakers[name] = speaker
    return speakers


Row = list[str]
SIZE = ("system", "parameters", "embedding", "weights", "MACs/s", "real-time factor")


def paper_table(systems: Sequence[System]) -> tuple[Row, list[Row]]:
    """Table with one row for each system: its size, its speed, and the headline metrics of each list with intervals."""
    columns = [
        (sha, metric, f"{metric.title}, {name}")
        for sha, name in names_of_lists([system.report for system in systems]).items()
        for metric in _headline([system for system in systems if system.trials == sha])
    ]
    rows: dict[str, Row] = {}
    for system in systems:
        row = rows.setdefault(system.label, [system.label, *_size(system.report), *[""] * len(columns)])
        for place, (sha, metric, _) in enumerate(columns, len(SIZE)):
            if sha == system.trials and metric.key in system.report.results:
                value = metric.format(system.report.results[metric.key], with_unit=False)
                limits = system.report.interval(metric)
                row[place] = f"{value} ({limits})" if limits else value
    return [*SIZE, *(title for _, _, title in columns)], list(rows.values())


def _headline(systems: Sequence[System]) -> list[MetricDescription]:
    """Headline metrics of all the systems, whose evaluations may have other points."""
    return list({metric.key: metric for system in systems for metric in system.report.headline}.values())


def _size(report: Report) -> Row:
    if not report.models:
        return [""] * (len(SIZE) - 1)
    size = report.models[-1].efficiency
    return [
        "" if size.parameters is None else f"{size.parameters / 1e6:.2f} M",
        "" if size.embedding_size is None else f"{size.embedding_size:,}",
        "" if size.bytes is None else format_bytes(size.bytes),
        "" if size.macs_per_second is None else f"{size.macs_per_second / 1e6:,.0f} M",
        "" if size.real_time_factor is None else f"{size.real_time_factor:g}",
    ]


def markdown(header: Row, rows: Sequence[Row]) -> str:
    """Markdown table."""

    def line(cells: Row) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"

    return line(header) + f"|{'---|' * len(header)}\n" + "".join(map(line, rows))


def separated(header: Row, rows: Sequence[Row]) -> str:
    """CSV table. A cell that a spreadsheet would take as a formula gets an apostrophe in front."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerows(
        [f"'{cell}" if cell.startswith(("=", "+", "-", "@")) else cell for cell in row] for row in (header, *rows)
    )
    return out.getvalue()


TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"} | {
    c: f"\\{c}" for c in "&%$#_{}"
}


def latex(header: Row, rows: Sequence[Row]) -> str:
    """LaTeX table in the style of booktabs."""

    def line(cells: Row) -> str:
        return " & ".join("".join(TEX.get(c, c) for c in cell) for cell in cells) + r" \\" + "\n"

    body = "".join(map(line, rows))
    columns = "l" + "r" * (len(header) - 1)
    return (
        f"\\begin{{tabular}}{{{columns}}}\n\\toprule\n{line(header)}\\midrule\n{body}\\bottomrule\n\\end{{tabular}}\n"
    )


def _html(
    systems: Sequence[System],
    lists: Mapping[str, str],
    differences: Differences,
    header: Row,
    rows: Sequence[Row],
) -> str:
    sizes = [row[: len(SIZE)] for row in rows]
    known = [place for place in range(len(SIZE)) if any(size[place] for size in sizes)]
    parts = [html.table([SIZE[place] for place in known], [[size[place] for place in known] for size in sizes])]
    for sha, name in lists.items():
        some = [system for system in systems if system.trials == sha]
        parts += [html.heading(name), _results(some)]
        parts += [html.figures(plots.det({s.label: s.curve for s in some}))]
        if compared := differences[name]:
            listed = [
                [label, f"{d.value:+.3f}", f"{d.low:+.3f} to {d.high:+.3f}", p_value(d.p).removeprefix("= ")]
                for label, d in compared.items()
            ]
            parts += [
                html.table(["", f"EER less that of {some[0].label} (%)", "95 % interval", "p"], listed),
                html.note("Speakers are resampled for both systems together; p is two-sided."),
            ]
    parts += _training(systems)
    parts += [html.heading("How the scores came about")]
    for system in systems:
        parts += [html.note(f"{system.label}, {lists[system.trials]}: {' '.join(system.report.about)}")]
    for name, text in (("Markdown", markdown(header, rows)), ("LaTeX", latex(header, rows))):
        parts += [html.heading(f"The table in {name}"), html.code(text)]
    return html.page("Comparison of " + ", ".join(dict.fromkeys(s.label for s in systems)), *parts)


def _results(systems: Sequence[System]) -> str:
    """Headline metrics of one list, with their intervals."""
    metrics = _headline(systems)
    rows = []
    for system in systems:
        row: list[object] = [system.label]
        for metric in metrics:
            value = system.report.results.get(metric.key)
            row += ["" if value is None else metric.format(value, with_unit=False), system.report.interval(metric)]
        rows.append(row)
    header = ["system", *(cell for metric in metrics for cell in (metric.title, "95 % interval"))]
    return html.table(header, rows)


def _training(systems: Sequence[System]) -> list[str]:
    """Training curves, one figure for each value and one line for each student."""
    curves: dict[str, dict[str, tuple[tuple[int, float], ...]]] = {}
    for system in systems:
        for name, points in ({} if system.report.training is None else system.report.training.curves).items():
            same = curves.setdefault(name, {})
            if points not in same.values():  # one student may be there with several evaluations
                same[system.label] = points
    if not curves:
        return []
    return [html.heading("Training"), html.figures(*(figures.lines(some, name) for name, some in curves.items()))]
