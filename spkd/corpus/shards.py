"""Index of containers: a manifest whose paths are addresses, made from headers alone.

Each container is read once, and what it holds is kept in a file beside the manifest until all are read, so that an
index that was stopped goes on. Ids and speakers depend on all containers together (whether a layout fits, where
speakers are named, whether keys repeat), and are given when the manifest is written.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from spkd.corpus.address import Address, is_elsewhere, relative_path
from spkd.corpus.audio import AUDIO_SUFFIXES, AudioError, channel_count, probe
from spkd.corpus.containers.container import SPEAKERS, Container, Entry, Wanted
from spkd.corpus.expected import forget, state_text
from spkd.corpus.layouts.base import MANY, MOST_FITTING, Layout
from spkd.corpus.layouts.folder import level_of_speakers, notes_on_speakers
from spkd.corpus.manifests.fields import HEADER, STATE
from spkd.corpus.manifests.relative import place_of
from spkd.corpus.remote import opened
from spkd.corpus.stored import container as container_of
from spkd.corpus.stored import read
from spkd.corpus.written import row_writer
from spkd.errors import SpkdError, UsageError, did_you_mean, first_few, public_address
from spkd.files.atomic import ADDRESS, find_files, make_folder, remove_abandoned, write_bytes, writing
from spkd.files.packed import by_ranges, hash_of
from spkd.files.reading import State, is_irregular, parse_json, state_of
from spkd.files.remote_folder import RemoteFolder
from spkd.files.spool import Spool
from spkd.files.text import counted, read_lines, short_names
from spkd.progress import log, track
from spkd.registry import CONTAINERS, LAYOUTS

# Columns and keys that an index counts beside the audio -> the note on them.
BESIDE_AUDIO = {
    "columns": "columns and keys that nothing uses",
    "bounding": "columns and keys that seem to bound the audio and are not used, as they are not start with end or "
    "duration in seconds, or are there in addition to these",
}
CLOSE = 0.1  # s by which a stretch may differ from the whole audio: what was rounded, or padded by a codec
MUCH = 0.1  # share of utterances that are there twice, above which containers are refused
COMPARED = 3  # keys that repeat, of which the audio is compared
# A container's set, by the folder above it or its own name: train/0000.parquet, test-00000-of-00002.parquet
SET_OF = re.compile(r"(?:^|/)(train|validation|valid|val|dev|test|eval)(?:[-_.][^/]*|/[^/]*)$")
PARTS = ".parts"  # suffix of the folder beside the manifest
FORMAT = 3  # of the files in it
LISTS_OF_PART = ".lists"  # suffix of folders in it
OF_PART = re.compile(r"[0-9a-f]{24}\.(?:jsonl|lists)|measured-\S+\.json")  # names of these, and of what `measure` keeps
LONGEST_FACTS = 1 << 16  # bytes of the last line of such a file
BEGIN = 1024  # bytes by which a kind of container is recognised
CHUNK = 512  # members that are measured together
AT_ONCE = 32  # of them by one thread: to hand over a single one takes longer than to read its header
LISTS = (".list", ".lst", ".txt")  # suffixes of lists of containers, a path a line
MOST_SHARDS = 1_000_000  # of one pattern
MOST_FOLDERS = 100_000  # within a folder elsewhere
LONGEST_LIST = 1 << 26  # bytes of a list of containers elsewhere
UNSURE = ("label", "cls", "txt")  # names under which there may be classes of another kind
PRIORITY = ("spk", *(name for name in SPEAKERS if name not in UNSURE), *UNSURE)  # where speakers are looked for
# Patterns as NeMo and WebDataset have them: audio_{0..127}.tar, audio__OP_0..127_CL_.tar; words: {train,dev}.tar
BRACES = re.compile(r"(?:\{|_OP_)([^{}]*?)(?:\}|_CL_)")
# Names of members that are lists of a corpus, with the folders of the corpus before them.
LISTS_OF_CORPORA = re.compile(rf"(?:.*/)?(?:{'|'.join(kind.lists for kind in LAYOUTS.values() if kind.lists)})")


@dataclass(frozen=True)
class Summary:
    """What was written.

    Attributes:
        speakers: number of distinct speakers.
        seconds: total duration (s).
        origin: phrase that says where ids and speakers were found.
        left_out: name of each container, member or row that was left out -> the reason.
    """

    utterances: int
    speakers: int
    seconds: float
    origin: str
    left_out: dict[str, str]


# Finding containers.


def kind_of(path: str) -> type[Container] | None:
    """Kind of a container, by its first bytes; None where it is none. Raises SpkdError where it cannot be read."""
    forget(path)
    try:
        source = container_of(path)
        begin = source.read(0, min(BEGIN, source.size))
    except (OSError, ValueError) as error:
        raise SpkdError(f"{public_address(path)}: {getattr(error, 'strerror', None) or error}") from error
    return next((kind for kind in CONTAINERS.values() if kind.recognises(path, begin)), None)


def suffixes() -> tuple[str, ...]:
    """Suffixes of containers."""
    return tuple(suffix for kind in CONTAINERS.values() for suffix in kind.suffixes)


def expanded(pattern: str) -> list[str]:
    """Names that a pattern with braces stands for, in its order; the pattern itself where it has none.

    Raises:
        UsageError: it stands for too many.
    """
    names = [pattern]
    while (match := BRACES.search(names[0])) is not None:
        words: Sequence[str] = match[1].split(",")
        if (span := re.fullmatch(r"(\d+)\.\.(\d+)", match[1])) is not None:
            first, last = int(span[1]), int(span[2])
            width = len(span[1]) if span[1].startswith("0") else 0
            if (abs(last - first) + 1) * len(names) > MOST_SHARDS:
                raise UsageError(f"{pattern}: stands for more than {MOST_SHARDS:,} names")
            step = 1 if last >= first else -1
            words = [str(number).zfill(width) for number in range(first, last + step, step)]
        # All names have the same braces at the same place behind what differs.
        names = [f"{before}{word}{after}" for name in names for before, after in [_around(name)] for word in words]
    return names


def _around(name: str) -> tuple[str, str]:
    match = BRACES.search(name)
    assert match is not None
    return name[: match.start()], name[match.end() :]


def find(names: Sequence[str | Path]) -> list[str]:
    """The containers that arguments name: files, patterns, lists of files, folders; here or elsewhere (URLs).

    Returns:
        Their paths, in this order, those of a folder sorted; none where an argument is a folder of audio.
    Raises:
        UsageError: there is no such file, or one is no container.
        SpkdError: the place of a URL does not answer.
    """
    found: list[str] = []
    for name in map(str, names):
        if is_elsewhere(name) and public_address(name) != name:
            raise UsageError(
                f"{public_address(name)}: the rest of the address (a password, a query) would be written into the "
                "manifest; give credentials to the library (fsspec), in its files or variables"
            )
        if os.path.isdir(name):
            found += [] if holds_audio(Path(name)) else _within(Path(name))
        elif is_elsewhere(name) and (name.endswith("/") or _is_on_hub(name)):
            found += _within_elsewhere(name)
        elif os.path.exists(name) or not BRACES.search(name):
            found += _listed(name)
        else:
            found += [each for pattern in expanded(name) for each in _listed(pattern)]
    return found


def _listed(path: str) -> list[str]:
    """A container by itself, or those of a list."""
    if is_elsewhere(path):
        return _listed_elsewhere(path)
    if ADDRESS.match(path):
        raise UsageError(f"{path}: an address of another kind than s3://, gs://, hf://, http(s)://")
    if is_irregular(path):
        raise UsageError(f"{path}: not a regular file")
    if not os.path.exists(path):
        raise UsageError(f"{path}: no such file or folder")
    if kind_of(path) is not None:
        return [path]
    if Path(path).suffix in LISTS and (named := _named_in(read_lines(Path(path)))):
        folder = Path(path).parent
        return [line if is_elsewhere(line) else place_of(line, folder, path, above=True) for line in named]
    raise _no_container(path)


def _listed_elsewhere(url: str) -> list[str]:
    """As `_listed`. A list is read by its suffix, and its lines are relative to its folder."""
    try:
        source = container_of(url)
        if PurePosixPath(url.partition("?")[0]).suffix in LISTS:
            text = source.read(0, min(source.size, LONGEST_LIST)).decode()
            folder = url.partition("?")[0].rpartition("/")[0]
            if named := _named_in(text.splitlines()):
                return [line if is_elsewhere(line) else f"{folder}/{line}" for line in named]
    except (OSError, ValueError) as error:
        raise UsageError(f"{public_address(url)}: {error}") from error
    if kind_of(url) is None:
        raise _no_container(public_address(url))
    return [url]


def _named_in(lines: Iterable[str]) -> list[str]:
    """Containers that the lines of a list name; none where a line names something else."""
    stripped = (line.strip() for line in lines)
    named = [line for line in stripped if line and not line.startswith("#")]
    return named if all(line.endswith(suffixes()) for line in named) else []


def _no_container(path: str) -> UsageError:
    kinds = ", ".join(kind.describes for kind in CONTAINERS.values())
    return UsageError(f"{path}: neither a folder of audio nor a container of it ({kinds})")


def _is_on_hub(url: str) -> bool:
    """Whether a URL is of a folder on the Hugging Face hub, such as a whole data set: hf://datasets/USER/NAME."""
    return url.startswith("hf://") and not url.endswith((*suffixes(), *LISTS))


