"""The plan of a cache: its views, cut into units, known before the teacher says a word.

Unit K is shard K of every array. One worker fills it and commits it; nobody else ever writes there. Where each
row goes follows from the plan alone, so a unit can be filled in any order and readers need no other index.

A cache that grew, or was merged, has several parts, each the plan of the utterances that came with it: the units of
a part follow those of the parts before, and nothing that was there changes.
"""

from __future__ import annotations

import dataclasses
import io
import zipfile
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from spkd.audio import SAMPLE_RATE
from spkd.cache.layout import shard_rows
from spkd.cache.target import Target
from spkd.errors import SpkdError, UsageError
from spkd.files import write_bytes
from spkd.manifest import Manifest
from spkd.view import Views

UNLABELLED = -1


def file(part: int) -> Path:
    """Where a part's plan lies in its cache."""
    return Path("plan") / f"{part}.npz"


@dataclass(frozen=True)
class Plan:
    """Views in order, the utterances they are of, the first view of every unit (units + 1,), and the first unit of
    every part (parts + 1,)."""

    views: Views
    utterances: list[str]
    speakers: list[str]
    speaker: np.ndarray  # (utterances,): row in `speakers`, or UNLABELLED
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
        return len(self.first) - 1

    def unit(self, number: int) -> range:
        """The views of one unit."""
        return range(int(self.first[number]), int(self.first[number + 1]))

    @cached_property
    def unit_of(self) -> np.ndarray:
        """(views,): the unit of every view."""
        return np.repeat(np.arange(self.units, dtype=np.int32), np.diff(self.first))

    def shard_rows(self, target: Target) -> int:
        return shard_rows(target, self.unit_views, self.unit_seconds)

    def local_rows(self, target: Target) -> tuple[np.ndarray, np.ndarray]:
        """First row of every view inside its shard, and its number of rows: both (views,)."""
        counts = target.rows(self.views.samples)
        ends = np.concatenate([[0], np.cumsum(counts)])
        return ends[:-1] - ends[self.first[:-1]][self.unit_of], counts

    def unit_rows(self, target: Target, unit: int) -> tuple[np.ndarray, np.ndarray]:
        """`local_rows` of one unit's views."""
        counts = target.rows(self.views.samples[self.unit(unit).start : self.unit(unit).stop])
        return np.cumsum(counts) - counts, counts

    @classmethod
    def make(cls, manifest: Manifest, views: Views, unit_views: int, unit_seconds: float) -> Plan:
        """Fill units in order until one more view would exceed `unit_views` or `unit_seconds` of audio.

        Raises:
            UsageError: a view longer than a whole unit.
        """
        longest = int(np.argmax(views.samples)) if len(views) else 0
        if len(views) and views.samples[longest] > unit_seconds * SAMPLE_RATE:
            raise UsageError(
                f"{manifest[int(views.utterance[longest])].id}: {views.samples[longest] / SAMPLE_RATE:.0f} s in one "
                f"view; raise storage.unit_seconds ({unit_seconds:g})"
            )
        ends = np.cumsum(views.samples, dtype=np.int64)
        first = [0]
        while first[-1] < len(views):
            before = ends[first[-1] - 1] if first[-1] else 0
            # An integer: searching integers for a float converts them all, every time.
            by_length = int(np.searchsorted(ends, int(before + unit_seconds * SAMPLE_RATE), side="right"))
            first.append(min(by_length, first[-1] + unit_views, len(views)))
        speakers = manifest.speakers
        row = {name: i for i, name in enumerate(speakers)}
        speaker = np.array([UNLABELLED if u.speaker is None else row[u.speaker] for u in manifest], np.int32)
        utterances, parts = [u.id for u in manifest], (0, len(first) - 1)
        return cls(views, utterances, speakers, speaker, np.array(first), parts, unit_views, unit_seconds)

    @classmethod
    def join(cls, plans: Sequence[Plan]) -> Plan:
        """Plans of disjoint utterances, one behind the other. Speakers of one name are one speaker."""
        if len(plans) == 1:
            return plans[0]
        speakers = sorted({name for plan in plans for name in plan.speakers})
        row = {name: i for i, name in enumerate(speakers)}
        views, speaker, first, parts = [], [], [np.zeros(1, np.int64)], [0]
        utterances: list[str] = []
        for plan in plans:
            views.append(dataclasses.replace(plan.views, utterance=plan.views.utterance + np.int32(len(utterances))))
            known = np.array([*(row[name] for name in plan.speakers), UNLABELLED], np.int32)
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
        """Write a plan of one part; the same plan always gives the same bytes."""
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
        write_bytes(root / file(part), out.getvalue())

    @classmethod
    def load(cls, root: Path, parts: int) -> Plan:
        """The plan of the first `parts` parts of a cache.

        Raises:
            SpkdError: a file is missing or damaged.
        """
        return cls.join([cls.load_part(root / file(part)) for part in range(parts)])

    @classmethod
    def load_part(cls, path: Path) -> Plan:
        """The plan of one part. Raises SpkdError as `load` does."""
        try:
            return cls.read(path.read_bytes(), str(path))
        except FileNotFoundError as error:
            raise SpkdError(f"{path}: missing") from error

    @classmethod
    def read(cls, data: bytes, where: str) -> Plan:
        """A plan of one part from the bytes of its file. Raises SpkdError where they are damaged."""
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                views = Views(*(arrays[name] for name in ("utterance", "start", "samples", "speed", "seed")))
                unit_views, unit_seconds = arrays["unit"]
                return cls(
                    views,
                    _unpack(arrays, "utterances"),
                    _unpack(arrays, "speakers"),
                    arrays["utterance_speaker"],
                    arrays["first"],
                    (0, len(arrays["first"]) - 1),
                    int(unit_views),
                    float(unit_seconds),
                )
        except (ValueError, KeyError, OSError, EOFError, TypeError, zipfile.BadZipFile) as error:
            raise SpkdError(f"{where}: damaged ({str(error).split('.')[0]})") from error


def _pack(name: str, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Strings as one blob and the end of each: readable without pickle, quick for millions."""
    encoded = [text.encode() for text in texts]
    ends = np.cumsum([len(e) for e in encoded], dtype=np.int64)
    return {name: np.frombuffer(b"".join(encoded), np.uint8), f"{name}_end": ends}


def _unpack(arrays: np.lib.npyio.NpzFile, name: str) -> list[str]:
    blob, ends = arrays[name].tobytes(), arrays[f"{name}_end"].tolist()
    return [blob[a:b].decode() for a, b in zip([0, *ends], ends, strict=False)]
