"""Manifests: lists of utterances with their audio, speakers and durations.

Manifests are written as CSV (`utt,path,speaker,duration[,start][,channel]`) and JSON lines (NeMo's keys). They are
read in these formats and in those of other tools, by the readers of spkd/corpus/manifests, and built from folders of
audio. `manifests/README.md` shows a small example of each format.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import shlex
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from spkd.corpus.address import is_elsewhere, parse, relative_path, state_of_container
from spkd.corpus.audio import AUDIO_SUFFIXES, MAX_SECONDS, OTHER_SUFFIXES, AudioError, probe
from spkd.corpus.expected import state_text
from spkd.corpus.layouts.base import Layout
from spkd.corpus.manifests.fields import HEADER as HEADER
from spkd.corpus.manifests.fields import STATE, may_be_unknown, stands_for_unknown
from spkd.corpus.manifests.reader import Reader, Source, name_of_reader
from spkd.corpus.manifests.several import Several
from spkd.corpus.shards import holds_audio, suffixes
from spkd.corpus.utterance import Utterance as Utterance
from spkd.errors import SpkdError, UsageError, bracketed, did_you_mean, first_few
from spkd.files import digest
from spkd.files.atomic import find_files, write_bytes
from spkd.files.text import counted
from spkd.progress import log, track
from spkd.registry import LAYOUTS, MANIFEST_READERS

MANY = 20  # files: so many of one speaker are noted
SUFFIXES = (".csv", ".jsonl")  # of manifests that are written
KEYS = ("id", "audio_filepath", "duration", "speaker", "offset", "channel", STATE)  # of their JSON lines


@dataclass(frozen=True)
class Manifest:
    """An ordered set of utterances with unique ids.

    Attributes:
        source: path of the file or folder, for messages.
        notes: remarks on what was left out or assumed when it was read.
    """

    utterances: tuple[Utterance, ...]
    source: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for utterance in self.utterances:
            if utterance.id in seen:
                raise SpkdError(f"{self.source}: duplicate utterance id {utterance.id!r}")
            seen.add(utterance.id)

    def __len__(self) -> int:
        return len(self.utterances)

    def __iter__(self) -> Iterator[Utterance]:
        return iter(self.utterances)

    def __getitem__(self, index: int) -> Utterance:
        return self.utterances[index]

    @cached_property
    def index_of(self) -> dict[str, int]:
        """Id of each utterance -> its index."""
        return {utterance.id: index for index, utterance in enumerate(self.utterances)}

    def pick(self, ids: Iterable[str]) -> Manifest | None:
        """The utterances with these ids, in this order; None where one is missing."""
        indices = [self.index_of.get(name) for name in ids]
        if None in indices:
            return None
        return Manifest(tuple(self.utterances[index] for index in indices if index is not None))

    @property
    def speakers(self) -> list[str]:
        """Sorted names of the labelled speakers."""
        return sorted({u.speaker for u in self.utterances if u.speaker is not None})

    @property
    def seconds(self) -> float:
        """Total measured duration (s)."""
        return sum(u.duration or 0.0 for u in self.utterances)

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
        reader = _reader_of(path)(Source(path), columns)
        named, note = _named(list(_distinct(reader.utterances(), path)), path.parent)
        if not named:
            raise SpkdError(f"{path}: holds no utterances")
        normal, merged = _in_one_form(named)
        utterances, unknown = _without_placeholders(normal)
        manifest = cls(utterances, str(path), (*reader.notes, *note, *merged, *unknown, *_counted(reader, utterances)))
        for name in columns:
            if not any(utterance.attribute(name) for utterance in manifest):
                raise UsageError(f"{path}: no column {name!r}, or nothing in it{bracketed('by', name)}")
        for text in manifest.notes:
            log(f"note: {path}: {text}")
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
        rows = [dataclasses.asdict(u) | _place(u.path, folder) for u in self.utterances]
        out = io.StringIO()
        if path.suffix == ".csv":
            fields = [*HEADER]
            fields += ["channel"] if any(u.channel is not None for u in self.utterances) else []
            fields += [STATE] if any(STATE in row for row in rows) else []
            writer = csv.DictWriter(out, fields, lineterminator="\n", extrasaction="ignore")
            writer.writeheader()
            for row in rows:
                row["utt"] = row.pop("id")
                writer.writerow({k: "" if v is None else v for k, v in row.items()})
        else:
            for row in rows:
                named = {
                    "id": row["id"],
                    "audio_filepath": row["path"],
                    "duration": row["duration"],
                    "speaker": row["speaker"],
                    "offset": row["start"],
                    "channel": row["channel"],
                    STATE: row.get(STATE),
                }
                out.write(json.dumps({k: named[k] for k in KEYS if named[k] is not None}) + "\n")
        write_bytes(path, out.getvalue().encode())


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


def is_manifest(name: str) -> bool:
    """Whether a file of this machine, or a folder without files of audio, is a manifest of another tool or of spkd."""
    path = Path(name)
    if is_elsewhere(name) or (path.is_dir() and holds_audio(path)):
        return False
    source = Source(path)
    kind = name_of_reader(source)
    return kind not in (None, "containers") and (kind != "several" or not name.endswith(suffixes()))


def _distinct(utterances: Iterable[Utterance], path: Path) -> Iterator[Utterance]:
    """The utterances of a manifest, up to the first that is there twice: a short file could hold one without end.

    Args:
        utterances: the utterances; an id of "" is missing.
    """
    seen: set[Any] = set()
    for utterance in utterances:
        known_by = utterance.id or (utterance.path, utterance.start, utterance.channel)
        if known_by in seen:
            name = utterance.id or f"{utterance.path}@{utterance.start}"
            raise SpkdError(f"{path}: duplicate utterance id {name!r}")
        seen.add(known_by)
        yield utterance


def _named(utterances: Sequence[Utterance], folder: Path) -> tuple[tuple[Utterance, ...], list[str]]:
    """Give an id to the utterances that have none.

    The id is the stem of the file's name. Where stems repeat, it is the path as the manifest has it; where paths repeat
    too, it is `path@start` (seconds), `path:channel` or `path@start:channel`.

    Args:
        utterances: the utterances; an id of "" is missing.
    Returns:
        The utterances, and a note where stems repeat.
    """
    nameless = [u for u in utterances if not u.id]
    if not nameless:
        return tuple(utterances), []
    given = {u.id for u in utterances if u.id}
    paths = {u.path: u.path.removeprefix(f"{folder}/") for u in nameless}

    def side(u: Utterance) -> str:
        return "" if u.channel is None else f":{u.channel}"

    ways: dict[str, Callable[[Utterance], str]] = {
        "": lambda u: Path(u.path).stem,
        "their paths": lambda u: paths[u.path],
        "`path@start`": lambda u: f"{paths[u.path]}@{u.start}",
        "`path:channel`": lambda u: f"{paths[u.path]}{side(u)}",
        "`path@start:channel`": lambda u: f"{paths[u.path]}@{u.start}{side(u)}",
    }

    def tells_apart(name: Callable[[Utterance], str]) -> bool:
        made = {name(u) for u in nameless}
        return len(made) == len(nameless) and not made & given

    # Where all of these repeat, the last way is taken, and `Manifest` names the duplicate id.
    way, name = next((item for item in ways.items() if tells_apart(item[1])), list(ways.items())[-1])
    named = tuple(u if u.id else dataclasses.replace(u, id=name(u)) for u in utterances)
    return named, [
        f"utterances without an id, whose file names repeat and whose ids are {way}: {len(nameless):,}"
    ] * bool(way)


def _in_one_form(utterances: tuple[Utterance, ...]) -> tuple[tuple[Utterance, ...], list[str]]:
    """The utterances with speakers in Unicode normal form C, and a note on those that were in several forms."""
    names = {u.speaker for u in utterances if u.speaker is not None}
    normal = {name: unicodedata.normalize("NFC", name) for name in names}
    changed = {name for name in names if normal[name] != name}
    if not changed:
        return utterances, []
    kept = tuple(
        dataclasses.replace(u, speaker=normal[u.speaker]) if u.speaker is not None and u.speaker in changed else u
        for u in utterances
    )
    counts = Counter(normal.values())
    several = sorted(name for name, count in counts.items() if count > 1)
    return kept, [f"speakers written in several Unicode forms, each taken for one person: {first_few(several)}"] * bool(
        several
    )


def _without_placeholders(utterances: tuple[Utterance, ...]) -> tuple[tuple[Utterance, ...], list[str]]:
    """The utterances, without speakers that stand for an unknown one, and notes that count them."""
    speakers = Counter(u.speaker for u in utterances if u.speaker is not None)
    counts = {name: count for name, count in speakers.items() if stands_for_unknown(name)}
    if not counts:
        return utterances, []
    kept = tuple(dataclasses.replace(u, speaker=None) if u.speaker in counts else u for u in utterances)
    return kept, [
        f"utterances whose speaker is the placeholder {name!r}, unknown: {count:,}" for name, count in counts.items()
    ]


def _counted(reader: Reader, utterances: Sequence[Utterance]) -> list[str]:
    """Notes on durations and columns that are not used, and on speakers that may stand for an unknown speaker."""
    notes = []
    if wrong := reader.differing:
        notes.append(f"durations that are not end - start, which counts: {len(wrong):,} (first: {wrong[0]})")
    if unused := [repr(name) for name in reader.unused if name not in reader.columns]:
        notes.append(f"columns not used: {first_few(unused, most=8)}")
    speakers = Counter(u.speaker for u in utterances if u.speaker is not None)
    notes += [
        f"utterances of a speaker named {name!r}: {count:,}" for name, count in speakers.items() if may_be_unknown(name)
    ]
    if len(utterances) > 1 and all(u.speaker == u.id for u in utterances):
        notes.append(
            f"each of {len(utterances):,} utterances is of a speaker of its own id, as Kaldi writes unknown speakers; "
            "if they are unknown, leave the speakers out"
        )
    return notes


def identity(u: Utterance) -> bytes:
    """Bytes that identify an utterance, independent of the path of its audio."""
    duration = -1 if u.duration is None else round(u.duration * 1000)
    channel = [] if u.channel is None else [u.channel]
    speech = [] if u.speech is None else [round(u.speech.whole * 1000), u.speech.stretches]
    return json.dumps([u.id, u.speaker, round(u.start * 1000), duration, *channel, *speech]).encode()


def measure(manifest: Manifest, workers: int = 8) -> tuple[Manifest, dict[str, str]]:
    """Measure missing durations, from the headers of the audio files, in parallel.

    Args:
        workers: number of threads.
    Returns:
        The manifest without the utterances that cannot be used, and the id of each of these -> the reason.
    """
    missing = [u for u in manifest if u.duration is None]
    measured: dict[str, float] = {}
    rejected = {u.id: _too_long(u.duration) for u in manifest if (u.duration or 0.0) > MAX_SECONDS}
    if not missing and not rejected:
        return manifest, {}

    def duration_or_reason(utterance: Utterance) -> tuple[str, float | str]:
        try:
            seconds = probe(utterance.path) - utterance.start
            return utterance.id, seconds if seconds > 0 else "its start is beyond the end of the file"
        except AudioError as error:
            return utterance.id, error.reason

    with track("measuring audio", len(missing), "files") as bar, ThreadPoolExecutor(workers) as pool:
        for name, result in pool.map(duration_or_reason, missing):
            if isinstance(result, str):
                rejected[name] = result
            else:
                measured[name] = result
            bar.advance(1)
    kept = tuple(
        dataclasses.replace(u, duration=measured[u.id]) if u.id in measured else u
        for u in manifest
        if u.id not in rejected
    )
    return Manifest(kept, manifest.source, manifest.notes), rejected


def note_left_out(manifest: Manifest, reasons: Mapping[str, str]) -> None:
    """Print how many utterances are left out, with the first one's reason.

    Args:
        reasons: id of each utterance that is left out -> the reason.
    """
    if reasons:
        name, reason = next(iter(reasons.items()))
        log(f"note: {manifest.source}: {counted(len(reasons), 'utterance')} left out ({name}: {reason})")


def _too_long(seconds: float | None) -> str:
    return f"lasts {seconds:.0f} s in its manifest; durations are in seconds, of at most {MAX_SECONDS:.0f}"


def _place(path: str, folder: Path) -> dict[str, str]:
    """Columns that say where audio is: its path, and the state of its container."""
    place = {"path": relative_path(path, folder)}
    if (address := parse(path)) is not None and (state := state_of_container(address.container)) is not None:
        place[STATE] = state_text(state)
    return place


def check_suffix(path: Path) -> None:
    """Check the name of a manifest to write. Raises UsageError: neither .csv nor .jsonl."""
    if path.suffix not in SUFFIXES:
        raise UsageError(f"{path}: manifests are written as .csv or .jsonl")


def check_is_own(path: Path) -> None:
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
    if not is_table and not (names[:2] == list(KEYS[:2]) and set(names) <= set(KEYS)):
        raise UsageError(f"{path}: would be replaced (spkd did not write it); choose another --out FILE, or remove it")


def build(
    root: str | Path, layout: str | None = None, workers: int = 8, suffix: str | None = None
) -> tuple[Manifest, str, dict[str, str]]:
    """Build a manifest of every audio file below a folder, measured in parallel.

    Args:
        layout: a name in LAYOUTS; None takes the first that is detected.
        workers: number of threads.
        suffix: suffix of the files to take; None takes all audio files.
    Returns:
        The manifest, the name of the layout, and the path (relative to `root`) of each file left out -> the reason.
    Raises:
        UsageError: no such folder or layout.
        SpkdError: no audio there, a layout that fits no file, two files with the same id, or a list that is malformed.
    """
    # Find the files.
    root = Path(root)
    if not root.is_dir():
        raise UsageError(f"{root}: no such folder")
    if layout is not None and layout not in LAYOUTS:
        raise UsageError(f"unknown layout {layout!r}{did_you_mean(layout, LAYOUTS)}")
    wanted = AUDIO_SUFFIXES if suffix is None else {f".{suffix.lower().lstrip('.')}"}
    archives = {Path(f"_{each}").suffix for each in suffixes()} if suffix is None else set()
    paths, repeated = find_files(root, wanted if suffix is not None else wanted | OTHER_SUFFIXES | archives)
    found = [path.relative_to(root) for path in paths if path.suffix.lower() not in archives]
    repeated = [path for path in repeated if path.suffix.lower() not in archives]
    if unread := [path for path in paths if path.name.lower().endswith(suffixes())]:
        log(f"note: {root}: not read, as there are files of audio: {counted(len(unread), 'container')} ({unread[0]})")
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
    utterances = dict[str, Utterance]()
    left_out = others | {
        str(path.relative_to(root)): "a link to what is listed under another name" for path in repeated
    }
    for relative, parsed in zip(files, chosen.names(root, files), strict=True):
        if not _is_utf8(str(relative)):
            left_out[str(relative)] = "its name is not UTF-8"
        elif not str(relative).isprintable():
            left_out[str(relative)] = "its name holds control characters"
        elif parsed is None:
            left_out[str(relative)] = f"does not fit the layout {layout}"
        elif parsed[0] in utterances:
            earlier = Path(utterances[parsed[0]].path).relative_to(root)
            raise SpkdError(
                f"{root}: {earlier} and {relative} would both be the utterance {parsed[0]!r}; choose with --suffix "
                f"{relative.suffix.lstrip('.')}, or another --layout"
            )
        else:
            speaker = None if parsed[1] is None else unicodedata.normalize("NFC", parsed[1])
            utterances[parsed[0]] = Utterance(parsed[0], str(root / relative), speaker)
    if not utterances:
        raise UsageError(
            f"{root}: none of {counted(len(files), 'audio file')} fits the layout {layout}; choose another --layout "
            f"({', '.join(LAYOUTS)}), or give a table with the columns path,speaker"
        )
    for note in chosen.notes(root, files):
        log(f"note: {root}: {note}")
    manifest, unreadable = measure(Manifest(tuple(utterances.values()), str(root)), workers)
    if len(manifest.speakers) == 1 and len(manifest) >= MANY:
        log(
            f"note: {root}: all of {len(manifest):,} files are of one speaker, {manifest.speakers[0]!r}, by the layout "
            f"{layout}; if they are of several, choose another --layout ({', '.join(LAYOUTS)}), or the folder above"
        )
    return manifest, layout, left_out | unreadable


def _is_utf8(name: str) -> bool:
    try:
        os.fsencode(name).decode()
    except UnicodeDecodeError:
        return False
    return True
