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
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from spkd.cache import npy
from spkd.cache.card import Card, Part
from spkd.cache.folder import most_bytes, plan_path
from spkd.cache.layout import shard_rows
from spkd.corpus.audio import SAMPLE_RATE
from spkd.corpus.manifest import Manifest, Utterance
from spkd.corpus.view import VIEW_COLUMNS, Views
from spkd.errors import SpkdError, UsageError
from spkd.files.atomic import writing
from spkd.files.packed import PackedTexts
from spkd.files.reading import read_bytes
from spkd.files.spool import spooled, stretches
from spkd.outputs.target import Target

UNLABELLED = -1
AT_ONCE = 1 << 20  # views that are looked at together


class Tables(ABC):
    """What follows from the columns of a plan.

    Attributes:
        labelled: whether every utterance has a speaker label.
        factors: sorted codes, as of `factors_of`, of the pairs of speed and formant factor that the views have.
        classes: sorted keys, as of `class_keys`, of the classes of the labelled views.
    """

    labelled: bool
    factors: np.ndarray
    classes: np.ndarray

    @abstractmethod
    def begins(self, target: Target) -> np.ndarray:
        """(views,) first row of every view of a frame-level target within its shard."""

    @abstractmethod
    def views_of(self, utterances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(B,) first view of each utterance (B,), and (B,) the view after its last."""


class Computed(Tables):
    """What follows from columns in memory, computed when it is asked for."""

    def __init__(self, views: Views, speaker: np.ndarray, first: np.ndarray) -> None:
        self._views, self._speaker, self._first = views, speaker, first
        self._begins: dict[tuple[int | None, int], np.ndarray] = {}

    @cached_property
    def labelled(self) -> bool:  # type: ignore[override]
        return bool((self._speaker != UNLABELLED).all())

    @cached_property
    def _factors(self) -> np.ndarray:
        return factors_of(self._views.speed, self._views.formants)

    @cached_property
    def factors(self) -> np.ndarray:  # type: ignore[override]
        return np.unique(self._factors)

    @cached_property
    def classes(self) -> np.ndarray:  # type: ignore[override]
        keys = class_keys(self._speaker[self._views.utterance], self._factors)
        return np.unique(keys[keys >= 0])

    def begins(self, target: Target) -> np.ndarray:
        kind = target.hop, target.window
        if kind not in self._begins:
            ends = np.cumsum(target.num_frames(self._views.samples))
            before = np.concatenate([[0], ends[self._first[1:-1] - 1]])  # rows of the units before each
            self._begins[kind] = np.concatenate([[0], ends[:-1]]) - np.repeat(before, np.diff(self._first))
        return self._begins[kind]

    def views_of(self, utterances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        column = self._views.utterance
        return np.searchsorted(column, utterances), np.searchsorted(column, utterances, side="right")


class Relabelled(Tables):
    """Tables of a plan whose utterances have other speakers than those of the manifest.

    Args:
        speaker: (utterances,) number of the speaker of each utterance, or UNLABELLED.
    """

    def __init__(self, tables: Tables, views: Views, speaker: np.ndarray) -> None:
        self._tables, self._views, self._speaker = tables, views, speaker

    @cached_property
    def labelled(self) -> bool:  # type: ignore[override]
        return bool((self._speaker != UNLABELLED).all())

    @cached_property
    def factors(self) -> np.ndarray:  # type: ignore[override]
        return self._tables.factors

    @cached_property
    def classes(self) -> np.ndarray:  # type: ignore[override]
        found = np.zeros(0, np.int64)
        for start in range(0, len(self._views), AT_ONCE):
            rows = self._views[start : start + AT_ONCE]
            keys = class_keys(self._speaker[rows.utterance], factors_of(rows.speed, rows.formants))
            found = np.union1d(found, keys[keys >= 0])
        return found

    def begins(self, target: Target) -> np.ndarray:
        return self._tables.begins(target)

    def views_of(self, utterances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._tables.views_of(utterances)


@dataclass(frozen=True)
class SpeechColumns:
    """Speech of the utterances of a plan, as of `spkd.corpus.utterance.Speech`, in columns.

    Attributes:
        end: (utterances,) number of stretches of each utterance and those before it.
        whole: (utterances,) duration of each utterance with its silence (ms).
        first: (stretches,) first sample of each stretch.
        last: (stretches,) the sample after its last.
    """

    end: np.ndarray
    whole: np.ndarray
    first: np.ndarray
    last: np.ndarray

    @classmethod
    def of(cls, manifest: Manifest) -> SpeechColumns | None:
        """The speech of the utterances of a manifest; None where they are whole."""
        columns = manifest.utterances
        if np.isnan(columns.whole).any():
            return None
        whole = np.rint(columns.whole * 1000).astype(np.int64)
        return cls(columns.ends, whole, *(column.astype(np.int32) for column in columns.stretches.T))

    @classmethod
    def join(cls, columns: Sequence[SpeechColumns | None]) -> SpeechColumns | None:
        """The columns of several plans, one after the other; None where those of one are missing."""
        known = [each for each in columns if each is not None]
        if len(known) < len(columns):
            return None
        before = np.cumsum([0, *(len(each.first) for each in known)])
        return cls(
            np.concatenate([each.end + count for each, count in zip(known, before.tolist(), strict=False)]),
            *(np.concatenate([getattr(each, name) for each in known]) for name in ("whole", "first", "last")),
        )

    def stretches(self, utterance: int) -> list[tuple[int, int]]:
        """Stretches of speech of an utterance."""
        begin, end = int(self.end[utterance - 1]) if utterance else 0, int(self.end[utterance])
        return list(zip(self.first[begin:end].tolist(), self.last[begin:end].tolist(), strict=True))

    def are_wrong(self, utterances: int) -> bool:
        """Whether they are not columns of so many utterances, each of which has stretches in order."""
        counts = np.diff(self.end, prepend=0)
        if len(self.end) != utterances or len(self.whole) != utterances or (counts < 1).any():
            return True
        if len(self.first) != self.end[-1] or len(self.last) != self.end[-1]:
            return True
        later = np.ones(len(self.first), bool)
        later[self.end[:-1]] = False  # stretches that follow one of the same utterance
        overlap = self.first[1:][later[1:]] < self.last[:-1][later[1:]]
        return bool((self.first < 0).any() or (self.last <= self.first).any() or overlap.any())


@dataclass(frozen=True)
class Plan:
    """Views of a cache, and their division into units and parts.

    What has a number for each view or utterance is an array, or a column that is indexed like one (`mapped.Lazy`).

    Attributes:
        utterances: ids of the utterances from which the views are cut.
        speakers: sorted names of the speakers.
        speaker: (utterances,) index in `speakers`, or UNLABELLED.
        first: (units + 1,) first view of every unit, and the number of views.
        unit_views: largest number of views in one unit.
        unit_seconds: most audio in one unit (s).
        mapped: what follows from the columns, where it is in a file; None: it is computed.
        speech: speech of which views are taken; None where they are taken of whole utterances.
        of_manifest: speakers of the manifest, where `speakers` are others; (): they are the same.
    """

    views: Views
    utterances: Sequence[str]
    speakers: Sequence[str]
    speaker: np.ndarray
    first: np.ndarray
    unit_views: int
    unit_seconds: float
    mapped: Tables | None = None
    speech: SpeechColumns | None = None
    of_manifest: Sequence[str] = ()

    def relabelled(self, speakers: Sequence[str], speaker: np.ndarray) -> Plan:
        """The same views with other speakers than those of the manifest.

        Args:
            speakers: sorted names of the speakers.
            speaker: (utterances,) index in `speakers` of each utterance, or UNLABELLED.
        """
        tables = Relabelled(self.tables, self.views, speaker)
        return dataclasses.replace(self, speakers=speakers, speaker=speaker, mapped=tables, of_manifest=self.speakers)

    @cached_property
    def tables(self) -> Tables:
        """What follows from the columns."""
        return Computed(self.views, self.speaker, self.first) if self.mapped is None else self.mapped

    def view_name(self, view: int) -> str:
        """Id of a view's utterance, followed by the number of the view where utterances have several."""
        utterance = self.views.utterance[view]
        if len(self.views) == len(self.utterances):
            return self.utterances[int(utterance)]
        return f"{self.utterances[int(utterance)]} view {view - int(self.tables.views_of(utterance[None])[0][0])}"

    @property
    def units(self) -> int:
        return len(self.first) - 1

    def unit(self, number: int) -> range:
        return range(int(self.first[number]), int(self.first[number + 1]))

    def units_of(self, views: np.ndarray) -> np.ndarray:
        """Numbers (B,) of the units of views (B,)."""
        return np.searchsorted(self.first, views, side="right") - 1

    def shard_rows(self, target: Target) -> int:
        """Number of rows of every shard of a target."""
        return shard_rows(target, self.unit_views, self.unit_seconds)

    def begins(self, target: Target, views: np.ndarray) -> np.ndarray:
        """(B,) first row of each view (B,) within its shard."""
        if target.hop is None:
            return views - self.first[self.units_of(views)]
        return self.tables.begins(target)[views]

    def places(self, target: Target, views: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(B,) first row of each view (B,) within its shard, and (B,) its number of rows."""
        return self.begins(target, views), target.num_frames(self.views.samples[views])

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
        columns = manifest.utterances
        numbers = np.array([*(index_of.get(name, UNLABELLED) for name in columns.speakers), UNLABELLED], np.int32)
        speaker = spooled(np.int32, (numbers[part] for part in stretches(columns.speaker)))
        speech = SpeechColumns.of(manifest)
        return cls(views, manifest.ids, speakers, speaker, np.array(first), unit_views, unit_seconds, speech=speech)

    @classmethod
    def join(cls, plans: Sequence[Plan]) -> Plan:
        """One plan of several with disjoint utterances, in order. Speakers with the same name are one speaker."""
        if len(plans) == 1:
            return plans[0]
        speakers = sorted({name for plan in plans for name in plan.speakers})
        index_of = {name: i for i, name in enumerate(speakers)}
        views, speaker, first = [], [], [np.zeros(1, np.int64)]
        utterances, count = [PackedTexts.of(plan.utterances) for plan in plans], 0
        # Shift utterances, speakers and units of each plan by those of the plans before it.
        for plan in plans:
            views.append(dataclasses.replace(plan.views, utterance=plan.views.utterance + np.int32(count)))
            known = np.array([*(index_of[name] for name in plan.speakers), UNLABELLED], np.int32)
            speaker.append(known[plan.speaker])
            first.append(plan.first[1:] + first[-1][-1])
            count += len(plan.utterances)
        columns = zip(*(v.columns().values() for v in views), strict=True)
        return cls(
            Views(*map(np.concatenate, columns)),
            PackedTexts.join(utterances),
            speakers,
            np.concatenate(speaker),
            np.concatenate(first),
            plans[0].unit_views,
            plans[0].unit_seconds,
            speech=SpeechColumns.join([plan.speech for plan in plans]),
        )

    def save(self, root: Path, part: int) -> None:
        """Write the file of a plan of one part."""
        with writing(root / plan_path(part)) as file:
            np.savez(file, **self._arrays())

    def to_bytes(self) -> bytes:
        """Content of the file of a plan of one part; the same plan always gives the same bytes."""
        out = io.BytesIO()
        np.savez(out, **self._arrays())
        return out.getvalue()

    def _arrays(self) -> dict[str, Any]:
        """The arrays of the file, by name."""
        return {
            **self.views.columns(),
            **_pack("utterances", self.utterances),
            **_pack("speakers", self.speakers),
            "utterance_speaker": self.speaker,
            "first": self.first,
            "unit": np.array([self.unit_views, self.unit_seconds]),
            **({} if self.speech is None else {f"speech_{name}": getattr(self.speech, name) for name in SPEECH}),
        }

    @classmethod
    def load(cls, root: Path, card: Card) -> Plan:
        """The plan of all parts that a card names.

        Raises:
            SpkdError: a file is missing or damaged, or is not of this card.
        """
        return cls.join(cls.load_parts(root, card))

    @classmethod
    def load_parts(cls, root: Path, card: Card) -> list[Plan]:
        """The plan of each part; errors as of `load`."""
        plans = []
        for number in range(len(card.parts)):
            path = root / plan_path(number)
            plans.append(cls.read(read_bytes(path, most_bytes(card)), card, number, str(path)))
        return plans

    @classmethod
    def read(cls, data: bytes, card: Card, number: int, where: str) -> Plan:
        """The plan of one part of a card, from the bytes of its file.

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
        if any(PackedTexts.of(names).repeated() is not None for names in (self.utterances, self.speakers)):
            return "an utterance or a speaker is listed twice"
        if (self.speech is None) != (card.views.vad is None):
            return "it has the speech of utterances, or lacks it, other than the card says"
        if self.speech is not None and self.speech.are_wrong(len(self.utterances)):
            return "its stretches of speech are not those of its utterances"
        return None

    @classmethod
    def _parse(cls, data: bytes, where: str) -> Plan:
        try:
            arrays = _unzip(data)
            unit_views, unit_seconds = _column(arrays, "unit", "f8")
            return cls(
                Views(*(_column(arrays, name, kind) for name, kind in VIEW_COLUMNS.items())),
                _unpack(arrays, "utterances"),
                list(_unpack(arrays, "speakers")),
                _column(arrays, "utterance_speaker", "i4"),
                _column(arrays, "first", "i8"),
                int(unit_views),
                float(unit_seconds),
                speech=SpeechColumns(*(_column(arrays, f"speech_{name}", kind) for name, kind in SPEECH.items()))
                if "speech_end" in arrays
                else None,
            )
        except (ValueError, KeyError, IndexError, OSError, EOFError, OverflowError, *ZIP_ERRORS) as error:
            raise SpkdError(
                f"{where}: damaged ({' '.join(str(error).split())[:120] or type(error).__name__})"
            ) from error


FACTORS_BELOW = 10**6  # codes of pairs of factors are below this


def factors_of(speed: np.ndarray, formants: np.ndarray) -> np.ndarray:
    """Code of each pair of a speed and a formant factor: both are hundredths below 1,000."""
    speeds, factors = (np.rint(np.asarray(values) * 100).astype(np.int64) for values in (speed, formants))
    return 1000 * speeds + factors


def class_keys(speaker: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Key of the class of each view, by which classes are sorted by speaker; negative where the speaker is unknown."""
    return np.asarray(speaker).astype(np.int64) * FACTORS_BELOW + factors


SPEECH = {"end": "i8", "whole": "i8", "first": "i4", "last": "i4"}
ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, struct.error)


def _unzip(data: bytes) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, by name.

    Plans are stored uncompressed, and their members cannot be larger than the file together.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        if any(m.compress_type for m in members) or sum(m.file_size for m in members) > len(data):
            raise ValueError("members that are compressed or larger than the file")
        return {m.filename.removesuffix(".npy"): npy.parse(archive.read(m)) for m in members}


def _column(arrays: Mapping[str, np.ndarray], name: str, kind: str) -> np.ndarray:
    values = arrays[name]
    if values.dtype != np.dtype(f"<{kind}") or values.ndim != 1:
        raise ValueError(f"{name} has the type {values.dtype} and the shape {values.shape}")
    return values


def _pack(name: str, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Strings as one array of bytes, and an array with the end of each: readable without pickle, fast for millions."""
    packed = PackedTexts.of(texts)
    return {name: packed.data, f"{name}_end": packed.ends}


def _unpack(arrays: Mapping[str, np.ndarray], name: str) -> PackedTexts:
    texts = PackedTexts(_column(arrays, name, "u1"), _column(arrays, f"{name}_end", "i8"))
    if texts.is_damaged():
        raise ValueError(f"{name} overlap, or are no texts")
    return texts


def with_speech(manifest: Manifest, plan: Plan) -> Manifest:
    """A measured manifest with the speech that a plan has of its utterances; others, and changed ones, stay whole."""
    if plan.speech is None:
        return manifest
    number = PackedTexts.of(plan.utterances).places
    columns = SpeechColumns(*(np.asarray(getattr(plan.speech, name)) for name in SPEECH))
    whole = columns.whole.tolist()

    def cut(utterance: Utterance) -> Utterance:
        index = number.get(utterance.id)
        if index is None or utterance.speech is not None or round((utterance.duration or 0.0) * 1000) != whole[index]:
            return utterance
        return utterance.of_speech(columns.stretches(index), SAMPLE_RATE)

    return Manifest(map(cut, manifest), manifest.source, manifest.notes)


def part_of(manifest: Manifest, plan: Plan) -> Part:
    """The card's entry for a part."""
    hours = round(manifest.seconds / 3600, 3)
    return Part(manifest.digest, len(manifest), hours, len(plan.views), plan.units)
