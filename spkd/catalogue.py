"""`spkd cache catalogue`: one page of a laboratory's caches, and of the students that were trained from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from spkd.cache.card import Card
from spkd.cache.describe import format_bytes, views_in_words
from spkd.cache.exchange.remote import Found, find, folders_with
from spkd.cache.exchange.remote_folder import RemoteFolder
from spkd.cache.folder import VERIFIED
from spkd.errors import SpkdError
from spkd.eval.run import REPORT
from spkd.files import digest
from spkd.files.atomic import parse_json
from spkd.pages import html
from spkd.progress import log
from spkd.students.checkpoint import DESCRIPTION, WEIGHTS

MOST = 1 << 28  # bytes of a description, a report or a student's weights


@dataclass
class Student:
    """A student that was found.

    Attributes:
        url: of its folder.
        caches: fingerprints of those it was trained from.
        network: its architecture. losses, steps: of its training.
        weights: SHA-256 of its file.
        errors: EER (%) by trial list.
    """

    url: str
    caches: list[str]
    network: str
    losses: list[str]
    steps: int | None
    weights: str
    errors: dict[str, float] = field(default_factory=dict)


def catalogue(root: str, more: Sequence[str]) -> tuple[str, int]:
    """The page, and how many caches it lists.

    Args:
        root: folder or bucket of the caches. more: others in which students and evaluations are looked for.
    Raises:
        SpkdError: a place that does not answer.
    """
    caches = list(find(root))
    students = _students([root, *more])
    trained: dict[str, list[Student]] = {}
    for student in students:
        for fingerprint in student.caches:
            trained.setdefault(fingerprint, []).append(student)
    known = [found for found in caches if found.card is not None]
    parts = [_summary(known, trained)] if known else [html.note("No caches.")]
    for found in known:
        assert found.card is not None
        parts.append(_section(found, found.card, trained.get(found.card.fingerprint, [])))
    if broken := [[found.url, found.error or ""] for found in caches if found.card is None]:
        parts += [html.heading("Not readable"), html.table(["cache", "reason"], broken, words=(0, 1))]
    return html.page(f"Teacher caches in {RemoteFolder.of(root).shown}", *parts), len(known)


def _summary(caches: Sequence[Found], trained: dict[str, list[Student]]) -> str:
    rows = []
    for found in caches:
        card = found.card
        assert card is not None
        rows.append(
            [
                _link(found.url),
                card.teacher.family,
                card.teacher.licence,
                f"{card.num_views:,}",
                f"{sum(part.hours for part in card.parts):,.1f}",
                "not complete" if found.bytes is None else format_bytes(found.bytes),
                str(len(trained.get(card.fingerprint, []))),
            ]
        )
    header = ["cache", "teacher", "licence", "views", "hours", "size", "students"]
    return html.table(header, rows, words=(0, 1, 2))


def _link(url: str) -> str:
    """The last part of an address, linked to its section."""
    name = url.rstrip("/").rsplit("/", 1)[-1]
    return html.link(f"#{digest.of_bytes(url.encode())[:12]}", name)


def _section(found: Found, card: Card, students: Sequence[Student]) -> str:
    teacher = card.teacher
    facts: dict[str, object] = {
        "place": found.url,
        "teacher": f"{teacher.family} ({teacher.source}), weights {teacher.weights_sha256[:12]}",
        "licence": teacher.licence,
        "input": teacher.preprocessing,
        "views": f"{card.num_views:,}: {views_in_words(card.views)}",
        "data": f"{sum(p.utterances for p in card.parts):,} utterances, {sum(p.hours for p in card.parts):,.1f} h",
        "size": "not complete" if found.bytes is None else format_bytes(found.bytes),
        "verified": _verified(found, card),
        "made": f"{card.made.at} by {card.made.by} on {card.made.host}",
        "cite": teacher.cite or "nothing named by the teacher",
        "fingerprint": card.fingerprint,
    }
    targets = [
        [
            target.name,
            f"{target.dim:,}",
            "one per view" if target.rate is None else f"{target.rate:g} Hz",
            target.codec,
            f"{1 - card.errors[target.name]['cosine_mean']:.1e}" if target.name in card.errors else "",
        ]
        for target in card.targets
    ]
    name = found.url.rstrip("/").rsplit("/", 1)[-1]
    anchor = digest.of_bytes(found.url.encode())[:12]
    parts = [html.heading(name, anchor), html.facts(facts)]
    parts.append(html.table(["target", "dimension", "rate", "codec", "1 - cosine"], targets, words=(0, 2, 3)))
    if found.bytes is not None:
        parts.append(html.command(f"spkd cache pull {found.url} {name}"))
    parts.append(_trained(students))
    return "".join(parts)


def _trained(students: Sequence[Student]) -> str:
    if not students:
        return html.note("No student that was trained from it was found.")
    lists = sorted({name for student in students for name in student.errors})
    rows = [
        [
            student.url,
            student.network,
            ", ".join(student.losses),
            "" if student.steps is None else f"{student.steps:,}",
            *(f"{student.errors[name]:.2f}" if name in student.errors else "" for name in lists),
        ]
        for student in students
    ]
    header = ["student", "network", "losses", "steps", *(f"EER (%), {name}" for name in lists)]
    return html.table(header, rows, "Students", words=(0, 1, 2))


def _verified(found: Found, card: Card) -> str:
    data = RemoteFolder.of(found.url).read(VERIFIED, MOST)
    tree = None if data is None else _tree(data, found.url)
    if tree is None or tree.get("fingerprint") != card.fingerprint:
        return "never, as far as is known here"
    return str(tree.get("at", ""))


def _students(roots: Sequence[str]) -> list[Student]:
    """Every student in these places, with the error rates of the evaluations there."""
    students: dict[str, Student] = {}
    errors: dict[str, dict[str, float]] = {}
    for root in roots:
        for place, names in folders_with(root, (DESCRIPTION, REPORT)):
            try:
                if DESCRIPTION in names and (student := _student(place)) is not None:
                    students[place.url] = student
                if REPORT in names:
                    _add_errors(place, errors)
            except SpkdError as error:
                log(f"note: {error}")
    for student in students.values():
        student.errors = errors.get(student.weights, {})
    return list(students.values())


def _student(place: RemoteFolder) -> Student | None:
    tree, weights = _tree(place.read(DESCRIPTION, MOST), place.url), place.read(WEIGHTS, MOST)
    if tree is None or weights is None or "spkd_model" not in tree:
        return None
    training = tree.get("training") or {}
    settings = training.get("settings") or {}
    return Student(
        place.url,
        list(settings.get("caches", [])),
        str(tree.get("network")),
        list(settings.get("losses", {})),
        training.get("steps"),
        digest.of_bytes(weights),
    )


def _add_errors(place: RemoteFolder, errors: dict[str, dict[str, float]]) -> None:
    """The EER of an evaluation, under the weights of the model of its test side."""
    tree = _tree(place.read(REPORT, MOST), place.url)
    if tree is None or not tree.get("models") or "eer_percent" not in tree.get("results", {}):
        return
    name = str(tree["trials"]["file"]).rsplit("/", 1)[-1]
    errors.setdefault(str(tree["models"][-1].get("weights_sha256")), {})[name] = float(tree["results"]["eer_percent"])


def _tree(data: bytes | None, where: str) -> dict[str, Any] | None:
    tree = None if data is None else parse_json(data, where)
    return tree if isinstance(tree, dict) else None
