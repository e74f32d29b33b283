"""Utterances of a manifest in columns, since as many objects take five times the memory and slow down every fork."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from spkd.corpus.utterance import Speech, Utterance
from spkd.files.packed import PackedTexts, Packing
from spkd.files.spool import Spool, numbers_in, rows_of, spooled, stretches

CHUNK = 1 << 13  # utterances that are put into columns together
NONE = -1  # number of an unknown speaker, and of all channels

Attributes = tuple[tuple[str, str], ...]


@dataclass(frozen=True, eq=False)
class Columns(Sequence[Utterance]):
    """N utterances; an `Utterance` is made where one is asked for.

    Paths are kept in two parts: that of the folder or container, which many have in common, and the rest.

    Attributes:
        ids: (N,).
        folders: the distinct beginnings of paths, or nearly so.
        folder: (N,) number in `folders`, int32.
        names: (N,) the rest of each path.
        speakers: the distinct speakers, in the order in which they come.
        speaker: (N,) number in `speakers`, or NONE; int32.
        duration: (N,) duration (s), NaN where it is not known; float64.
        start: (N,) start within the file (s); float64.
        channel: (N,) channel, or NONE; int32.
        kinds: the distinct attributes.
        kind: (N,) number in `kinds`, int32.
        whole: (N,) duration with silence (s), NaN where no speech is known; float64.
        ends: (N,) number of stretches of speech of each utterance and those before it, int64.
        stretches: (stretches, 2) as of `Speech`, int64.
    """

    ids: PackedTexts
    folders: PackedTexts
    folder: np.ndarray
    names: PackedTexts
    speakers: Sequence[str]
    speaker: np.ndarray
    duration: np.ndarray
    start: np.ndarray
    channel: np.ndarray
    kinds: Sequence[Attributes]
    kind: np.ndarray
    whole: np.ndarray
    ends: np.ndarray
    stretches: np.ndarray

    @classmethod
    def of(cls, utterances: Iterable[Utterance]) -> Columns:
        """These utterances, which are taken one by one; those that are in columns already, as they are."""
        if isinstance(utterances, Columns):
            return utterances
        made, rest = Filled(), iter(utterances)
        while made.add(islice(rest, CHUNK)):
            pass
        return made.columns()

    @classmethod
    def join(cls, parts: Sequence[Columns]) -> Columns:
        """The utterances of several, one after the other."""
        if len(parts) == 1:
            return parts[0]
        made = Filled()
        for part in parts:
            made.add_columns(part)
        return made.columns()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, key: Any) -> Any:
        """An utterance, or a tuple of those of a slice."""
        if isinstance(key, slice):
            return tuple(self[number] for number in range(*key.indices(len(self))))
        number = range(len(self))[int(key)]
        values = (getattr(self, name)[number].item() for name in VALUES)
        return self._made(number, self.ids[number], self.path(number), *values)

    def __iter__(self) -> Iterator[Utterance]:
        texts = zip(self.ids, self.paths(), strict=True)
        for start in range(0, len(self), CHUNK):
            rows = zip(*(getattr(self, name)[start : start + CHUNK].tolist() for name in VALUES), strict=True)
            for number, values in enumerate(rows, start):
                yield self._made(number, *next(texts), *values)

    def path(self, number: int) -> str:
        """Path of an utterance."""
        path: str = self.folders[int(self.folder[number])] + self.names[number]
        return path

    def paths(self) -> Iterator[str]:
        """Path of each utterance."""
        names, last, begin = iter(self.names), NONE, ""
        for start in range(0, len(self), CHUNK):
            for folder in self.folder[start : start + CHUNK].tolist():
                if folder != last:
                    last, begin = folder, self.folders[folder]
                yield begin + next(names)

    def _made(
        self,
        number: int,
        identity: str,
        path: str,
        speaker: int,
        duration: float,
        start: float,
        channel: int,
        kind: int,
    ) -> Utterance:
        return Utterance(
            identity,
            path,
            None if speaker == NONE else self.speakers[speaker],
            None if duration != duration else duration,
            start,
            None if channel == NONE else channel,
            self.kinds[kind],
            self._speech(number),
        )

    def _speech(self, number: int) -> Speech | None:
        whole = float(self.whole[number])
        if whole != whole:
            return None
        begin, end = int(self.ends[number - 1]) if number else 0, int(self.ends[number])
        return Speech(tuple((first, last) for first, last in self.stretches[begin:end].tolist()), whole)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(self) != len(other):
            return False
        return all(mine == its for mine, its in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def take(self, numbers: np.ndarray) -> Columns:
        """The utterances of the given numbers (B,), or those of a mask (N,), in this order."""
        ends, found = Spool(np.int64), Spool(np.int64, (2,))
        for part in numbers_in(numbers):
            rows, taken = rows_of(part, self.ends)
            ends.add(taken + len(found))
            found.add(self.stretches[rows])
        taken_numbers: dict[str, Any] = {
            name: spooled(dtype, (getattr(self, name)[part] for part in numbers_in(numbers)))
            for name, dtype in NUMBERS.items()
        }
        return dataclasses.replace(
            self,
            ids=self.ids.take(numbers),
            names=self.names.take(numbers),
            ends=ends.array(),
            stretches=found.array(),
            **taken_numbers,
        )

    def speaking(self, names: Sequence[str | None]) -> Columns:
        """The utterances with other names of the speakers.

        Args:
            names: for each of `speakers` its name; None where it is unknown.
        """
        numbers: dict[str, int] = {}
        places = [NONE if name is None else numbers.setdefault(name, len(numbers)) for name in names]
        table = np.array([*places, NONE], np.int32)
        speaker = spooled(np.int32, (table[part] for part in stretches(self.speaker)))
        return dataclasses.replace(self, speakers=list(numbers), speaker=speaker)

    def spoken(self) -> np.ndarray:
        """Number of utterances of each of `speakers`."""
        counts = np.zeros(len(self.speakers), np.int64)
        for part in stretches(self.speaker):
            counts += np.bincount(part[part != NONE], minlength=len(counts))
        return counts


VALUES = ("speaker", "duration", "start", "channel", "kind")  # of which an utterance is made, besides id and path
# Columns of numbers, one for each utterance, with their types.
NUMBERS = {
    "folder": np.int32,
    "speaker": np.int32,
    "duration": np.float64,
    "start": np.float64,
    "channel": np.int32,
    "kind": np.int32,
    "whole": np.float64,
}


class Filled:
    """Columns that are being filled, of which the large ones are in temporary files."""

    def __init__(self) -> None:
        self._speakers: dict[str, int] = {}
        self._kinds: dict[Attributes, int] = {(): 0}
        self._ids, self._folders, self._names = Packing(), Packing(), Packing()
        self._numbers = {name: Spool(dtype) for name, dtype in NUMBERS.items()}
        self._ends, self._stretches = Spool(np.int64), Spool(np.int64, (2,))
        self._count = self._folder_count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, utterances: Iterable[Utterance]) -> int:
        """Add utterances, which are in memory together. Returns their number."""
        chunk = list(utterances)
        if not chunk:
            return 0
        folders: dict[str, int] = {}
        speakers, kinds = self._speakers, self._kinds
        folder, names = [], []
        for u in chunk:
            at = (u.path.rfind("#") if "#" in u.path else u.path.rfind("/")) + 1
            folder.append(folders.setdefault(u.path[:at], len(folders)))
            names.append(u.path[at:])
        nothing = float("nan")
        known = [() if u.speech is None else u.speech.stretches for u in chunk]
        self._append(
            PackedTexts.of(u.id for u in chunk),
            PackedTexts.of(folders),
            PackedTexts.of(names),
            np.cumsum([len(each) for each in known], dtype=np.int64),
            np.array([pair for each in known for pair in each], np.int64).reshape(-1, 2),
            folder=folder,
            speaker=[NONE if u.speaker is None else speakers.setdefault(u.speaker, len(speakers)) for u in chunk],
            duration=[nothing if u.duration is None else u.duration for u in chunk],
            start=[u.start for u in chunk],
            channel=[NONE if u.channel is None else u.channel for u in chunk],
            kind=[kinds.setdefault(u.attributes, len(kinds)) for u in chunk],
            whole=[nothing if u.speech is None else u.speech.whole for u in chunk],
        )
        return len(chunk)

    def add_columns(self, given: Columns) -> None:
        """Add utterances that are in columns."""
        speakers = [self._speakers.setdefault(name, len(self._speakers)) for name in given.speakers]
        kinds = [self._kinds.setdefault(each, len(self._kinds)) for each in given.kinds]
        numbers = {name: getattr(given, name) for name in NUMBERS}
        numbers["speaker"] = np.array([*speakers, NONE], np.int32)[given.speaker]
        numbers["kind"] = np.array(kinds, np.int32)[given.kind]
        self._append(given.ids, given.folders, given.names, given.ends, given.stretches, **numbers)

    def _append(
        self, ids: PackedTexts, folders: PackedTexts, names: PackedTexts, ends: Any, speech: Any, **numbers: Any
    ) -> None:
        for name, values in numbers.items():
            before = self._folder_count if name == "folder" else 0
            self._numbers[name].add(np.asarray(values, NUMBERS[name]) + NUMBERS[name](before))
        self._ends.add(ends + len(self._stretches))
        self._stretches.add(speech)
        for texts, packing in ((ids, self._ids), (folders, self._folders), (names, self._names)):
            packing.add_packed(texts)
        self._count += len(ids)
        self._folder_count += len(folders)

    def columns(self) -> Columns:
        """All that was added so far."""
        return Columns(
            ids=self._ids.texts(),
            folders=self._folders.texts(),
            names=self._names.texts(),
            speakers=list(self._speakers),
            kinds=list(self._kinds),
            ends=self._ends.array(),
            stretches=self._stretches.array(),
            **{name: each.array() for name, each in self._numbers.items()},
        )
