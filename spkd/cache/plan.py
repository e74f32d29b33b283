"""The plan of a cache: its views, divided into units, known before extraction.

Unit K is shard K of every array. One worker fills and commits it; no other worker writes there. The plan alone gives
the place of each row, so that a unit can be filled in any order, and readers need no other index.

A cache that grew, or was merged, has several parts. Each part is the plan of the utterances that came with it. Its
units follow those of the earlier parts, which do not change.
"""

from __future__ import annotations

import dataclasses
import io
import struct
import zipfile
import zlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from spkd.cache import npy
from spkd.cache.card import Card, Part
from spkd.cache.folder import plan_path
from spkd.cache.layout import shard_rows
from spkd.corpus.audio import SAMPLE_RATE
from spkd.corpus.manifest import Manifest
from spkd.corpus.view import Views
from spkd.errors import SpkdError, UsageError
from spkd.files.atomic import read_bytes, write_bytes
from spkd.outputs.target import Target

UNLABELLED = -1


@dataclass(frozen=True)
class Plan:
    """Views of a cache, and their division into units and parts.

    Attributes:
        views: the views, in order.
        utterances: ids of the utterances from which the views are cut.
        speakers: sorted names of the speakers.
        speaker: (utterances,) index in `speakers`, or UNLABELLED.
        first: (units + 1,) first view of every unit, and the number of views.
        parts: (parts + 1,) first unit of every part, and the number of units.
        unit_views: largest number of views in one unit.
        unit_seconds: most audio in one unit (s).
    """

    views: Views
    utterances: list[str]
    speakers: list[str]
    speaker: np.ndarray
    first: np.ndarray
    parts: tuple[int, ...]
    unit_views: int
    unit_seconds: float

    def part(self, unit: int) -> tuple[int, int]:
        """The part of a unit, and its number within it."""
        part = bisect_right(self.parts, unit) - 1
        return part, unit - self.parts[part]

    @property
    def units(self) -> int:
        """Number of units."""
        return len(self.first) - 1

    def unit(self, number: int) -> range:
        """The views of one unit."""
        return range(int(self.first[number]), int(self.first[number + 1]))

    @cached_property
    def unit_of(self) -> np.ndarray:
        """(views,): number of the unit of every view."""
        return np.repeat(np.arange(self.units, dtype=np.int32), np.diff(self.first))

    def shard_rows(self, target: Target) -> int:
        """Number of rows of every shard of a target."""
        return shard_rows(target, self.unit_views, self.unit_seconds)

    def places(self, target: Target) -> tuple[np.ndarray, np.ndarray]:
        """(views,) first row of every view within its shard, and (views,) its number of rows."""
        counts = target.num_frames(self.views.samples)
        ends = np.concatenate([[0], np.cumsum(counts)])
        return ends[:-1] - ends[self.first[:-1]][self.unit_of], counts

    def unit_places(self, target: Target, unit: int) -> tuple[np.ndarray, np.ndarray]:
        """`places` of the views of one unit."""
        counts = target.num_frames(self.views.samples[self.unit(unit).start : self.unit(unit).stop])
        return np.cumsum(counts) - counts, counts

    @classmethod
    def make(cls, manifest: Manifest, views: Views, unit_views: int, unit_seconds: float) -> Plan:
        """Plan of one part: units are filled in order, as far as `unit_views` and `unit_seconds` allow.

        Args:
            manifest: the utterances, all measured.
            views: their views, in the order of the manifest.
            unit_views: largest number of views in one unit.
            unit_seconds: most audio in one unit (s).
        Raises:
            UsageError: a view longer than a whole unit.
        """
        longest = int(np.argmax(views.samples)) if len(views) else 0
        if len(views) and views.samples[longest] > unit_seconds * SAMPLE_RATE:
            raise UsageError(
                f"{manifest[int(views.utterance[longest])].id}: {views.samples[longest] / SAMPLE_RATE:.0f} s in one "
                f"view; raise storage.unit_seconds ({unit_seconds:g})"
            )
        # Divide the views into units: `by_length` is the first view that would exceed `unit_seconds`.
        ends = np.cumsum(views.samples, dtype=np.int64)
        first = [0]
        while first[-1] < len(views):
            before = ends[first[-1] - 1] if first[-1] else 0
            # An integer, because a search for a float would convert the whole array each time.
            by_length = int(np.searchsorted(ends, int(before + unit_seconds * SAMPLE_RATE), side="right"))
            first.append(min(by_length, first[-1] + unit_views, len(views)))
        # Number the speakers.
        speakers = manifest.speakers
        index_of = {name: i for i, name in enumerate(speakers)}
        speaker = np.array([UNLABELLED if u.speaker is None else index_of[u.speaker] for u in manifest], np.int32)
        utterances, parts = [u.id for u in manifest], (0, len(first) - 1)
        return cls(views, utterances, speakers, speaker, np.array(first), parts, unit_views, unit_seconds)

    @classmethod
    def join(cls, plans: Sequence[Plan]) -> Plan:
        """One plan of several with disjoint utterances, in order. Speakers with the same name are one speaker."""
        if len(plans) == 1:
            return plans[0]
        speakers = sorted({name for plan in plans for name in plan.speakers})
        index_of = {name: i for i, name in enumerate(speakers)}
        views, speaker, first, parts = [], [], [np.zeros(1, np.int64)], [0]
        utterances: list[str] = []
        # Shift utterances, speakers, units and parts of each plan by those of the plans before it.
        for plan in plans:
            views.append(dataclasses.replace(plan.views, utterance=plan.views.utterance + np.int32(len(utterances))))
            known = np.array([*(index_of[name] for name in plan.speakers), UNLABELLED], np.int32)
            speaker.append(known[plan.speaker])
            first.append(plan.first[1:] + first[-1][-1])
            parts += [parts[-1] + end for end in plan.parts[1:]]
            utterances += plan.utterances
        columns = zip(*(v.columns().values() for v in views), strict=True)
        return cls(
            Views(*map(np.concatenate, columns)),
            utterances,
            speakers,
            np.concatenate(speaker),
            np.concatenate(first),
            tuple(parts),
            plans[0].unit_views,
            plans[0].unit_seconds,
        )

    def save(self, root: Path, part: int) -> None:
        """Write the file of a plan of one part.

        Args:
            root: folder of the cache.
            part: number of the part.
        """
        write_bytes(root / plan_path(part), self.to_bytes())

    def to_bytes(self) -> bytes:
        """Content of the file of a plan of one part; the same plan always gives the same bytes."""
        out = io.BytesIO()
        arrays: dict[str, Any] = {
            **self.views.columns(),
            **_pack("utterances", self.utterances),
            **_pack("speakers", self.speakers),
            "utterance_speaker": self.speaker,
            "first": self.first,
            "unit": np.array([self.unit_views, self.unit_seconds]),
        }
        np.savez(out, **arrays)
        return out.getvalue()

    @classmethod
    def load(cls, root: Path, card: Card) -> Plan:
        """The plan of all parts that a card names.

        Raises:
            SpkdError: a file is missing or damaged, or is not of this card.
        """
        return cls.join(cls.load_parts(root, card))

    @classmethod
    def load_parts(cls, root: Path, card: Card) -> list[Plan]:
        """The plan of each part.

        Raises:
            SpkdError: as `load`.
        """
        plans = []
        for number in range(len(card.parts)):
            path = root / plan_path(number)
            plans.append(cls.read(read_bytes(path), card, number, str(path)))
        return plans

    @classmethod
    def read(cls, data: bytes, card: Card, number: int, where: str) -> Plan:
        """The plan of one part of a card, from the bytes of its file.

        Args:
            data: content of the file.
            card: the card of the cache.
            number: number of the part.
            where: name of the file, for errors.
        Raises:
            SpkdError: damaged, with a value that no plan has, or of another card.
        """
        plan = cls._parse(data, where)
        if (wrong := plan._wrong(card, card.parts[number])) is not None:
            raise SpkdError(f"{where}: damaged ({wrong})")
        return plan

    def _wrong(self, card: Card, part: Part) -> str | None:
        """Phrase that says what is wrong with the plan of a part; None where nothing is."""
        views, first, count = self.views, self.first, len(self.views.utterance)
        counted = (len(self.utterances), count, self.units)
        if counted != (part.utterances, part.views, part.units):
            return f"{counted[0]} utterances, {counted[1]} views, {counted[2]} units are not those of the card"
        if (self.unit_views, self.unit_seconds) != (card.unit_views, card.unit_seconds):
            return "its unit size is not that of the card"
        if any(column.shape != (count,) for column in views.columns().values()) or len(self.speaker) != len(
            self.utterances
        ):
            return "its columns differ in length"
        if (
            first[0] != 0
            or first[-1] != count
            or (np.diff(first) < 1).any()
            or (np.diff(first) > card.unit_views).any()
        ):
            return "its units are not stretches of its views"
        if (
            views.utterance[0] < 0
            or views.utterance[-1] >= len(self.utterances)
            or (np.diff(views.utterance) < 0).any()
        ):
            return "its views are not in the order of its utterances"
        if (
            (views.samples < 1).any()
            or (views.start < 0).any()
            or not np.isin(views.speed, np.array([1.0, *card.views.speeds], np.float32)).all()
            or not np.isin(views.formants, np.array([1.0, *card.views.formants], np.float32)).all()
        ):
            return "a view is empty, begins before its utterance, or has a factor that is not in the card"
        ends = np.concatenate([[0], np.cumsum(views.samples, dtype=np.int64)])
        if (ends[first[1:]] - ends[first[:-1]] > card.unit_seconds * SAMPLE_RATE).any():
            return "a unit is longer than the card allows"
        if (self.speaker < UNLABELLED).any() or (self.speaker >= len(self.speakers)).any():
            return "a speaker that is not listed"
        if len(set(self.utterances)) < len(self.utterances) or len(set(self.speakers)) < len(self.speakers):
            return "an utterance or a speaker is listed twice"
        return None

    @classmethod
    def _parse(cls, data: bytes, where: str) -> Plan:
        try:
            arrays = _unzip(data)
            unit_views, unit_seconds = _column(arrays, "unit", "f8")
            first = _column(arrays, "first", "i8")
            return cls(
                Views(*(_column(arrays, name, COLUMNS[name]) for name in COLUMNS)),
                _unpack(arrays, "utterances"),
                _unpack(arrays, "speakers"),
                _column(arrays, "utterance_speaker", "i4"),
                first,
                (0, len(first) - 1),
                int(unit_views),
                float(unit_seconds),
            )
        except (ValueError, KeyError, IndexError, OSError, EOFError, OverflowError, *ZIP_ERRORS) as error:
            raise SpkdError(
                f"{where}: damaged ({' '.join(str(error).split())[:120] or type(error).__name__})"
            ) from error


