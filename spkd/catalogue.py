"""`spkd cache catalogue`: a page of the caches of a laboratory, and of the students trained from them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from spkd.cache.card import Card
from spkd.cache.describe import views_in_words
from spkd.cache.exchange.remote import ListedCache, find, folders_with
from spkd.cache.folder import VERIFIED
from spkd.errors import SpkdError
from spkd.eval.calibration import PLAIN
from spkd.eval.report import REPORT, Report, names_of_lists
from spkd.files.reading import parse_json
from spkd.files.remote_folder import RemoteFolder
from spkd.files.text import counted, format_bytes, short_names
from spkd.pages import html
from spkd.progress import log
from spkd.students.description import DESCRIPTION, Description

TITLE = "Teacher caches in"  # beginning of the title of the page
MOST = 1 << 28  # most bytes of a description or a report


@dataclass(frozen=True)
class Copies:
    """All copies of a cache, which have the same fingerprint."""

    card: Card
    caches: list[ListedCache]

    @property
    def size(self) -> str:
        """Size of the shards of a complete copy, in words."""
        sizes = [cache.bytes for cache in self.caches if cache.bytes is not None]
        return format_bytes(sizes[0]) if sizes else "not complete"


@dataclass
class Student:
    """A student in the catalogue.

    Attributes:
        evaluations: evaluations of its weights, at every size of its embedding.
    """

    url: str
    description: Description
    evaluations: list[Report] = field(default_factory=list)


def catalogue(root: str, more: Sequence[str]) -> tuple[str, int]:
    """Make the page of the caches below a folder or bucket.

    Args:
        more: further folders or buckets with students and evaluations.
    Returns:
        The page, and the number of caches that it lists.
    Raises:
        SpkdError: a place does not answer.
    """
    # Find caches, and the students trained from each.
    caches = list(find(root))
    trained: dict[str, list[Student]] = {}
    for student in _students([root, *more]):
        for fingerprint in student.description.training.facts.caches:
            trained.setdefault(fingerprint, []).append(student)
    # Group copies of the same cache.
    groups: dict[str, Copies] = {}
    for cache in caches:
        if cache.card is not None:
            groups.setdefault(cache.fingerprint, Copies(cache.card, [])).caches.append(cache)
    names = short_names([cache.url for copies in groups.values() for cache in copies.caches])
    # Write the page.
    parts = [_summary(groups, names, trained)] if groups else [html.note("No caches.")]
    for fingerprint, copies in groups.items():
        parts.append(_section(fingerprint, copies, names, trained.get(fingerprint, [])))
    if broken := [[cache.url, cache.error or ""] for cache in caches if cache.card is None]:
        parts += [html.heading("Not readable"), html.table(["cache", "reason"], broken, words=(0, 1))]
    return html.page(f"{TITLE} {RemoteFolder.of(root).shown}", *parts), len(caches) - len(broken)


def _summary(groups: dict[str, Copies], names: dict[str, str], trained: dict[str, list[Student]]) -> str:
    rows = []
    for fingerprint, copies in groups.items():
        card = copies.card
        rows.append(
            [
                html.link(f"#{_anchor(fingerprint)}", ", ".join(names[cache.url] for cache in copies.caches)),
                card.teacher.family,
                card.teacher.licence,
                f"{card.num_views:,}",
                f"{sum(part.hours for part in card.parts):,.1f}",
                copies.size,
                str(len(trained.get(fingerprint, []))),
            ]
        )
    header = ["cache", "teacher", "licence", "views", "hours", "size", "students"]
    return html.table(header, rows, words=(0, 1, 2))


def _anchor(fingerprint: str) -> str:
    return f"cache-{fingerprint[:12]}"


def _section(fingerprint: str, copies: Copies, names: dict[str, str], students: Sequence[Student]) -> str:
    card, teacher = copies.card, copies.card.teacher
    places = {f"place {number}" if number > 1 else "place": cache for number, cache in enumerate(copies.caches, 1)}
    weights = f", weights {teacher.weights_sha256[:12]}" if teacher.weights_sha256 else ""  # no teacher has none
    utterances = counted(sum(part.utterances for part in card.parts), "utterance")
    facts: dict[str, object] = {
        **{name: f"{cache.url} (checked: {_verified(cache)})" for name, cache in places.items()},
        "teacher": f"{teacher.family} ({teacher.source}){weights}",
        "licence": teacher.licence,
        "input": teacher.preprocessing,
        "views": f"{card.num_views:,}: {views_in_words(card.views)}",
        "data": f"{utterances}, {sum(p.hours for p in card.parts):,.1f} h",
        "size": copies.size,
        "made": f"{card.made.at} by {card.made.by} on {card.made.host}",
        "cite": teacher.cite or "nothing named by the teacher",
        "fingerprint": fingerprint,
    }
    targets = [
        [
            target.name,
            f"{target.dim:,}",
            "one per view" if target.rate is None else f"{target.rate:g} Hz",
            target.codec,
            _lost(card.errors.get(target.name, {})),
        ]
        for target in card.targets
    ]
    heading = ", ".join(names[cache.url] for cache in copies.caches)
    parts = [html.heading(heading, _anchor(fingerprint)), html.facts(facts)]
    parts.append(html.table(["target", "dimension", "rate", "codec", "1 - cosine"], targets, words=(0, 2, 3)))
    for cache in copies.caches:
        if cache.bytes is not None:
            parts.append(_pull(cache.url))
    parts.append(_trained(students))
    return "".join(parts)


def _pull(url: str) -> str:
    """The command that pulls a cache. None is offered where its name could not be pasted into a shell safely."""
    if not url.isprintable():
        return html.note("The place has control characters in its name; rename it to pull the cache.")
    name = url.rstrip("/").rsplit("/", 1)[-1].lstrip("-")  # no option
    return html.command(f"spkd cache pull {shlex.quote(url)} {shlex.quote(name or 'copy')}")


def _lost(errors: dict[str, float]) -> str:
    """Mean of 1 - cosine between stored and original vectors, as text; "" where it was not measured."""
    return f"{1 - errors['cosine_mean']:.1e}" if "cosine_mean" in errors else ""


def _trained(students: Sequence[Student]) -> str:
    if not students:
        return html.note("No student that was trained from it was found.")
    # One column for each list and back-end: numbers of two lists, or of two back-ends, do not compare.
    reports = [report for student in students for report in student.evaluations]
    lists = names_of_lists(reports)
    columns = sorted({_column(report) for report in reports}, key=lambda c: (lists[c[0]], c[1] != PLAIN, c[1]))
    backends = list(dict.fromkeys(backend for _, backend in columns if backend != PLAIN))
    rows = []
    for student in students:
        training, described = student.description.training, student.description
        for known, part in described.digests.items():
            rates: dict[tuple[str, tuple[str, ...]], set[float]] = {}
            for report in student.evaluations:
                if report.weights[-1] == known:
                    rates.setdefault(_column(report), set()).add(report.results["eer_percent"])
            if part is not None and not rates:
                continue
            rows.append(
                [
                    student.url,
                    described.network,
                    str(part or described.sizes[-1]),
                    ", ".join(training.facts.losses),
                    "" if training.steps is None else f"{training.steps:,}",
                    *(", ".join(f"{rate:.2f}" for rate in sorted(rates.get(column, ()))) for column in columns),
                ]
            )
    header = ["student", "network", "embedding", "losses", "steps"]
    for sha, backend in columns:
        header.append(f"EER (%), {lists[sha]}{f' [{backends.index(backend) + 1}]' if backend in backends else ''}")
    notes = [html.note(f"[{number}] {' '.join(backend)}") for number, backend in enumerate(backends, 1)]
    return html.table(header, rows, "Students", words=(0, 1, 2)) + "".join(notes)


def _column(report: Report) -> tuple[str, tuple[str, ...]]:
    """Digest of an evaluation's list, and its back-end."""
    return report.trials.sha256, report.backend


