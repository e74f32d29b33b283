"""Plans of complete caches as readers use them: mapped from files, and joined where there are several parts.

A mapped file follows from the plan of its part. It lies beside it, or in the user's cache folder where the cache cannot
be written; whoever completes the cache writes it, or whoever opens it first. It is no part of the cache: it is in no
record, and no copy takes it along.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from spkd.cache.card import Card
from spkd.cache.folder import COMPLETE, CompletionRecord, mapped_path, most_bytes, plan_path
from spkd.cache.lazy import Column, Joined, as_array
from spkd.cache.plan import FACTORS_BELOW, UNLABELLED, Plan, SpeechColumns, Tables, class_keys
from spkd.corpus.view import VIEW_COLUMNS, Views
from spkd.errors import SpkdError
from spkd.files import digest
from spkd.files.atomic import check_no_links, remove_unused, users_files
from spkd.files.mapped import AGAIN, AT_ONCE, MappedFile, NotThis, Sections, Texts, write_mapped
from spkd.files.reading import read_bytes
from spkd.outputs.target import Target

VIEWS, UTTERANCES, IDS, SPEAKERS, NAMES = "views", "utterances", "ids", "speakers", "names"
UNITS, CLASSES, FACTORS, UNKNOWN = "units", "classes", "factors", "unknown"
SPEECH, STRETCHES = "speech", "stretches"
SPEECH_OF_UTTERANCE = np.dtype([("end", "<i8"), ("whole", "<i8")])
STRETCH = np.dtype([("first", "<i4"), ("last", "<i4")])
BYTE, END, NUMBER = np.dtype([("byte", "u1")]), np.dtype([("end", "<i8")]), np.dtype([("number", "<i8")])


def open_plan(root: Path, record: CompletionRecord) -> Plan:
    """The plan of a complete cache, mapped from the files that follow from the plans of its parts.

    A file that is missing, damaged or of another plan is made again, beside the plan or, where the cache cannot be
    written, in the user's folder. Where neither can be written, the plan is held in memory.

    Raises:
        SpkdError: the plan of a part, from which the file would be made, is missing or damaged.
    """
    return joined([_open_part(root, record, part) for part in range(len(record.card.parts))])


def mend(root: Path, record: CompletionRecord) -> None:
    """Make the mapped files of a cache that are missing or damaged, or are not what follows from the plans."""
    for part in range(len(record.card.parts)):
        path, plan = root / mapped_path(part), _read_part(root, record, part)
        try:
            _check(path, record, part, plan)
        except SpkdError:
            check_no_links(root, [path.parent])
            _write(path, plan, _content(record, part))


def problems(root: Path, record: CompletionRecord) -> Iterator[str]:
    """One line for each mapped file of a cache that is damaged, or is not what follows from the plan; also the user's.

    The plans are whole. Files that are missing are no problem.
    """
    for part in range(len(record.card.parts)):
        for path in filter(Path.is_file, _paths(root, record, part)):
            try:
                _check(path, record, part, _read_part(root, record, part))
            except SpkdError as error:
                yield str(error)


def _check(path: Path, record: CompletionRecord, part: int, plan: Plan) -> None:
    """Check all that a mapped file holds: its checksums, and each byte against the plan. Raises SpkdError."""
    file = _mapped(path, record, part)[1]
    file.check()
    for name, (dtype, count, pieces) in _sections(plan, _content(record, part)).items():
        start, is_same = 0, file.matches(name, dtype, count)
        for piece in pieces if is_same else ():
            there = file.part(name, start, start + len(piece))
            is_same = is_same and there.tobytes() == np.ascontiguousarray(piece, dtype).tobytes()
            start += len(piece)
        if not is_same:
            raise SpkdError(f"{path}: not what follows from {plan_path(part)}; {AGAIN}")


def _paths(root: Path, record: CompletionRecord, part: int) -> list[Path]:
    """The mapped file of a part, and the user's own, in the order of their use."""
    name = f"{digest.of_tree(_content(record, part))}{mapped_path(part).suffix}"
    return [root / mapped_path(part), *users_files("plans", name)]


