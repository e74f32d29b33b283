"""The plan of a cache: its views, cut into units, known before the teacher says a word.

Unit K is shard K of every array. One worker fills it and commits it; nobody else ever writes there. Where each
row goes follows from the plan alone, so a unit can be filled in any order and readers need no other index.
"""

from __future__ import annotations

import io
import zipfile
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

FILE = Path("plan") / "0.npz"
UNLABELLED = -1


@dataclass(frozen=True)
class Plan:
    """Views in order, the utterances they are of, and the first view of every unit (units + 1,)."""

    views: Views
    utterances: list[str]
    speakers: list[str]
    speaker: np.ndarray  # (utterances,): row in `speakers`, or UNLABELLED
    first: np.ndarray
    unit_views: int
    unit_seconds: float

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
            by_length = int(np.searchsorted(ends, before + unit_seconds * SAMPLE_RATE, side="right"))
            first.append(min(by_length, first[-1] + unit_views, len(views)))
        speakers = manifest.speakers
        row = {name: i for i, name in enumerate(speakers)}
        speaker = np.array([UNLABELLED if u.speaker is None else row[u.speaker] for u in manifest], np.int32)
        return cls(views, [u.id for u in manifest], speakers, speaker, np.array(first), unit_views, unit_seconds)

    def save(self, root: Path) -> None:
        """Write plan/0.npz; the same plan always gives the same bytes."""
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
        write_bytes(root / FILE, out.getvalue())

    @classmethod
    def load(cls, root: Path) -> Plan:
        """Raises SpkdError, naming the file, where it is missing or damaged."""
        try:
            with np.load(root / FILE, allow_pickle=False) as file:
                views = Views(*(file[name] for name in ("utterance", "start", "samples", "speed", "seed")))
                unit_views, unit_seconds = file["unit"]
                return cls(
                    views,
                    _unpack(file, "utterances"),
                    _unpack(file, "speakers"),
                    file["utterance_speaker"],
                    file["first"],
                    int(unit_views),
                    float(unit_seconds),
                )
        except FileNotFoundError as error:
            raise SpkdError(f"{root / FILE}: missing") from error
        except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise SpkdError(f"{root / FILE}: damaged ({error})") from error


def _pack(name: str, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Strings as one blob and the end of each: readable without pickle, quick for millions."""
    encoded = [text.encode() for text in texts]
    ends = np.cumsum([len(e) for e in encoded], dtype=np.int64)
    return {name: np.frombuffer(b"".join(encoded), np.uint8), f"{name}_end": ends}


def _unpack(file: np.lib.npyio.NpzFile, name: str) -> list[str]:
    blob, ends = file[name].tobytes(), file[f"{name}_end"].tolist()
    return [blob[a:b].decode() for a, b in zip([0, *ends], ends, strict=False)]