def _within_elsewhere(url: str) -> list[str]:
    """Containers in a folder elsewhere and in those within, by their suffixes, sorted.

    Raises:
        UsageError: there are none, or the folders have no end.
    """
    found, left, count = list[str](), [(url.rstrip("/"), RemoteFolder.of(url.rstrip("/")))], 0
    while left:
        place, folder = left.pop()
        folders, files = folder.entries()
        found += [f"{place}/{name}" for name in sorted(files) if name.endswith(suffixes())]
        left += [(f"{place}/{within.path.rpartition('/')[2]}", within) for within in folders]
        if (count := count + 1) > MOST_FOLDERS or len(found) > MOST_SHARDS:
            raise UsageError(f"{public_address(url)}: more than {MOST_FOLDERS:,} folders; name one within")
    if not found:
        raise UsageError(f"{public_address(url)}: no containers of audio in this folder")
    return sorted(found)


def _within(folder: Path) -> list[str]:
    """Containers in a folder, by their suffixes."""
    files, _ = find_files(folder, {Path(f"_{suffix}").suffix for suffix in suffixes()})
    return [str(path) for path in files if path.name.lower().endswith(suffixes())]


def holds_audio(folder: Path) -> bool:
    """Whether there is a file of audio in a folder or below."""
    return any(Path(name).suffix.lower() in AUDIO_SUFFIXES for _, _, names in os.walk(folder) for name in names)