def _open_part(root: Path, record: CompletionRecord, part: int) -> Plan:
    content, paths = _content(record, part), _paths(root, record, part)
    for path in paths:
        try:
            return _mapped(path, record, part)[0]
        except NotThis:
            continue
    plan = _read_part(root, record, part)
    for path in paths:
        try:
            check_no_links(path.parent.parent, [path.parent.name])
            _write(path, plan, content)
        except (SpkdError, OSError):  # it cannot be written
            continue
        if path is not paths[0]:
            remove_unused(path.parent)
        return _mapped(path, record, part)[0]
    return plan


def _read_part(root: Path, record: CompletionRecord, part: int) -> Plan:
    """The plan of a part, from its own file. Raises SpkdError: it is missing or damaged."""
    name, where = str(plan_path(part)), str(root / plan_path(part))
    data = read_bytes(root / name, most_bytes(record.card))
    if digest.of_bytes(data) != record.sha256[name]:
        raise SpkdError(f"{where}: damaged, or of another cache (digest differs from {COMPLETE})")
    return Plan.read(data, record.card, part, where)


def _content(record: CompletionRecord, part: int) -> dict[str, Any]:
    """What a mapped file follows from: the plan, and the kinds of frames whose rows it has."""
    return {"plan": record.sha256[str(plan_path(part))], "frames": [list(kind) for kind in _frames(record.card)]}


def _frames(card: Card) -> list[tuple[int, int]]:
    """Hop and window of each kind of frames in a cache."""
    return sorted({(target.hop, target.window) for target in card.targets if target.hop is not None})


def _rows(kind: int) -> str:
    """Name of the field with the first row of each view, for a kind of frames."""
    return f"row{kind}"


