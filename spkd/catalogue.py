"""`spkd cache catalogue`: a page of the caches of a laboratory, and of the students trained from them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from spkd.cache.card import Card
from spkd.cache.describe import views_in_words
from spkd.cache.exchange.remote import ListedCache, find, folders_with
from spkd.cache.exchange.remote_folder import RemoteFolder
from spkd.cache.folder import VERIFIED
from spkd.errors import SpkdError
from spkd.eval.report import REPORT, Report
from spkd.files.atomic import parse_json
from spkd.files.text import format_bytes
from spkd.pages import html
from spkd.progress import log
from spkd.students.description import DESCRIPTION, Description

MOST = 1 << 28  # most bytes of a description or a report


@dataclass(frozen=True)
class Copies:
    """All copies of a cache, which have the same fingerprint.

    Attributes:
        card: the card of the cache.
        caches: the copies.
    """

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
        url: URL of its folder.
        description: content of its model.json.
        errors: name of each trial list -> EER (%).
    """

    url: str
    description: Description
    errors: dict[str, float] = field(default_factory=dict)


def catalogue(root: str, more: Sequence[str]) -> tuple[str, int]:
    """Make the page of the caches below a folder or bucket.

    Args:
        root: folder or bucket of the caches.
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
            groups.setdefault(cache.card.fingerprint, Copies(cache.card, [])).caches.append(cache)
    names = _names([cache.url for copies in groups.values() for cache in copies.caches])
    # Write the page.
    parts = [_summary(groups, names, trained)] if groups else [html.note("No caches.")]
    for fingerprint, copies in groups.items():
        parts.append(_section(fingerprint, copies, names, trained.get(fingerprint, [])))
    if broken := [[cache.url, cache.error or ""] for cache in caches if cache.card is None]:
        parts += [html.heading("Not readable"), html.table(["cache", "reason"], broken, words=(0, 1))]
    return html.page(f"Teacher caches in {RemoteFolder.of(root).shown}", *parts), len(caches) - len(broken)


def _names(urls: Sequence[str]) -> dict[str, str]:
    """URL -> short name: the last part of the URL, and as many parts before it as make the name unique."""
    parts = {url: url.rstrip("/").split("/") for url in urls}

    def is_unique(url: str, count: int) -> bool:
        return sum(words[-count:] == parts[url][-count:] for words in parts.values()) == 1

    return {
        url: "/".join(words[-next((n for n in range(1, len(words)) if is_unique(url, n)), len(words)) :])
        for url, words in parts.items()
    }


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
    facts: dict[str, object] = {
        **{name: f"{cache.url} (checked: {_verified(cache, card)})" for name, cache in places.items()},
        "teacher": f"{teacher.family} ({teacher.source}), weights {teacher.weights_sha256[:12]}",
        "licence": teacher.licence,
        "input": teacher.preprocessing,
        "views": f"{card.num_views:,}: {views_in_words(card.views)}",
        "data": f"{sum(p.utterances for p in card.parts):,} utterances, {sum(p.hours for p in card.parts):,.1f} h",
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
            name = cache.url.rstrip("/").rsplit("/", 1)[-1]
            parts.append(html.command(f"spkd cache pull {shlex.quote(cache.url)} {shlex.quote(name)}"))
    parts.append(_trained(students))
    return "".join(parts)


def _lost(errors: dict[str, float]) -> str:
    """Mean of 1 - cosine between stored and original vectors, as text; "" where it was not measured."""
    return f"{1 - errors['cosine_mean']:.1e}" if "cosine_mean" in errors else ""


def _trained(students: Sequence[Student]) -> str:
    if not students:
        return html.note("No student that was trained from it was found.")
    lists = sorted({name for student in students for name in student.errors})
    rows = []
    for student in students:
        training = student.description.training
        rows.append(
            [
                student.url,
                student.description.network,
                ", ".join(training.facts.losses),
                "" if training.steps is None else f"{training.steps:,}",
                *(f"{student.errors[name]:.2f}" if name in student.errors else "" for name in lists),
            ]
        )
    header = ["student", "network", "losses", "steps", *(f"EER (%), {name}" for name in lists)]
    return html.table(header, rows, "Students", words=(0, 1, 2))


def _verified(cache: ListedCache, card: Card) -> str:
    """Time of the last verification, in words."""
    data = RemoteFolder.of(cache.url).read(VERIFIED, MOST)
    tree = None if data is None else _tree(data, cache.url)
    if tree is None or tree.get("fingerprint") != card.fingerprint:
        return "never, as far as is known here"
    return str(tree.get("at", ""))


def _students(roots: Sequence[str]) -> list[Student]:
    """Every student below some folders or buckets, with the error rates of the evaluations there."""
    students: dict[str, Student] = {}
    errors: dict[str, dict[str, float]] = {}
    for root in roots:
        for place, names in folders_with(root, (DESCRIPTION, REPORT)):
            try:
                if DESCRIPTION in names and (data := place.read(DESCRIPTION, MOST)) is not None:
                    students[place.url] = Student(place.url, Description.parse(data, f"{place.url}/{DESCRIPTION}"))
                if REPORT in names and (data := place.read(REPORT, MOST)) is not None:
                    _add_errors(Report.parse(data, f"{place.url}/{REPORT}"), errors)
            except SpkdError as error:
                log(f"note: {error}")
    for student in students.values():
        student.errors = errors.get(student.description.weights_sha256, {})
    return list(students.values())


def _add_errors(report: Report, errors: dict[str, dict[str, float]]) -> None:
    """Add the EER of an evaluation, under the digest of the weights of the model that embedded its test side."""
    if report.models and "eer_percent" in report.results:
        rates = errors.setdefault(report.models[-1].card.weights_sha256, {})
        rates[report.trials.name] = report.results["eer_percent"]


def _tree(data: bytes | None, where: str) -> dict[str, Any] | None:
    tree = None if data is None else parse_json(data, where)
    return tree if isinstance(tree, dict) else None