# Reading containers.


@dataclass(frozen=True)
class _Part:
    """What one container holds, in a file of JSON lines: entries, what was left out, and facts in the last line.

    Attributes:
        file: the file; it appears whole.
    """

    container: str
    state: State
    file: Path

    def rows(self) -> Iterator[list[Any]]:
        """`[name, key, offset, length, kind, duration, bounds, channel, speakers]` of an entry, and `[name, reason]`
        of what was left out.

        Raises:
            SpkdError: the file is damaged.
        """
        for number, line in enumerate(read_lines(self.file), 1):
            row = parse_json(line, f"{self.file}:{number}")
            if isinstance(row, list):
                yield row

    def entries(self) -> Iterator[list[Any]]:
        return (row for row in self.rows() if len(row) > 2)

    def left_out(self) -> Iterator[list[str]]:
        return (row for row in self.rows() if len(row) == 2)

    @property
    def lists(self) -> Path:
        """Folder with the lists of a corpus that are in the container, named as the one beside it (`_unpacked`)."""
        return self.file.with_suffix(LISTS_OF_PART) / _unpacked(self).name

    @cached_property
    def facts(self) -> dict[str, Any]:
        """`has_names`, the members and columns that nothing uses (`unused`, `columns`, `bounding`), whether a channel
        is taken (`has_channels`), and how many are given beside audio of one channel (`of_recordings`)."""
        return self._last_line()

    def is_read(self) -> bool:
        """Whether it is there, and its container could be read: next time, a server or a package may be there."""
        return self.file.is_file() and "failed" not in self._last_line()

    def _last_line(self) -> dict[str, Any]:
        with open(self.file, "rb") as file:
            file.seek(max(self.file.stat().st_size - LONGEST_FACTS, 0))
            return dict(parse_json(file.read().rpartition(b"\n")[2], str(self.file)))


