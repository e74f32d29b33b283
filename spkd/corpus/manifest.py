"""Manifests: lists of utterances with their audio, speakers and durations.

Manifests are written as CSV (`utt,path,speaker,duration[,start][,channel]`) and JSON lines (NeMo's keys). They are
read in these formats and in those of other tools, by the readers of spkd/corpus/manifests, and built from folders of
audio. `manifests/README.md` shows a small example of each format.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from spkd.corpus.address import file_of, is_elsewhere, parse, relative_path, state_of_audio, state_of_container
from spkd.corpus.audio import AUDIO_SUFFIXES, MAX_SECONDS, OTHER_SUFFIXES, AudioError, probe
from spkd.corpus.columns import CHUNK, Columns, Filled
from spkd.corpus.expected import state_text
from spkd.corpus.layouts.base import MANY, Layout
from spkd.corpus.manifests.audiofolder import METADATA
from spkd.corpus.manifests.fields import HEADER as HEADER
from spkd.corpus.manifests.fields import STATE, may_be_unknown, stands_for_unknown
from spkd.corpus.manifests.json_lines import JSONLines
from spkd.corpus.manifests.reader import Reader, Source, name_of_reader
from spkd.corpus.manifests.several import Several
from spkd.corpus.manifests.table import Table
from spkd.corpus.mapped_manifest import Content, MappedManifest
from spkd.corpus.shards import holds_audio, suffixes
from spkd.corpus.utterance import Utterance as Utterance
from spkd.corpus.written import KEYS, row_writer
from spkd.errors import SpkdError, UsageError, bracketed, did_you_mean, first_few
from spkd.files import digest
from spkd.files.atomic import find_files, write_json, writing
from spkd.files.packed import PackedTexts
from spkd.files.reading import State, read_json
from spkd.files.spool import stretches
from spkd.files.text import counted
from spkd.progress import log, track
from spkd.registry import LAYOUTS, MANIFEST_READERS

IN_FOLDERS = ("wav.scp", *METADATA)  # files by which folders are manifests
SUFFIXES = (".csv", ".jsonl")  # of manifests that are written
CHECKED = 1 << 14  # utterances after which repeated ids are looked for, and then again after four times as many
MOST_CONTAINERS = 1 << 12  # whose states are kept while a manifest is written


class Manifest:
    """An ordered set of utterances with unique ids.

    Args:
        utterances: the utterances, which are taken one by one.
        source: path of the file or folder, for messages.
        notes: remarks on what was left out or assumed when it was read.
        are_distinct: whether their ids are known to differ.
    Attributes:
        utterances: the utterances in columns, of which each is made where it is asked for.
    Raises:
        SpkdError: two utterances have one id.
    """

    def __init__(
        self,
        utterances: Iterable[Utterance],
        source: str = "",
        notes: Iterable[str] = (),
        are_distinct: bool = False,
    ) -> None:
        self.utterances, self.source, self.notes = Columns.of(utterances), source, tuple(notes)
        if not are_distinct and (repeated := self.utterances.ids.repeated()) is not None:
            raise SpkdError(f"{source}: duplicate utterance id {repeated!r}")

    def __len__(self) -> int:
        return len(self.utterances)

    def __iter__(self) -> Iterator[Utterance]:
        return iter(self.utterances)

    def __getitem__(self, index: int) -> Utterance:
        made: Utterance = self.utterances[index]
        return made

    @property
    def ids(self) -> PackedTexts:
        return self.utterances.ids

    @property
    def index_of(self) -> Mapping[str, int]:
        """Id of each utterance -> its index."""
        return self.ids.places

    def take(self, indices: np.ndarray | Sequence[int]) -> Manifest:
        """The utterances of these indices, or of a mask, in this order; the notes are left behind."""
        chosen = np.asarray(indices) if len(indices) else np.zeros(0, np.int64)
        return Manifest(self.utterances.take(chosen), self.source, are_distinct=chosen.dtype == bool)

    def pick(self, ids: Sequence[str]) -> Manifest | None:
        """The utterances with these ids, in this order; None where one is missing."""
        if len(ids) == len(self) and all(map(str.__eq__, ids, self.ids)):
            return self
        indices = np.fromiter((self.index_of.get(name, -1) for name in ids), np.int64)
        return None if (indices < 0).any() else self.take(indices)

    @classmethod
    def join(cls, manifests: Sequence[Manifest], source: str) -> Manifest:
        """The utterances of several manifests, one after the other."""
        return cls(Columns.join([manifest.utterances for manifest in manifests]), source)

    @property
    def speakers(self) -> list[str]:
        """Sorted names of the labelled speakers."""
        columns = self.utterances
        return sorted(name for name, count in zip(columns.speakers, columns.spoken(), strict=True) if count)

    @property
    def seconds(self) -> float:
        """Total measured duration (s)."""
        # One after the other, since this becomes a part of a cache's identity; np.sum adds in another order.
        total = 0.0
        for part in stretches(self.utterances.duration):
            total = float(np.cumsum(np.append(total, np.nan_to_num(part, nan=0.0)))[-1])
        return total

    @cached_property
    def digest(self) -> str:
        """SHA-256 over ids, speakers, starts, durations (ms), channels and speech, but not over paths of the audio."""
        return digest.of_blocks(identity(u) for u in self.utterances)

    @classmethod
    def load(cls, path: str | Path, columns: Sequence[str] = ()) -> Manifest:
        """Read a manifest of any format in MANIFEST_READERS, and print its notes.

        Paths in a manifest are relative to its folder.

        Args:
            path: a file, gzipped or not, or a folder.
            columns: further columns to keep as attributes; of a Kaldi folder, its files utt2COLUMN or spk2COLUMN.
        Raises:
            UsageError: the file is missing, of no known format, or without such a column.
            SpkdError: a malformed line (file and line named), or a duplicate id.
        """
        path = Path(path)
        kind = _reader_of(path)
        reader, kept = kind(Source(path), columns), None
        if kind in (Table, JSONLines):  # of which nothing but the file decides what is read
            kept = MappedManifest.of(path, columns)
        if kept is None or (manifest := cls._mapped(reader, kept)) is None:
            manifest = cls._parsed(reader)
            if kept is not None:
                states = [(container, *stated) for container, stated in reader.states.items()]
                kept.write(Content(manifest.utterances, manifest.notes, states, manifest.digest))
                manifest = cls._mapped(reader, kept) or manifest
        for text in manifest.notes:
            log(f"note: {path}: {text}")
        return manifest

    @classmethod
    def _parsed(cls, reader: Reader) -> Manifest:
        """The manifest that a reader reads. Raises as `load`."""
        path = reader.source.path
        named, note = _named(_read(reader), path.parent)
        if not len(named):
            raise SpkdError(f"{path}: holds no utterances")
        normal, merged = _in_one_form(named)
        utterances, unknown = _without_placeholders(normal)
        manifest = cls(utterances, str(path), (*reader.notes, *note, *merged, *unknown, *_counted(reader, utterances)))
        for name in reader.columns:
            if not any(utterance.attribute(name) for utterance in manifest):
                near = bracketed("by", name) or _near(name, Source(path))
                raise UsageError(f"{path}: no column {name!r}, or nothing in it{near}")
        return manifest

    @classmethod
    def _mapped(cls, reader: Reader, kept: MappedManifest) -> Manifest | None:
        """The manifest by its mapped file; None where there is none. Raises SpkdError: a container has changed."""
        if (content := kept.read()) is None:
            return None
        for container, there, where in content.states:
            reader.check_container(container, there, where)
        manifest = cls(content.columns, str(reader.source.path), content.notes, are_distinct=True)
        manifest.digest = content.digest
        return manifest

    def save(self, path: str | Path) -> None:
        """Write the manifest as CSV or JSON lines, by the suffix.

        Paths are relative to the folder of the manifest where they lie below it.

        Raises:
            UsageError: another suffix.
        """
        path = Path(path)
        check_suffix(path)
        folder = path.parent.resolve()
        places = _Places(folder)
        rows = (_row(u) | places.of(u.path) for u in self)
        with writing(path) as file:
            fields = [*HEADER]
            fields += ["channel"] if (self.utterances.channel >= 0).any() else []
            fields += [STATE] if any(STATE in places.of(path) for path in self.utterances.paths()) else []
            write = row_writer(file, path, fields)
            for row in rows:
                write(row)


def _row(u: Utterance) -> dict[str, Any]:
    """Values of an utterance as manifests that are written have them, by the columns of tables."""
    return {"utt": u.id, "speaker": u.speaker, "duration": u.duration, "start": u.start, "channel": u.channel}


def _reader_of(path: Path) -> type[Reader]:
    """The first reader that recognises a file."""
    if not path.exists() and not Several.recognises(Source(path)):
        out = shlex.quote(str(path if path.suffix in SUFFIXES else path.with_suffix(".csv")))
        raise UsageError(f"no manifest {path}; make one with `spkd manifest AUDIO_FOLDER --out {out}`")
    if (kind := name_of_reader(Source(path))) is not None:
        reader: type[Reader] = MANIFEST_READERS[kind]
        return reader
    if path.is_dir():
        command = f"spkd manifest {shlex.quote(str(path))}"
        raise UsageError(f"{path}: a folder without wav.scp; if it holds audio, make a manifest with `{command}`")
    known = "; ".join(reader.describes for reader in MANIFEST_READERS.values())
    raise UsageError(f"{path}: unknown manifest format; known: {known}")


def is_manifest(name: str, layout: str | None = None) -> bool:
    """Whether a file or folder of this machine is a manifest of another tool or of spkd.

    Args:
        layout: the layout that was asked for: with one, a folder of audio is no manifest, whatever lists are in it.
    """
    path = Path(name)
    if is_elsewhere(name) or (layout is not None and path.is_dir() and holds_audio(path)):
        return False
    source = Source(path)
    kind = name_of_reader(source)
    return kind not in (None, "containers") and (kind != "several" or not name.endswith(suffixes()))


def _note_folder(manifest: Manifest, folder: str | Path) -> None:
    """Print of a manifest that is a folder of audio, too, how it was read, and how many files it does not name."""
    root = Path(folder)
    if not root.is_dir() or not holds_audio(root):
        return
    named = {os.path.realpath(path) for path in set(manifest.utterances.paths())}
    files, _ = find_files(root, AUDIO_SUFFIXES)
    others = [str(path.relative_to(root)) for path in files if os.path.realpath(path) not in named]
    log(f"note: {folder}: read as {name_of_reader(Source(root))}; --layout NAME takes the files of audio in it instead")
    if others:
        log(f"note: {folder}: files of audio that no line of it names: {len(others):,} (first: {others[0]})")


def _read(reader: Reader) -> Columns:
    """The utterances of a manifest in columns. Repeated ids are found while it is read: a short file could hold one
    without end.

    Raises:
        SpkdError: an utterance is there twice.
    """
    source, path = reader.source, reader.source.path
    made, due, rest = Filled(), 4 * CHECKED, _distinct(reader.utterances(), path)
    size = path.stat().st_size if path.is_file() else 0
    with track(f"reading {path}", size >> 20, "MB") as bar:
        while made.add(islice(rest, CHUNK)):
            bar.total = max(bar.total, source.taken >> 20)
            bar.advance((source.taken >> 20) - bar.done)
            if len(made) >= due:
                due *= 4
                _check_distinct(made.columns(), path)
    columns = made.columns()
    _check_distinct(columns, path)
    return columns


def _distinct(utterances: Iterator[Utterance], path: Path) -> Iterator[Utterance]:
    """The utterances, of which the first ones are compared with one another. Raises SpkdError: one is there twice."""
    seen = set[str]()
    for u in islice(utterances, CHECKED):
        if (name := _name_of(u)) in seen:
            raise SpkdError(f"{path}: duplicate utterance id {name!r}")
        seen.add(name)
        yield u
    yield from utterances


def _check_distinct(columns: Columns, path: Path) -> None:
    """Check that no utterance is there twice. Raises SpkdError."""
    names = PackedTexts.of(map(_name_of, columns)) if columns.ids.empty else columns.ids
    if (repeated := names.repeated()) is not None:
        raise SpkdError(f"{path}: duplicate utterance id {repeated!r}")


def _name_of(u: Utterance) -> str:
    """Id of an utterance or, where it has none, its place."""
    return u.id or f"{u.path}@{u.start}{_side(u)}"


def _side(u: Utterance) -> str:
    return "" if u.channel is None else f":{u.channel}"


def _named(columns: Columns, folder: Path) -> tuple[Columns, list[str]]:
    """Give an id to the utterances that have none.

    The id is the stem of the file's name. Where stems repeat, it is the path as the manifest has it; where paths repeat
    too, it is `path@start` (seconds), `path:channel` or `path@start:channel`.

    Args:
        columns: the utterances; an id of "" is missing.
    Returns:
        The utterances, and a note where stems repeat.
    """
    if not (missing := columns.ids.empty):
        return columns, []

    def path(u: Utterance) -> str:
        return u.path.removeprefix(f"{folder}/")

    ways: dict[str, Callable[[Utterance], str]] = {
        "": lambda u: Path(u.path).stem,
        "their paths": path,
        "`path@start`": lambda u: f"{path(u)}@{u.start}",
        "`path:channel`": lambda u: f"{path(u)}{_side(u)}",
        "`path@start:channel`": lambda u: f"{path(u)}@{u.start}{_side(u)}",
    }
    way, ids = "", columns.ids
    for way, name in ways.items():  # noqa: B007  # the way is named in the note
        ids = PackedTexts.of(u.id or name(u) for u in columns)
        if ids.repeated() is None:
            break
    # Where all of these repeat, the last way is taken, and `Manifest` names the duplicate id.
    named = dataclasses.replace(columns, ids=ids)
    return named, [f"utterances without an id, whose file names repeat and whose ids are {way}: {missing:,}"] * bool(
        way
    )


def _in_one_form(columns: Columns) -> tuple[Columns, list[str]]:
    """The utterances with speakers in Unicode normal form C, and a note on those that were in several forms."""
    normal = [unicodedata.normalize("NFC", name) for name in columns.speakers]
    several = sorted(name for name, count in Counter(normal).items() if count > 1)
    kept = columns if normal == columns.speakers else columns.speaking(normal)
    return kept, [f"speakers written in several Unicode forms, each taken for one person: {first_few(several)}"] * bool(
        several
    )


def _without_placeholders(columns: Columns) -> tuple[Columns, list[str]]:
    """The utterances, without speakers that stand for an unknown one, and notes that count them."""
    counts = dict(zip(columns.speakers, columns.spoken().tolist(), strict=True))
    unknown = {name: count for name, count in counts.items() if stands_for_unknown(name)}
    if not unknown:
        return columns, []
    return columns.speaking([None if name in unknown else name for name in columns.speakers]), [
        f"utterances whose speaker is the placeholder {name!r}, unknown: {count:,}" for name, count in unknown.items()
    ]


def _counted(reader: Reader, columns: Columns) -> list[str]:
    """Notes on durations and columns that are not used, and on speakers that may stand for an unknown speaker."""
    notes = []
    if wrong := reader.differing:
        notes.append(f"durations that are not end - start, which counts: {len(wrong):,} (first: {wrong[0]})")
    if unused := [repr(name) for name in reader.unused if name not in reader.columns]:
        notes.append(f"columns not used: {first_few(unused, most=8)}")
    counts = zip(columns.speakers, columns.spoken().tolist(), strict=True)
    notes += [f"utterances of a speaker named {name!r}: {count:,}" for name, count in counts if may_be_unknown(name)]
    if len(columns.speakers) == len(columns) > 1 and all(u.speaker == u.id for u in columns):
        notes.append(
            f"each of {len(columns):,} utterances is of a speaker of its own id, as Kaldi writes unknown speakers; "
            "if they are unknown, leave the speakers out"
        )
    return notes


def identity(u: Utterance) -> bytes:
    """Bytes that identify an utterance, independent of the path of its audio."""
    duration = -1 if u.duration is None else round(u.duration * 1000)
    channel = [] if u.channel is None else [u.channel]
    speech = [] if u.speech is None else [round(u.speech.whole * 1000), u.speech.stretches]
    return json.dumps([u.id, u.speaker, round(u.start * 1000), duration, *channel, *speech]).encode()


def measure(manifest: Manifest, workers: int = 8, kept: Path | None = None) -> tuple[Manifest, dict[str, str]]:
    """Measure missing durations, from the headers of the audio files, in parallel.

    Args:
        workers: number of threads.
        kept: folder in which what was measured is kept, so that a measurement that was stopped goes on.
    Returns:
        The manifest without the utterances that cannot be used, and the id of each of these -> the reason.
    """
    durations = manifest.utterances.duration
    missing, long = np.flatnonzero(np.isnan(durations)), np.flatnonzero(durations > MAX_SECONDS)
    if not len(missing) and not len(long):
        return manifest, {}
    rejected = {manifest.ids[i]: _too_long(durations[i]) for i in long.tolist()}
    usable, durations = np.ones(len(manifest), bool), durations.copy()
    usable[long] = False

    def measured(index: int) -> Measured:
        utterance = manifest[index]
        state = state_of_audio(utterance.path)
        try:
            seconds = probe(utterance.path) - utterance.start
            return utterance.path, state, seconds if seconds > 0 else "its start is beyond the end of the file"
        except AudioError as error:
            return utterance.path, state, error.reason

    with track("measuring audio", len(missing), "files") as bar, ThreadPoolExecutor(workers) as pool:
        for number, first in enumerate(range(0, len(missing), CHUNK)):
            some = missing[first : first + CHUNK].tolist()
            file = None if kept is None else kept / f"measured-{number}.json"
            before = _kept_in(file, [manifest.utterances.path(index) for index in some])
            rows = []
            for index, row in zip(some, pool.map(measured, some) if before is None else before, strict=True):
                rows.append(row)
                result = row[2]
                if isinstance(result, str):
                    rejected[manifest.ids[index]], usable[index] = result, False
                else:
                    durations[index] = result
                bar.advance(1)
            if file is not None and before is None:
                write_json(file, rows)
    columns = dataclasses.replace(manifest.utterances, duration=durations)
    return Manifest(columns if usable.all() else columns.take(usable), manifest.source, manifest.notes), rejected


def converted(path: str, workers: int, kept: Path) -> tuple[Manifest, dict[str, str]]:
    """A manifest of another tool with measured durations, and the id of each utterance that cannot be used -> why.

    Args:
        workers, kept: as of `measure`.
    Raises:
        SpkdError: none can be used; and as `Manifest.load`.
    """
    manifest = Manifest.load(path)
    _note_folder(manifest, path)
    there, missing = _present(manifest)
    made, left_out = measure(there, workers, kept)
    left_out |= missing
    if not len(made):
        name, reason = next(iter(left_out.items()))
        raise SpkdError(f"{path}: none of {counted(len(left_out), 'utterance')} can be read ({name}: {reason})")
    return made, left_out


def _present(manifest: Manifest) -> tuple[Manifest, dict[str, str]]:
    """The utterances whose files are there, and the id of each other one -> the reason. URLs are not asked for."""
    known: dict[str, bool] = {}

    def is_there(path: str) -> bool:
        file = file_of(path)
        if file not in known:
            known[file] = is_elsewhere(file) or os.path.exists(file)
        return known[file]

    usable = np.fromiter((is_there(path) for path in manifest.utterances.paths()), bool, len(manifest))
    if usable.all():
        return manifest, {}
    missing = {manifest.ids[index]: "no such file" for index in np.flatnonzero(~usable).tolist()}
    return Manifest(manifest.utterances.take(usable), manifest.source, manifest.notes), missing


Measured = tuple[str, State | None, float | str]  # path, state of its file, and the duration (s) or the reason


def _kept_in(file: Path | None, paths: list[str]) -> list[Measured] | None:
    """What was measured before of these paths; None where there is nothing, or a file has changed."""
    if file is None or not file.is_file():
        return None
    try:
        rows: list[Measured] = [(p, None if s is None else (s[0], s[1]), r) for p, s, r in read_json(file)]
    except (SpkdError, TypeError, ValueError):
        return None
    is_same = [row[0] for row in rows] == paths and all(row[1] == state_of_audio(row[0]) for row in rows)
    return rows if is_same else None


def note_left_out(manifest: Manifest, reasons: Mapping[str, str]) -> None:
    """Print how many utterances are left out, with the first one's reason.

    Args:
        reasons: id of each utterance that is left out -> the reason.
    """
    if reasons:
        name, reason = next(iter(reasons.items()))
        log(f"note: {manifest.source}: {counted(len(reasons), 'utterance')} left out ({name}: {reason})")


def _too_long(seconds: float) -> str:
    return f"lasts {seconds:.0f} s in its manifest; durations are in seconds, of at most {MAX_SECONDS:.0f}"


class _Places:
    """Columns that say where audio is: its path, and the state of its container, which is asked for once.

    Args:
        folder: folder of the manifest.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._containers: dict[str, tuple[str, str | None]] = {}  # container -> its relative path and state

    def of(self, path: str) -> dict[str, str]:
        if (address := parse(path)) is None:
            return {"path": relative_path(path, self._folder)}
        if (known := self._containers.get(address.container)) is None:
            state = state_of_container(address.container)
            known = relative_path(address.container, self._folder), None if state is None else state_text(state)
            if len(self._containers) == MOST_CONTAINERS:
                self._containers.clear()
            self._containers[address.container] = known
        place = {"path": known[0] + path.removeprefix(address.container)}
        return place if known[1] is None else place | {STATE: known[1]}


