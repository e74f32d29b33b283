"""The card: description of a cache's planned content, for people and for checks.

Two complete caches with the same fingerprint are interchangeable. It covers the card and the views that were left out.
"""

from __future__ import annotations

import getpass
import itertools
import platform
import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from spkd.corpus.manifest import Manifest
from spkd.corpus.people import People
from spkd.corpus.view import ViewCard
from spkd.errors import SpkdError, listed
from spkd.files import digest
from spkd.files.schema import record
from spkd.files.sealed import CHECK, self_digest
from spkd.files.text import differences, dotted, utc
from spkd.outputs.head import HeadCard
from spkd.outputs.target import Target
from spkd.outputs.teacher_card import TeacherCard
from spkd.version import __version__

FORMAT = 4
# Content that all parts of a cache share.
SERIES = ("teacher", "targets", "views", "min_seconds", "layout", "head", "codecs")
CONTENT = (*SERIES, "parts")  # content that the identity covers
# Fields of the teacher that the identity leaves out. Weights are the same wherever they are kept. A library, like
# torch, computes the same numbers in most of its versions; `spkd cache verify --live` measures where it does not.
NOT_COVERED = ("source", "licence", "cite", "library")
NAMED = {
    "teacher": "teacher",
    "targets": "set of targets",
    "views": "view plan",
    "min_seconds": "min_seconds",
    "layout": "unit size",
    "head": "classifier",
    "codecs": "codebook",
    "parts": "manifest",
}
Errors = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Part:
    """Part of a cache that was extracted from one manifest.

    Attributes:
        manifest: digest of the manifest.
    """

    manifest: str
    utterances: int = field(metadata={"low": 1, "high": 2**31})
    hours: float = field(metadata={"low": 0, "high": 1e9})
    views: int = field(metadata={"low": 1, "high": 2**31})
    units: int = field(metadata={"low": 1, "high": 10**7})


@dataclass(frozen=True)
class Made:
    """Origin of a cache.

    Attributes:
        at: time at which it was begun (UTC).
    """

    at: str
    by: str
    host: str
    versions: dict[str, str]

    @classmethod
    def now(cls) -> Made:
        """Origin of a cache that this user begins now on this machine."""
        versions = {"spkd": __version__, "torch": str(torch.__version__), "numpy": np.__version__}
        return cls(utc(), _user(), platform.node(), versions)