def _part_of(container: str, folder: Path, wanted: Wanted) -> _Part:
    """Raises UsageError where there is no such file, or its place does not answer."""
    try:
        state = opened(container).state if is_elsewhere(container) else state_of(container)
    except OSError as error:
        raise UsageError(f"{public_address(container)}: {error}") from error
    if state is None:
        raise UsageError(f"{container}: no such file")
    forget(container)
    asked = asdict(wanted) | {"suffixes": sorted(wanted.suffixes)}
    place = container if is_elsewhere(container) else os.path.realpath(container)
    text = json.dumps([FORMAT, place, state, asked])
    return _Part(container, state, folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.jsonl")


def _read(part: _Part, wanted: Wanted, pool: ThreadPoolExecutor, share: Callable[[float], None]) -> None:
    """Read a container, and write its part.

    Args:
        share: function of the share of the container that was read so far.
    """
    left_out: dict[str, str] = {}
    facts: dict[str, Any] = {"has_names": False}
    has_channels, of_recordings = False, 0
    with writing(part.file) as file:
        try:
            container = _opened(part, wanted)
            container.share, container.lists = share, LISTS_OF_CORPORA
            entries = container.entries()
            while chunk := _next(entries, part):
                some = [chunk[first : first + AT_ONCE] for first in range(0, len(chunk), AT_ONCE)]
                measured = itertools.chain.from_iterable(pool.map(_measured_of, some))
                for entry, found in zip(chunk, measured, strict=True):
                    at = entry.address
                    if isinstance(found, str):  # names may repeat, as those of all rows
                        name = entry.name
                        left_out[name if name not in left_out else f"{name} (at {at.offset:,})"] = found
                        continue
                    seconds, channel = found
                    has_channels = has_channels or channel is not None
                    of_recordings += channel is None and bool(entry.channel)
                    place = at.offset, at.length, at.kind
                    row = [entry.name, entry.key, *place, seconds, entry.bounds, channel, dict(entry.speakers)]
                    file.write(json.dumps(row).encode() + b"\n")
                left_out |= container.left_out
                facts = _facts(container) | {"has_channels": has_channels, "of_recordings": of_recordings}
            left_out |= container.left_out
            _keep_lists(part, container.found_lists)
        except SpkdError as error:
            left_out[""] = str(error).removeprefix(f"{part.container}: ")
            facts["failed"] = True
        for name, reason in left_out.items():
            file.write(json.dumps([name, reason]).encode() + b"\n")
        file.write(json.dumps(facts).encode())


def _facts(container: Container) -> dict[str, Any]:
    counted = {name: dict(getattr(container, name)) for name in ("unused", *BESIDE_AUDIO)}
    return {"has_names": container.has_names, **counted}


def _keep_lists(part: _Part, found: Mapping[str, Address]) -> None:
    """Write the lists of a corpus that are in a container to a folder. Raises SpkdError where one cannot be read."""
    for name, address in found.items():
        if ".." not in PurePosixPath(name).parts:
            try:
                write_bytes(part.lists / name, read(address))
            except (OSError, ValueError) as error:
                raise SpkdError(f"{part.container}: {name}: {error}") from error


def _opened(part: _Part, wanted: Wanted) -> Container:
    """Raises SpkdError where it cannot be opened, or is of no kind that is read."""
    if (kind := kind_of(part.container)) is None:
        raise SpkdError("no container that is read here")
    made: Container = kind(part.container, wanted)
    return made


def _next(entries: Iterator[Entry], part: _Part) -> list[Entry]:
    """The next entries. Raises SpkdError where they cannot be read."""
    try:
        return list(islice(entries, CHUNK))
    except OSError as error:  # of the container: what is written raises its own
        raise SpkdError(f"{part.container}: {error.strerror or error}") from error


def _measured_of(entries: Sequence[Entry]) -> list[tuple[float, int | None] | str]:
    return [_measured(entry) for entry in entries]


def _measured(entry: Entry) -> tuple[float, int | None] | str:
    """Duration of an entry (s) and the channel that is taken, or the reason for which it cannot be used.

    Audio of one channel is taken as it is: what is given beside it is the channel of the recording of which it was cut.
    """
    path = str(entry.address)
    try:
        seconds, channels = probe(path), 1 if entry.channel is None else channel_count(path)
    except AudioError as error:
        return error.reason
    if entry.channel is None or channels == 1:
        return seconds, None
    if entry.channel >= channels:
        return f"has {channels} channels; channel {entry.channel} is given beside it (counted from 0)"
    return seconds, entry.channel


# Names of utterances and speakers.

Row = Sequence[Any]  # of a part
FOLDER = "folder"  # the layout of which nothing is known but that there is a folder for each speaker


@dataclass
class _Naming:
    """How utterances and speakers are named.

    Attributes:
        layout: name of the layout; "" where ids are keys.
        source: where speakers are named: a member beside the audio, a JSON key or a column; "" for the layout.
        level: number of levels of folders above those of the speakers, by the layout `folder`.
        prefixed: whether the name of the container precedes the id.
    """

    layout: str = ""
    source: str = ""
    level: int = 0
    prefixed: bool = False
    notes: list[str] = field(default_factory=list)

    def named(self, part: _Part, short: str = "") -> Iterator[tuple[Row, str, str | None]]:
        """Entries of a container with their ids, "" where one does not fit the layout, and speakers.

        Args:
            short: name of the container among the others.
        """
        if not self.layout:
            for row in part.entries():
                yield row, f"{short}/{row[1]}" if self.prefixed else row[1], row[-1].get(self.source)
            return
        rows = list(part.entries())
        files = [Path(row[0]) for row in rows]
        layout: type[Layout] = LAYOUTS[self.layout]
        is_folder = self.layout == FOLDER
        found = map(layout.read, files) if is_folder else layout.names(_root(part, layout, files), files)
        for row, file, named in zip(rows, files, found, strict=True):
            name, speaker = named or ("", None)
            if self.source:
                speaker = row[-1].get(self.source)
            elif named and self.layout == FOLDER:
                speaker = file.parts[self.level]
            yield row, name, speaker


def _roots(part: _Part) -> list[Path]:
    """Folders that may be that of a corpus: with the lists that are in a container, and that beside it."""
    return [*([part.lists] if part.lists.is_dir() else []), _unpacked(part)]


def _root(part: _Part, layout: type[Layout], files: Sequence[Path]) -> Path:
    """The one of these folders that has a layout."""
    roots = _roots(part)
    return next((root for root in roots if layout.detects(root, files)), roots[0])


def _unpacked(part: _Part) -> Path:
    """Folder into which a container would be unpacked, beside which the lists of a corpus may be."""
    path = PurePosixPath(part.container) if is_elsewhere(part.container) else Path(part.container)
    return Path(path.parent / path.name.partition(".")[0])


def _naming(parts: Sequence[_Part], root: str, layout: str | None, speaker: str) -> _Naming:
    """How utterances and speakers are named, from all entries.

    Raises:
        UsageError: nothing has the speakers that were asked for.
        SpkdError: folders of the layout `folder` that cannot be speakers.
    """
    sources, total, first, several = Counter[str](), 0, dict[str, str](), set[str]()
    for part in parts:
        for row in part.entries():
            total += 1
            sources.update(row[-1].keys())
            several.update(name for name, value in row[-1].items() if first.setdefault(name, value) != value)
    naming = _Naming(layout or "")
    if speaker:
        naming.source = next((name for name in sources if name.lower() == speaker.lower()), "")
        if not naming.source:
            raise UsageError(f"{root}: nothing names speakers by {speaker!r}{did_you_mean(speaker, sources)}")
    elif layout is None:
        # The likeliest of those that most entries have: a few may lack a name, and all have a label of another kind.
        often = [name for name, count in sources.items() if 2 * count >= max(sources.values())]
        naming.source = min(often, key=_rank, default="")
        # A class may be of another kind, above all where it is one for all.
        is_sure = naming.source and _rank(naming.source) < _rank(UNSURE[0])
        of_paths = "" if is_sure else _layout_of(parts, total)
        if naming.source and of_paths not in ("", FOLDER):
            if naming.source in several:
                naming.notes.append(f"ids and speakers of the layout {of_paths} are not taken (--layout {of_paths})")
            else:
                naming.notes.append(f"{naming.source} is {first[naming.source]!r} for all, and passed over (--speaker)")
                naming.source = ""
        naming.layout = "" if naming.source else of_paths
    if naming.source and (lacking := total - sources[naming.source]):
        naming.notes.append(f"utterances without a speaker ({naming.source}): {lacking:,}")
    if naming.source and (others := sorted(sources.keys() - {naming.source})):
        naming.notes.append(f"speakers are those of {naming.source}, not of {first_few(others)} (--speaker NAME)")
    if naming.layout and naming.layout != FOLDER:
        naming.notes += _notes_of(LAYOUTS[naming.layout], parts)
    if naming.layout == FOLDER and not naming.source:
        _by_folders(naming, root, sorted({Path(row[0]).parts[:-1] for part in parts for row in part.entries()}))
    return naming


def _layout_of(parts: Sequence[_Part], total: int) -> str:
    """The layout that fits; "" where there are no folders.

    Args:
        total: number of entries.
    """
    fitting, in_folders = Counter[str](), 0
    for part in parts:
        if not part.facts["has_names"]:
            continue
        files = [Path(row[0]) for row in part.entries()]
        in_folders += sum(len(file.parts) > 1 for file in files)
        for name, kind in LAYOUTS.items():
            if name != FOLDER and files and any(kind.detects(root, files) for root in _roots(part)):
                fitting[name] += len(files)
    found = next((name for name in LAYOUTS if fitting[name] >= MOST_FITTING * total > 0), "")
    return found or (FOLDER if in_folders >= MOST_FITTING * total > 0 else "")


def _notes_of(layout: type[Layout], parts: Sequence[_Part]) -> list[str]:
    """Notes of a layout on all containers, each of them once."""
    notes: dict[str, None] = {}
    for part in parts:
        files = [Path(row[0]) for row in part.entries()]
        notes |= dict.fromkeys(layout.notes(_root(part, layout, files), files))
    return list(notes)


def _rank(source: str) -> int:
    name = source.lower()
    return PRIORITY.index(name) if name in PRIORITY else len(PRIORITY)


def _by_folders(naming: _Naming, root: str, folders: Sequence[tuple[str, ...]]) -> None:
    """Find the level of the folders that are speakers.

    Args:
        folders: of all entries, the folders within their containers.
    """
    files = [Path(*folder, "_") for folder in folders]
    naming.level = level = level_of_speakers(Path(root), files)
    if level:
        parts = sorted({"/".join(folder[:level]) for folder in folders})
        naming.notes.append(f"speakers are the folders within {first_few(parts, 4)}, taken for parts of the corpus")
    naming.notes += notes_on_speakers([folder[level:] for folder in folders if len(folder) > level])


def _check_ids(naming: _Naming, parts: Sequence[_Part], root: str) -> None:
    """Put the containers' names in front of keys that repeat among them.

    Ids are compared by their hashes, of which ten million take 80 MB of a temporary file.

    Raises:
        SpkdError: an id is there twice all the same.
        UsageError: so is its audio, as in configurations of a data set that overlap.
    """

    def hashes_of(part: _Part) -> np.ndarray:
        return np.fromiter((hash_of(name.encode()) for _, name, _ in naming.named(part) if name), np.uint64)

    spool, ends = Spool(np.uint64), [0]
    for part in parts:
        spool.add(hashes_of(part))
        ends.append(len(spool))
    hashes, repeated = spool.array(), set[int]()
    for numbers in by_ranges(hashes):
        values = np.sort(hashes[numbers])
        repeated.update(values[1:][values[1:] == values[:-1]].tolist())
    if not repeated:
        return
    seen: dict[str, tuple[str, str, int]] = {}
    rows: dict[str, Row] = {}
    across, alike = 0, dict[str, tuple[Address, Address]]()
    for part, begin, end in zip(parts, ends[:-1], ends[1:], strict=True):
        entries = ((row, name) for row, name, _ in naming.named(part) if name)
        for value, (row, name) in zip(hashes[begin:end].tolist(), entries, strict=True):
            if value not in repeated:
                continue
            place = (part.container, row[0], row[2])
            if (earlier := seen.setdefault(name, place)) == place:
                rows[name] = row
                continue
            if naming.layout or earlier[0] == part.container:
                where = f"{earlier[0]} ({earlier[1]}) and {part.container} ({row[0]})"
                raise SpkdError(
                    f"{root}: {where} would both be the utterance {name!r}; choose with --suffix, or another --layout"
                )
            across += 1
            first = rows[name]
            if first[5:] == row[5:]:
                alike[name] = Address(earlier[0], *first[2:5]), Address(part.container, *row[2:5])
    naming.notes += _same_audio(alike, len(hashes), root)
    if across:
        naming.prefixed = True
        naming.notes.append(f"keys that repeat among the containers, whose names precede the ids: {across:,}")


def _same_audio(alike: Mapping[str, tuple[Address, Address]], total: int, root: str) -> list[str]:
    """A note where audio that repeats by its key, speakers and duration is the same, by some of it.

    Args:
        alike: key of each such audio -> where it is.
        total: number of entries.
    Raises:
        UsageError: it is much of all.
    """
    compared = list(alike)[:: max(len(alike) // COMPARED, 1)][:COMPARED]
    try:
        if not compared or any(read(alike[name][0]) != read(alike[name][1]) for name in compared):
            return []
    except (OSError, ValueError):  # what cannot be read is listed where it is used
        return []
    one, other = alike[compared[0]]
    same = (
        f"{one.container} and {other.container} hold the same audio of {compared[0]!r}, and so it is for "
        f"{counted(len(alike), 'key')}, of which {len(compared):,} were compared"
    )
    if len(alike) < MUCH * total:
        return [f"{same}: utterances that are there twice"]
    raise UsageError(f"{root}: {same}; name files or folders that do not overlap")


def _sets(parts: Sequence[_Part]) -> list[str]:
    """A note where containers are of several sets (train, test), as their names or folders say."""
    matches = (SET_OF.search(part.container) for part in parts)
    sets = sorted({match[1] for match in matches if match})
    return [f"sets taken together: {', '.join(sets)} (name the folder or the files of one to take it alone)"] * (
        len(sets) > 1
    )


# Writing the manifest.


def index(
    containers: Sequence[str | Path],
    out: Path,
    layout: str | None = None,
    workers: int = 8,
    suffix: str | None = None,
    speaker: str = "",
    id_column: str = "",
    audio: str = "",
) -> Summary:
    """Write a manifest of the audio in containers, with durations, and print notes on what was assumed.

    Args:
        out: the manifest. What is read is kept in a folder beside it until the manifest is written.
        layout: a name in LAYOUTS; None takes speakers from where they are named, or else the first layout that fits.
        workers: number of threads that read headers of audio.
        suffix: suffix of the audio to take; None takes all.
        speaker, id_column, audio: as of `Wanted`.
    Raises:
        UsageError: there is no such file or layout, or nothing that names speakers so.
        SpkdError: no audio can be used, or two utterances would have one id.
    """
    if layout is not None and layout not in LAYOUTS:
        raise UsageError(f"unknown layout {layout!r}{did_you_mean(layout, LAYOUTS)}")
    wanted = Wanted(
        frozenset(AUDIO_SUFFIXES if suffix is None else {f".{suffix.lower().lstrip('.')}"}), speaker, id_column, audio
    )
    root = str(containers[0]) if len(containers) == 1 else f"{containers[0]} and {len(containers) - 1:,} others"
    folder = parts_of(out)
    make_folder(folder.parent)
    remove_abandoned(folder)
    left_out: dict[str, str] = {}
    parts = _distinct([_part_of(str(container), folder, wanted) for container in containers], left_out)
    _read_all(parts, wanted, workers)
    naming = _naming(parts, root, layout, speaker)
    _check_ids(naming, parts, root)
    stretches, notes = _stretches(parts)
    naming.notes += [*notes, *_sets(parts)]
    summary = _written(parts, naming, out, root, left_out, stretches)
    for note in (*naming.notes, *_unused(parts)):
        log(f"note: {root}: {note}")
    forget_parts(out)
    return summary


def _stretch(bounds: tuple[float, float | None] | None, seconds: float) -> tuple[float, float]:
    """Start and duration (s) of the stretch of an audio that columns beside it give; all of it where it is whole."""
    if bounds is None:
        return 0.0, seconds
    start, length = bounds[0], seconds - bounds[0] if bounds[1] is None else bounds[1]
    return (0.0, seconds) if abs(length - seconds) <= CLOSE and start <= CLOSE else (start, length)


def _stretches(parts: Sequence[_Part]) -> tuple[bool, list[str]]:
    """Whether columns of start, end and duration are stretches of the audio beside them, and a note on it.

    They are where more of those that are not the whole audio lie within it than beyond it. Else they are taken for
    times in the recording of which the audio was cut, as in many data sets of the Hugging Face hub.
    """
    within, beyond = 0, 0
    for part in parts:
        for row in part.entries():
            start, length = _stretch(row[6], row[5])
            is_beyond = length <= 0 or start + length > row[5] + CLOSE
            beyond += is_beyond
            within += not is_beyond and (start > 0 or length < row[5])
    if within > beyond:
        return True, [f"stretches of the audio, by start and end or duration beside it: {within:,}"]
    return False, [
        f"start and end or duration beside the audio are not stretches of it, which is taken whole, as they lie beyond "
        f"its end: {beyond:,} (within it: {within:,})"
    ] * bool(beyond)


def parts_of(out: Path) -> Path:
    """Folder in which what was read is kept until a manifest is written."""
    return out.with_name(out.name + PARTS)


def forget_parts(out: Path) -> None:
    """Remove what was read for a manifest that is written now, also for one of other containers that was stopped."""
    folder = parts_of(out)
    for path in folder.glob("*"):
        if path.suffix == LISTS_OF_PART and OF_PART.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
        elif OF_PART.fullmatch(path.name):
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # other files in it
        folder.rmdir()


def _distinct(parts: Sequence[_Part], left_out: dict[str, str]) -> list[_Part]:
    """The parts without those of links to containers that are there already."""
    kept: dict[Path, _Part] = {}
    for part in parts:
        if not part.container.isprintable():
            left_out[part.container] = "its name holds control characters"
        elif kept.setdefault(part.file, part) is not part:
            left_out[part.container] = "listed twice, or a link to what is listed under another name"
    return list(kept.values())


def _read_all(parts: Sequence[_Part], wanted: Wanted, workers: int) -> None:
    """Read the containers that have no part yet."""
    sizes = [part.state[0] / 1e6 for part in parts]  # MB
    kept = [part.is_read() for part in parts]
    before = sum(size for size, there in zip(sizes, kept, strict=True) if there)
    if any(kept):
        log(f"{counted(sum(kept), 'container')} of {len(parts):,} read before")
    with track("reading headers", round(sum(sizes)), "MB", round(before)) as bar, ThreadPoolExecutor(workers) as pool:
        for part, size, there in zip(parts, sizes, kept, strict=True):
            if there:
                continue

            def share(done: float, start: float = before, of: float = size) -> None:
                if (new := round(start + done * of) - bar.done) > 0:
                    bar.advance(new)

            _read(part, wanted, pool, share)
            before += size
            share(1.0)


def _written(
    parts: Sequence[_Part], naming: _Naming, out: Path, root: str, left_out: dict[str, str], stretches: bool
) -> Summary:
    shorts = {path: name.partition(".")[0] for path, name in short_names(p.container for p in parts).items()}
    if len(set(shorts.values())) < len(shorts):
        shorts = short_names(part.container for part in parts)
    folder, speakers, seconds, count = out.parent.resolve(), set[str](), 0.0, 0
    columns = [*HEADER, *(["channel"] if any(part.facts.get("has_channels") for part in parts) else []), STATE]
    with writing(out) as file:
        write = row_writer(file, out, columns)
        for part in parts:
            container, state = relative_path(part.container, folder), state_text(part.state)
            for name, reason in part.left_out():
                left_out[f"{part.container}: {name}" if name else part.container] = reason
            for row, name, given in naming.named(part, shorts[part.container]):
                if not name:
                    left_out[f"{part.container}: {row[0]}"] = f"does not fit the layout {naming.layout}"
                    continue
                start, length = _stretch(row[6], row[5]) if stretches else (0.0, row[5])
                if start + length > row[5] + CLOSE:
                    left_out[f"{part.container}: {row[0]} (utterance {name})"] = (
                        f"its stretch, of {length:g} s from {start:g} s on, ends behind the audio of {row[5]:g} s"
                    )
                    continue
                speaker = None if given is None else unicodedata.normalize("NFC", given)
                address = str(Address(container, row[2], row[3], row[4]))
                values = name, address, speaker, min(length, row[5] - start), start, row[7], state
                write(dict(zip((*HEADER, "channel", STATE), values, strict=True)))
                count, seconds = count + 1, seconds + length
                speakers.update([] if speaker is None else [speaker])
        if not count:
            name, reason = next(iter(left_out.items()), (root, "no audio"))
            raise SpkdError(f"{root}: holds no audio that can be used ({name}: {reason})")
    if len(speakers) == 1 and (count >= MANY or (count > 1 and naming.source.lower() in UNSURE)):
        log(
            f"note: {root}: all of {count:,} utterances are of one speaker, {min(speakers)!r}; if they are of several, "
            f"name what has the speakers (--speaker NAME), or choose another --layout ({', '.join(LAYOUTS)})"
        )
    places = [f"layout {naming.layout}"] if naming.layout else []
    places += [f"speakers from {naming.source}"] if naming.source else []
    origin = ", ".join([counted(len(parts), "container"), *(places or ["speakers unknown"])])
    return Summary(count, len(speakers), seconds, origin, left_out)


def _unused(parts: Sequence[_Part]) -> Iterator[str]:
    unused: Counter[str] = Counter()
    for part in parts:
        unused.update(part.facts.get("unused", {}))
    if unused:
        yield f"members that nothing uses: {_shown(unused)}"
    for kind, note in BESIDE_AUDIO.items():
        columns: Counter[str] = Counter()
        for part in parts:
            columns.update(part.facts.get(kind, {}))
        if columns:
            yield f"{note}: {_shown(columns)}"
    if of_recordings := sum(part.facts.get("of_recordings", 0) for part in parts):
        yield f"channels beside audio that has one alone, which is taken as it is: {of_recordings:,}"
    if unused[".txt"]:
        yield "speakers are not looked for in .txt, which mostly are transcripts (--speaker txt)"


def _shown(counts: Counter[str]) -> str:
    return first_few([f"{kind} ({count:,})" for kind, count in counts.most_common()], most=6)