def check_suffix(path: Path) -> None:
    """Check the name of a manifest to write. Raises UsageError: neither .csv nor .jsonl."""
    if path.suffix not in SUFFIXES:
        raise UsageError(f"{path}: manifests are written as .csv or .jsonl")


def _near(name: str, source: Source) -> str:
    """Hint for an unknown column of a table or of JSON lines; "" of other manifests."""
    if not source.path.is_file():
        return ""
    columns = list(source.first_object) or re.split(r"[,\t]", source.first_line)
    return did_you_mean(name, columns) if len(columns) > 1 else ""


def check_replaces_manifest(path: Path) -> None:
    """Check that a manifest that is written replaces no file but such a manifest, or an empty file.

    Raises:
        UsageError: there is another file, such as a table with columns that would be lost.
    """
    if not path.is_file() or not path.stat().st_size:
        return
    source = Source(path)
    line = source.first_line
    is_table = line in (",".join([*HEADER, *more]) for more in ([], ["channel"], [STATE], ["channel", STATE]))
    names = list(source.first_object)
    if not is_table and not (names[:2] == list(KEYS)[:2] and set(names) <= set(KEYS)):
        raise UsageError(f"{path}: would be replaced (spkd did not write it); choose another --out FILE, or remove it")


def build(
    root: str | Path,
    layout: str | None = None,
    workers: int = 8,
    suffix: str | None = None,
    kept: Path | None = None,
) -> tuple[Manifest, str, dict[str, str]]:
    """Build a manifest of every audio file below a folder, measured in parallel.

    Args:
        layout: a name in LAYOUTS; None takes the first that is detected.
        workers: number of threads.
        suffix: suffix of the files to take; None takes all audio files.
        kept: as of `measure`.
    Returns:
        The manifest, the name of the layout, and the path (relative to `root`) of each file left out -> the reason.
    Raises:
        UsageError: no such folder or layout.
        SpkdError: no audio there, a layout that fits no file, two files with the same id, or a list that is malformed.
    """
    utterances, layout, left_out = _listed(Path(root), layout, suffix)
    manifest, unreadable = measure(Manifest(utterances, str(root)), workers, kept)
    if len(manifest.speakers) == 1 and len(manifest) >= MANY:
        log(
            f"note: {root}: all of {len(manifest):,} files are of one speaker, {manifest.speakers[0]!r}, by the layout "
            f"{layout}; if they are of several, choose another --layout ({', '.join(LAYOUTS)}), or the folder above"
        )
    return manifest, layout, left_out | unreadable