COLUMNS = {"utterance": "i4", "start": "i8", "samples": "i4", "speed": "f4", "seed": "u4", "formants": "f4"}
ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, struct.error)


def _unzip(data: bytes) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, by name.

    Plans are stored uncompressed, so that no member can be larger than the file.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        if any(m.compress_type != zipfile.ZIP_STORED or m.file_size > len(data) for m in members):
            raise ValueError("a member that is compressed or larger than the file")
        return {m.filename.removesuffix(".npy"): npy.parse(archive.read(m)) for m in members}


def _column(arrays: Mapping[str, np.ndarray], name: str, kind: str) -> np.ndarray:
    values = arrays[name]
    if values.dtype != np.dtype(f"<{kind}") or values.ndim != 1:
        raise ValueError(f"{name} has the type {values.dtype} and the shape {values.shape}")
    return values


def _pack(name: str, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Strings as one array of bytes, and an array with the end of each: readable without pickle, fast for millions."""
    encoded = [text.encode() for text in texts]
    ends = np.cumsum([len(e) for e in encoded], dtype=np.int64)
    return {name: np.frombuffer(b"".join(encoded), np.uint8), f"{name}_end": ends}


def _unpack(arrays: Mapping[str, np.ndarray], name: str) -> list[str]:
    blob, ends = _column(arrays, name, "u1").tobytes(), _column(arrays, f"{name}_end", "i8").tolist()
    if any(a > b for a, b in zip([0, *ends], [*ends, len(blob)], strict=True)):
        raise ValueError(f"{name} overlap")
    return [blob[a:b].decode() for a, b in zip([0, *ends], ends, strict=False)]


def part_of(manifest: Manifest, plan: Plan) -> Part:
    """The card's entry for a part.

    Args:
        manifest: the manifest of the part.
        plan: the plan made of it.
    """
    hours = round(manifest.seconds / 3600, 3)
    return Part(manifest.digest, len(manifest), hours, len(plan.views), plan.units)