class Mapped(Tables):
    """Tables of the plan of one part in its file.

    Args:
        kinds: hop and window of each kind of frames.
    """

    def __init__(self, file: MappedFile, kinds: list[tuple[int, int]]) -> None:
        self._file, self._kinds = file, kinds

    def begins(self, target: Target) -> np.ndarray:
        assert target.hop is not None
        return as_array(Column(self._file, VIEWS, _rows(self._kinds.index((target.hop, target.window)))))

    def views_of(self, utterances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        last = Column(self._file, UTTERANCES, "last")
        return np.where(utterances > 0, last[np.maximum(utterances - 1, 0)], 0), last[utterances]

    @cached_property
    def labelled(self) -> bool:  # type: ignore[override]
        return int(_numbers(self._file, UNKNOWN)[0]) == 0

    @cached_property
    def factors(self) -> np.ndarray:  # type: ignore[override]
        return _numbers(self._file, FACTORS)

    @cached_property
    def classes(self) -> np.ndarray:  # type: ignore[override]
        return _numbers(self._file, CLASSES)


def _mapped(path: Path, record: CompletionRecord, part: int) -> tuple[Plan, MappedFile]:
    """The plan of one part, and its file. Raises NotThis: the file is missing, damaged or of another plan."""
    card, size = record.card, record.card.parts[part]
    bounds = {
        VIEWS: {"utterance": (0, size.utterances - 1), "start": (0, 2**62), "samples": (1, 2**31 - 1)},
        UTTERANCES: {"end": (0, 2**62), "last": (0, size.views), "speaker": (UNLABELLED, size.utterances - 1)},
    }
    if card.views.vad is not None:
        bounds[SPEECH] = {"end": (1, 2**62), "whole": (0, 2**62)}
        bounds[STRETCHES] = {"first": (0, 2**31 - 1), "last": (1, 2**31 - 1)}
    file = MappedFile(path, _content(record, part), bounds)
    if (file.count(VIEWS), file.count(UTTERANCES)) != (size.views, size.utterances):
        raise NotThis(f"{path}: damaged (not of so many views and utterances)")
    try:
        first = np.array(_numbers(file, UNITS))
    except SpkdError as error:
        raise NotThis(str(error)) from error
    if len(first) != size.units + 1 or first[0] != 0 or first[-1] != size.views:
        raise NotThis(f"{path}: damaged (its units are not those of the card)")
    if (np.diff(first) < 1).any() or (np.diff(first) > card.unit_views).any():
        raise NotThis(f"{path}: damaged (its units are not stretches of its views)")
    plan = Plan(
        Views(*(as_array(Column(file, VIEWS, name)) for name in VIEW_COLUMNS)),
        Texts(file, IDS, UTTERANCES),
        Texts(file, NAMES, SPEAKERS),
        as_array(Column(file, UTTERANCES, "speaker")),
        first,
        card.unit_views,
        card.unit_seconds,
        Mapped(file, _frames(card)),
        None if card.views.vad is None else _speech(file),
    )
    return plan, file


def _speech(file: MappedFile) -> SpeechColumns:
    of_utterances = (as_array(Column(file, SPEECH, name)) for name in ("end", "whole"))
    of_stretches = (as_array(Column(file, STRETCHES, name)) for name in ("first", "last"))
    return SpeechColumns(*of_utterances, *of_stretches)


def _numbers(file: MappedFile, section: str) -> np.ndarray:
    return file.whole(section)["number"]


def _write(path: Path, plan: Plan, content: dict[str, Any]) -> None:
    """Write the mapped file of a plan of one part."""
    write_mapped(path, content, _sections(plan, content))


def _sections(plan: Plan, content: dict[str, Any]) -> Sections:
    """The sections of the mapped file of a plan of one part."""
    kinds = content["frames"]
    fields = [(name, f"<{kind}") for name, kind in VIEW_COLUMNS.items()] + [
        (_rows(k), "<i4") for k in range(len(kinds))
    ]
    dtype = np.dtype(fields)
    begins = [plan.tables.begins(Target("", 1, hop, window)) for hop, window in kinds]

    def views() -> Iterator[np.ndarray]:
        for start in range(0, len(plan.views), AT_ONCE):
            some = slice(start, start + AT_ONCE)
            columns = plan.views[some].columns() | {_rows(k): rows[some] for k, rows in enumerate(begins)}
            piece = np.empty(len(columns["start"]), dtype)
            for name, values in columns.items():
                piece[name] = values
            yield piece

    last = np.searchsorted(plan.views.utterance, np.arange(len(plan.utterances)), side="right")
    utterances = np.empty(len(last), [("end", "<i8"), ("last", "<i8"), ("speaker", "<i4")])
    utterances["last"], utterances["speaker"] = last, plan.speaker
    utterances["end"] = _ends(plan.utterances)
    speakers = _ends(plan.speakers).astype(END)

    def section(dtype: np.dtype, *pieces: np.ndarray) -> tuple[np.dtype, int, Sequence[np.ndarray]]:
        return dtype, sum(map(len, pieces)), [piece.astype(dtype, copy=False) for piece in pieces]

    def texts(texts: Sequence[str], ends: np.ndarray) -> tuple[np.dtype, int, Iterator[np.ndarray]]:
        pieces = (texts[start : start + AT_ONCE] for start in range(0, len(texts), AT_ONCE))
        blobs = (np.frombuffer("".join(piece).encode(), BYTE) for piece in pieces)
        return BYTE, int(ends[-1]) if len(ends) else 0, blobs

    speech: dict[str, tuple[np.dtype, int, Sequence[np.ndarray]]] = {}
    if plan.speech is not None:
        of_utterances, of_stretches = (
            np.rec.fromarrays([getattr(plan.speech, name) for name in kind.names or ()], dtype=kind)
            for kind in (SPEECH_OF_UTTERANCE, STRETCH)
        )
        speech = {
            SPEECH: section(SPEECH_OF_UTTERANCE, of_utterances),
            STRETCHES: section(STRETCH, of_stretches),
        }
    return {
        VIEWS: (dtype, len(plan.views), views()),
        UTTERANCES: section(utterances.dtype, utterances),
        IDS: texts(plan.utterances, utterances["end"]),
        SPEAKERS: section(END, speakers),
        NAMES: texts(plan.speakers, speakers["end"]),
        UNITS: section(NUMBER, plan.first),
        CLASSES: section(NUMBER, plan.tables.classes),
        FACTORS: section(NUMBER, plan.tables.factors),
        UNKNOWN: section(NUMBER, np.array([int((plan.speaker == UNLABELLED).sum())])),
        **speech,
    }


def _ends(texts: Sequence[str]) -> np.ndarray:
    return np.cumsum(np.fromiter((len(text.encode()) for text in texts), np.int64, len(texts)))


def joined(plans: Sequence[Plan]) -> Plan:
    """One plan of several with disjoint utterances, as `Plan.join` makes it, without a copy of their columns.

    Speakers with the same name are one speaker.
    """
    if len(plans) == 1:
        return plans[0]
    speakers = sorted(set().union(*(plan.speakers for plan in plans)))
    index_of = {name: i for i, name in enumerate(speakers)}
    known = [np.array([*(index_of[name] for name in plan.speakers), UNLABELLED], np.int32) for plan in plans]
    shifts = np.cumsum([0, *(len(plan.utterances) for plan in plans)]).tolist()
    columns = {name: Joined([getattr(plan.views, name) for plan in plans]) for name in VIEW_COLUMNS}
    moved = [partial(np.add, np.int32(shift)) for shift in shifts[:-1]]
    columns["utterance"] = Joined([plan.views.utterance for plan in plans], moved)
    ends = np.cumsum([0, *(len(plan.views) for plan in plans)]).tolist()
    return Plan(
        Views(*map(as_array, columns.values())),
        _JoinedTexts([plan.utterances for plan in plans]),
        speakers,
        as_array(Joined([plan.speaker for plan in plans], [table.__getitem__ for table in known])),
        np.concatenate([[0], *(plan.first[1:] + end for plan, end in zip(plans, ends, strict=False))]),
        plans[0].unit_views,
        plans[0].unit_seconds,
        _JoinedTables(plans, known, np.array(shifts), np.array(ends)),
        _joined_speech([plan.speech for plan in plans]),
    )


def _joined_speech(columns: Sequence[SpeechColumns | None]) -> SpeechColumns | None:
    """As `SpeechColumns.join`, without a copy."""
    known = [each for each in columns if each is not None]
    if len(known) < len(columns):
        return None
    before = np.cumsum([0, *(len(each.first) for each in known)]).tolist()
    end = Joined([each.end for each in known], [partial(np.add, np.int64(count)) for count in before[:-1]])
    others = (Joined([getattr(each, name) for each in known]) for name in ("whole", "first", "last"))
    return SpeechColumns(as_array(end), *map(as_array, others))


class _JoinedTables(Tables):
    """Tables of several plans.

    Args:
        known: for each plan, the joint number of each of its speakers.
        utterances: (plans + 1,) first utterance of each plan, and their number.
        views: (plans + 1,) first view of each plan, and their number.
    """

    def __init__(
        self, plans: Sequence[Plan], known: Sequence[np.ndarray], utterances: np.ndarray, views: np.ndarray
    ) -> None:
        self._tables = [plan.tables for plan in plans]
        self._known, self._utterances, self._views = known, utterances, views

    def begins(self, target: Target) -> np.ndarray:
        return as_array(Joined([tables.begins(target) for tables in self._tables]))

    def views_of(self, utterances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        first, last = np.empty((2, len(utterances)), np.int64)
        which = np.searchsorted(self._utterances, utterances, side="right") - 1
        for part in np.unique(which).tolist():
            inside = which == part
            stretch = self._tables[part].views_of(utterances[inside] - self._utterances[part])
            first[inside], last[inside] = (views + self._views[part] for views in stretch)
        return first, last

    @cached_property
    def labelled(self) -> bool:  # type: ignore[override]
        return all(tables.labelled for tables in self._tables)

    @cached_property
    def factors(self) -> np.ndarray:  # type: ignore[override]
        return np.unique(np.concatenate([tables.factors for tables in self._tables]))

    @cached_property
    def classes(self) -> np.ndarray:  # type: ignore[override]
        keys = []
        for tables, known in zip(self._tables, self._known, strict=True):
            speaker, factors = np.divmod(tables.classes, FACTORS_BELOW)
            keys.append(class_keys(known[speaker], factors))
        return np.unique(np.concatenate(keys))


class _JoinedTexts(Sequence[str]):
    def __init__(self, parts: Sequence[Sequence[str]]) -> None:
        self._parts = parts

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            return [self[number] for number in range(len(self))[key]]
        number = range(len(self))[key]
        for part in self._parts:
            if number < len(part):
                return part[number]
            number -= len(part)
        raise IndexError(key)

    def __iter__(self) -> Iterator[str]:
        for part in self._parts:
            yield from part