def _verified(cache: ListedCache) -> str:
    """Time of the last verification, in words."""
    try:
        tree = _tree(cache.place.read(VERIFIED, MOST), cache.url)
    except SpkdError as error:
        return f"not known, {error}"
    if tree is None or tree.get("fingerprint") != cache.fingerprint:
        return "never, as far as is known here"
    return str(tree.get("at", ""))


def _students(roots: Sequence[str]) -> list[Student]:
    """Every student below some folders or buckets, with the evaluations there that have error rates."""
    students: dict[str, Student] = {}
    evaluations: dict[str, list[Report]] = {}
    for root in roots:
        for place, names in folders_with(root, (DESCRIPTION, REPORT)):
            try:
                if DESCRIPTION in names and (data := place.read(DESCRIPTION, MOST)) is not None:
                    students[place.url] = Student(place.url, Description.parse(data, f"{place.url}/{DESCRIPTION}"))
                if REPORT in names and (data := place.read(REPORT, MOST)) is not None:
                    report = Report.parse(data, f"{place.url}/{REPORT}")
                    if report.weights and "eer_percent" in report.results:
                        evaluations.setdefault(report.weights[-1], []).append(report)
            except SpkdError as error:
                log(f"note: {error}")
    for student in students.values():
        student.evaluations = [one for known in student.description.digests for one in evaluations.get(known, [])]
    return list(students.values())


def _tree(data: bytes | None, where: str) -> dict[str, Any] | None:
    tree = None if data is None else parse_json(data, where)
    return tree if isinstance(tree, dict) else None