@dataclass(frozen=True)
class Card:
    """Content of a cache.

    Attributes:
        min_seconds: duration below which utterances are left out (s).
        unit_views: largest number of views in one unit.
        unit_seconds: most audio in one unit (s).
        head: the teacher's classifier, kept in a file next to the card; None where there is none.
        codecs: digest of the parameters that the codecs learnt; None where they learnt none.
        errors: measured error of each target's codec (see codec.error and codec.divergence).
        teacher_people: people that the teacher was trained on, as far as spkd trained it.
    """

    teacher: TeacherCard
    targets: tuple[Target, ...]
    views: ViewCard
    min_seconds: float
    unit_views: int
    unit_seconds: float
    head: HeadCard | None
    codecs: str | None
    parts: tuple[Part, ...]
    errors: Errors = field(default_factory=dict)
    made: Made = field(default_factory=Made.now)
    teacher_people: People = field(default_factory=People)

    @property
    def units(self) -> int:
        """Units of all parts."""
        return sum(part.units for part in self.parts)

    @property
    def num_views(self) -> int:
        """Views of all parts."""
        return sum(part.views for part in self.parts)

    @cached_property
    def _content(self) -> dict[str, Any]:
        return {
            "teacher": self.teacher.to_json(),
            "targets": [t.to_json() for t in self.targets],
            "views": self.views.to_json(),
            "min_seconds": self.min_seconds,
            "layout": {"unit_views": self.unit_views, "unit_seconds": self.unit_seconds},
            "head": None if self.head is None else asdict(self.head),
            "codecs": self.codecs,
            "parts": [asdict(part) for part in self.parts],
        }

    def covered(self, name: str) -> Any:
        """One part of the content as the identity covers it."""
        if name != "teacher":
            return self._content[name]
        return {key: value for key, value in self._content["teacher"].items() if key not in NOT_COVERED}

    @cached_property
    def identity(self) -> str:
        """SHA-256 over the planned content, whatever its layout in the file."""
        return digest.of_tree({name: self.covered(name) for name in CONTENT})

    def fingerprint(self, rejected: Iterable[int]) -> str:
        """SHA-256 over the content of a complete cache.

        Args:
            rejected: numbers of the views that were left out.
        """
        return digest.of_tree({"planned": self.identity, "rejected": sorted(rejected)})

    @cached_property
    def series(self) -> str:
        """SHA-256 over the content that does not change when a cache grows, without the learnt parameters of codecs."""
        return digest.of_tree({name: self.covered(name) for name in SERIES if name != "codecs"})

    def part(self, unit: int) -> tuple[int, int]:
        """The part of a unit, and its number within it."""
        part = bisect_right(self._ends, unit)
        return part, unit - (self._ends[part - 1] if part else 0)

    @cached_property
    def _ends(self) -> list[int]:
        return list(itertools.accumulate(part.units for part in self.parts))

    def part_key(self, number: int) -> str:
        """SHA-256 over the manifest and the settings of one part; the headers of its shards hold it."""
        return self._keys[number]

    @cached_property
    def _keys(self) -> list[str]:
        shared = {name: self.covered(name) for name in SERIES}
        return [digest.of_tree(shared | {"manifest": part.manifest}) for part in self.parts]

    def with_parts(self, parts: Sequence[Part]) -> Card:
        return replace(self, parts=tuple(parts))

    def grows_to(self, other: Card) -> bool:
        """Whether `other` is this card with further parts."""
        count = len(self.parts)
        same = all(self.covered(name) == other.covered(name) for name in SERIES)
        return same and len(other.parts) > count and other.parts[:count] == self.parts

    def difference(self, other: Card, names: Sequence[str] = CONTENT) -> str:
        """Phrase for an error that names the differences from another card, which is there, with the values of both."""
        differing = [name for name in names if self.covered(name) != other.covered(name)]
        if [part.manifest for part in self.parts] == [part.manifest for part in other.parts]:
            differing = [name for name in differing if name != "parts"]  # other views or units of the same utterances
        return listed([f"another {NAMED[name]}{self._values(other, name)}" for name in differing])

    def _values(self, other: Card, name: str) -> str:
        """Values of a part of the content that differ from those of another card, in brackets."""
        found = differences(_flat(name, other.covered(name)), _flat(name, self.covered(name)))
        return f" ({found})" if found else ""

    def pick_parts(self, utterances: Sequence[str], manifest: Manifest) -> list[Manifest] | None:
        """The manifest of each part, picked from a manifest that may hold more utterances, in another order.

        Args:
            utterances: ids of the cache's utterances, in its order.
        Returns:
            One manifest for each part; None where an utterance is missing, or differs from that of the extraction.
        """
        picked, first = [], 0
        for part in self.parts:
            is_all = part.utterances == len(utterances)
            chosen = manifest.pick(utterances if is_all else utterances[first : first + part.utterances])
            if chosen is None or chosen.digest != part.manifest:
                return None
            picked.append(chosen)
            first += part.utterances
        return picked

    def to_json(self) -> dict[str, Any]:
        """The card as JSON, with a digest over all of it; the identity does not cover errors, makers and people."""
        tree = {
            "spkd_cache": FORMAT,
            "identity": self.identity,
            **self._content,
            "errors": self.errors,
            "made": asdict(self.made),
            **({} if self.teacher_people == People() else {"teacher_people": asdict(self.teacher_people)}),
        }
        return tree | {CHECK: self_digest(tree)}

    @classmethod
    def from_json(cls, tree: Any, where: str) -> Card:
        """A card from its JSON, checked.

        Raises:
            SpkdError: not a card, another format, a value that no cache has, or an identity that does not match.
        """
        if not isinstance(tree, dict) or "spkd_cache" not in tree:
            raise SpkdError(f"{where}: not a card of a teacher cache")
        check_format(tree["spkd_cache"], where)
        try:
            values = tree["layout"] | {name: tree[name] for name in ("min_seconds", "codecs", "errors")}
            plain = record(_Plain, values, where)
            card = cls(
                TeacherCard.from_json(tree["teacher"], f"{where}: teacher"),
                tuple(_target(target, f"{where}: targets") for target in tree["targets"]),
                record(ViewCard, tree["views"], f"{where}: views"),
                plain.min_seconds,
                plain.unit_views,
                plain.unit_seconds,
                None if tree["head"] is None else record(HeadCard, tree["head"], f"{where}: head"),
                plain.codecs,
                tuple(record(Part, part, f"{where}: parts") for part in tree["parts"]),
                plain.errors,
                record(Made, tree["made"], f"{where}: made"),
                record(People, tree.get("teacher_people", {}), f"{where}: teacher_people"),
            )
            card.teacher_people.check(f"{where}: teacher_people")
        except (KeyError, TypeError) as error:
            raise SpkdError(f"{where}: damaged (not a card: {error})") from error
        if len({target.name for target in card.targets}) < len(card.targets) or not card.targets or not card.parts:
            raise SpkdError(f"{where}: damaged (no targets, no parts, or one target twice)")
        if tree.get("identity") != card.identity:
            raise SpkdError(f"{where}: damaged (it does not match its identity)")
        if tree.get(CHECK) != self_digest(tree):
            raise SpkdError(f"{where}: damaged (it does not match its own digest)")
        return card


@dataclass(frozen=True)
class _Plain:
    """Parts of a card that are single values."""

    min_seconds: float = field(metadata={"low": 0, "high": 1e9})
    unit_views: int = field(metadata={"low": 1, "high": 10**6})
    unit_seconds: float = field(metadata={"low": 0.01, "high": 134_000})
    codecs: str | None
    errors: Errors


def _flat(name: str, tree: Any) -> dict[str, Any]:
    """A part of a card's content by the names of its values; of parts and targets, what a user chooses."""
    if name == "parts":
        return {"utterances": sum(part["utterances"] for part in tree)}
    if name == "targets":
        return {target["name"]: f"{target['dim']} numbers in {target['codec']}" for target in tree}
    return dotted(tree if isinstance(tree, dict) else {name: tree})


def _target(tree: Any, where: str) -> Target:
    if not isinstance(tree, dict):
        raise SpkdError(f"{where}: damaged (expected an object)")
    target = record(Target, {name: value for name, value in tree.items() if name != "rate_hz"}, where)
    if not re.fullmatch(r"\w[\w.-]{0,99}", target.name):
        raise SpkdError(f"{where}: {target.name[:40]!r} is not the name of a folder")
    return target


def check_format(version: Any, where: str) -> None:
    """Check the number of a cache's format.

    Raises:
        SpkdError: another version of spkd wrote the cache, in another format.
    """
    if version != FORMAT:
        remedy = "extract it again" if type(version) is int and version < FORMAT else "update spkd"
        raise SpkdError(f"{where}: format {str(version)[:20]}, this spkd reads format {FORMAT}; {remedy}")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return "unknown"