def _listed(root: Path, layout: str | None, suffix: str | None) -> tuple[Columns, str, dict[str, str]]:
    """The audio files below a folder as utterances that are not measured, and the rest of what `build` gives."""
    # Find the files.
    if not root.is_dir():
        raise UsageError(f"{root}: no such folder")
    if layout is not None and layout not in LAYOUTS:
        raise UsageError(f"unknown layout {layout!r}{did_you_mean(layout, LAYOUTS)}")
    wanted = AUDIO_SUFFIXES if suffix is None else {f".{suffix.lower().lstrip('.')}"}
    archives = {Path(f"_{each}").suffix for each in suffixes()} if suffix is None else set()
    lists = {Path(each).suffix for each in IN_FOLDERS}
    paths, repeated = find_files(root, lists | (wanted if suffix is not None else wanted | OTHER_SUFFIXES | archives))
    found = [path.relative_to(root) for path in paths if path.suffix.lower() not in archives | lists]
    repeated = [path for path in repeated if path.suffix.lower() not in archives | lists]
    if unread := [path for path in paths if suffix is None and path.name.lower().endswith(suffixes())]:
        log(f"note: {root}: not read, as there are files of audio: {counted(len(unread), 'container')} ({unread[0]})")
    if unread := [path for path in paths if path.name in IN_FOLDERS and name_of_reader(Source(path.parent))]:
        log(f"note: {root}: not read, as a layout is: {counted(len(unread), 'manifest')} ({unread[0]})")
    files = [path for path in found if path.suffix.lower() in wanted]
    others = {
        str(path): f"{path.suffix} is not decoded here; convert it to WAV or FLAC"
        for path in found
        if path.suffix.lower() not in wanted
    }
    if not files:
        first = f"; {len(others):,} others ({next(iter(others))}) are not decoded" if others else ""
        kind = SpkdError if suffix is None else UsageError
        raise kind(f"{root}: no audio files ({', '.join(sorted(wanted))}){first}")
    # Choose the layout.
    if layout is None:
        layout = next(name for name, kind in LAYOUTS.items() if kind.detects(root, files))
    # Read id and speaker of each file from its path.
    chosen: type[Layout] = LAYOUTS[layout]
    left_out = others | {
        str(path.relative_to(root)): "a link to what is listed under another name" for path in repeated
    }

    def named() -> Iterator[Utterance]:
        for relative, parsed in zip(files, chosen.names(root, files), strict=True):
            if not _is_utf8(str(relative)):
                left_out[str(relative)] = "its name is not UTF-8"
            elif not str(relative).isprintable():
                left_out[str(relative)] = "its name holds control characters"
            elif parsed is None:
                left_out[str(relative)] = f"does not fit the layout {layout}"
            else:
                speaker = None if parsed[1] is None else unicodedata.normalize("NFC", parsed[1])
                yield Utterance(parsed[0], str(root / relative), speaker)

    utterances = Columns.of(named())
    if (twice := utterances.ids.repeated()) is not None:
        earlier, later, *_ = (Path(u.path).relative_to(root) for u in utterances if u.id == twice)
        raise SpkdError(
            f"{root}: {earlier} and {later} would both be the utterance {twice!r}; choose with --suffix "
            f"{later.suffix.lstrip('.')}, or another --layout"
        )
    if not len(utterances):
        raise UsageError(
            f"{root}: none of {counted(len(files), 'audio file')} fits the layout {layout}; choose another --layout "
            f"({', '.join(LAYOUTS)}), or give a table with the columns path,speaker"
        )
    for note in chosen.notes(root, files):
        log(f"note: {root}: {note}")
    return utterances, layout, left_out


def _is_utf8(name: str) -> bool:
    try:
        os.fsencode(name).decode()
    except UnicodeDecodeError:
        return False
    return True
