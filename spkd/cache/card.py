"""The card: description of a cache's content, for people and for checks.

Two caches with the same fingerprint are interchangeable.
"""

from __future__ import annotations

import getpass
import platform
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from spkd.corpus.manifest import Manifest
from spkd.corpus.view import ViewCard
from spkd.errors import SpkdError
from spkd.files import digest
from spkd.files.schema import record
from spkd.outputs.head import HeadCard
from spkd.outputs.target import Target
from spkd.outputs.teacher_card import TeacherCard
from spkd.version import __version__

FORMAT = 2
SERIES = ("teacher", "targets", "views", "layout", "head", "codecs")  # content that all parts of a cache share
CONTENT = (*SERIES, "parts")  # content that the fingerprint covers
# Fields of the teacher that the fingerprint leaves out. Weights are the same wherever they are kept. A library, like
# torch, computes the same numbers in most of its versions; `spkd cache verify --live` measures where it does not.
NOT_COVERED = ("source", "licence", "cite", "library")
NAMED = {
    "teacher": "teacher",
    "targets": "set of targets",
    "views": "view plan",
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
        utterances: number of utterances.
        hours: total duration of the utterances.
        views: number of views.
        units: number of units.
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
        by: name of the user.
        host: name of the machine.
        versions: versions of spkd, torch and numpy.
    """

    at: str
    by: str
    host: str
    versions: dict[str, str]

    @classmethod
    def now(cls) -> Made:
        """Origin of a cache that this user begins now on this machine."""
        versions = {"spkd": __version__, "torch": str(torch.__version__), "numpy": np.__version__}
        return cls(time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), _user(), platform.node(), versions)


@dataclass(frozen=True)
class Card:
    """Content of a cache.

    Attributes:
        teacher: the teacher whose outputs it holds.
        targets: the stored targets, with their codecs.
        views: the view plan.
        unit_views: largest number of views in one unit.
        unit_seconds: most audio in one unit (s).
        head: the teacher's classifier, kept in a file next to the card; None where there is none.
        codecs: digest of the parameters that the codecs learnt; None where they learnt none.
        parts: the parts, each of one manifest.
        errors: measured error of each target's codec (see codec.error and codec.divergence).
        made: time, user and machine of the extraction.
    """

    teacher: TeacherCard
    targets: tuple[Target, ...]
    views: ViewCard
    unit_views: int
    unit_seconds: float
    head: HeadCard | None
    codecs: str | None
    parts: tuple[Part, ...]
    errors: Errors = field(default_factory=dict)
    made: Made = field(default_factory=Made.now)

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
            "layout": {"unit_views": self.unit_views, "unit_seconds": self.unit_seconds},
            "head": None if self.head is None else asdict(self.head),
            "codecs": self.codecs,
            "parts": [asdict(part) for part in self.parts],
        }

    def covered(self, name: str) -> Any:
        """One part of the content as the fingerprint covers it."""
        if name != "teacher":
            return self._content[name]
        return {key: value for key, value in self._content["teacher"].items() if key not in NOT_COVERED}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the content, whatever its layout in the file."""
        return digest.of_tree({name: self.covered(name) for name in CONTENT})

    @cached_property
    def series(self) -> str:
        """SHA-256 over the content that does not change when a cache grows, without the learnt parameters of codecs."""
        return digest.of_tree({name: self.covered(name) for name in SERIES if name != "codecs"})

    def part_key(self, number: int) -> str:
        """SHA-256 over the manifest and the settings of one part; the headers of its shards hold it."""
        extracted_from = {"manifest": self.parts[number].manifest}
        return digest.of_tree({name: self.covered(name) for name in SERIES} | extracted_from)

    def with_parts(self, parts: Sequence[Part]) -> Card:
        """This card with other parts."""
        return replace(self, parts=tuple(parts))

    def grows_to(self, other: Card) -> bool:
        """Whether `other` is this card with further parts."""
        count = len(self.parts)
        same = all(self.covered(name) == other.covered(name) for name in SERIES)
        return same and len(other.parts) > count and other.parts[:count] == self.parts

    def difference(self, other: Card, names: Sequence[str] = CONTENT) -> str:
        """Phrase for an error that names the differences from another card."""
        return " and ".join(f"another {NAMED[name]}" for name in names if self.covered(name) != other.covered(name))

    def pick_parts(self, utterances: Sequence[str], manifest: Manifest) -> list[Manifest] | None:
        """The manifest of each part, picked from a manifest that may hold more utterances, in another order.

        Args:
            utterances: ids of the cache's utterances, in its order.
            manifest: the manifest to pick from.
        Returns:
            One manifest for each part; None where an utterance is missing, or differs from that of the extraction.
        """
        picked, first = [], 0
        for part in self.parts:
            chosen = manifest.pick(utterances[first : first + part.utterances])
            if chosen is None or chosen.digest != part.manifest:
                return None
            picked.append(chosen)
            first += part.utterances
        return picked

    def to_json(self) -> dict[str, Any]:
        """The card as JSON."""
        return {
            "spkd_cache": FORMAT,
            "fingerprint": self.fingerprint,
            **self._content,
            "errors": self.errors,
            "made": asdict(self.made),
        }

    @classmethod
    def from_json(cls, tree: Any, where: str) -> Card:
        """A card from its JSON, checked.

        Args:
            tree: the parsed JSON.
            where: name of the file, for errors.
        Raises:
            SpkdError: not a card, another format, a value that no cache has, or a fingerprint that does not match.
        """
        if not isinstance(tree, dict) or "spkd_cache" not in tree:
            raise SpkdError(f"{where}: not a card of a teacher cache")
        check_format(tree["spkd_cache"], where)
        try:
            layout, targets, parts = tree["layout"], tree["targets"], tree["parts"]
            card = cls(
                TeacherCard.from_json(tree["teacher"], f"{where}: teacher"),
                tuple(_target(target, f"{where}: targets") for target in targets),
                record(ViewCard, tree["views"], f"{where}: views"),
                record(_Layout, layout, f"{where}: layout").unit_views,
                layout["unit_seconds"],
                None if tree["head"] is None else record(HeadCard, tree["head"], f"{where}: head"),
                record(_Codecs, {"codecs": tree["codecs"]}, where).codecs,
                tuple(record(Part, part, f"{where}: parts") for part in parts),
                record(_Errors, {"errors": tree["errors"]}, where).errors,
                record(Made, tree["made"], f"{where}: made"),
            )
        except (KeyError, TypeError) as error:
            raise SpkdError(f"{where}: damaged (not a card: {error})") from error
        if len({target.name for target in card.targets}) < len(card.targets) or not card.targets or not card.parts:
            raise SpkdError(f"{where}: damaged (no targets, no parts, or one target twice)")
        if tree.get("fingerprint") != card.fingerprint:
            raise SpkdError(f"{where}: damaged (it does not match its fingerprint)")
        return card


@dataclass(frozen=True)
class _Layout:
    unit_views: int = field(metadata={"low": 1, "high": 10**6})
    unit_seconds: float = field(metadata={"low": 0.01, "high": 134_000})


@dataclass(frozen=True)
class _Codecs:
    codecs: str | None


@dataclass(frozen=True)
class _Errors:
    errors: Errors


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
        raise SpkdError(f"{where}: format {str(version)[:20]}, this spkd reads format {FORMAT}; update spkd")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return "unknown"
