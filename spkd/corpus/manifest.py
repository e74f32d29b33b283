"""Manifests: which utterances there are, where their audio is, who speaks, how long they are.

Read and written: CSV (`utt,path,speaker,duration[,start][,channel]`) and JSON lines (NeMo's keys). Read only: TSV and
CSV of other tools (SpeechBrain's, pandas'), lists of paths, Kaldi data folders (wav.scp, utt2spk, segments, utt2dur)
and Lhotse cuts (JSON lines). Built: from folders of audio. `manifests/README.md` shows a small example of each.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from spkd.corpus.audio import MAX_SECONDS, SAMPLE_RATE, AudioError, probe
from spkd.corpus.ffmpeg import FORMATS
from spkd.errors import SpkdError, UsageError, did_you_mean
from spkd.files import digest
from spkd.files.atomic import find_files, parse_json, write_bytes
from spkd.files.text import numbered_lines, read_text
from spkd.progress import track

AUDIO_SUFFIXES = {".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".au", ".sph", *FORMATS}

_ID = ("utt", "id", "utt_id", "utterance")
_PATH = ("path", "audio_filepath", "wav", "audio", "file", "filename")
_SPEAKER = ("speaker", "spk", "spk_id", "speaker_id", "label")
_START = ("start", "offset")
_CHANNEL = ("channel", "channel_selector")
_MISSING = ("", "nan", "none", "null", "na", "n/a", "<na>")  # as pandas and others write what is not there
_DELIMITERS = (",", "\t", ";", "|")


@dataclass(frozen=True, slots=True)
class Utterance:
    """One stretch of speech in an audio file.

    Attributes:
        id: unique in its manifest; trial lists name it.
        path: of the audio file.
        speaker: None where it is unknown.
        duration: seconds; None where it was not measured yet.
        start: seconds into the file.
        channel: the only one to take, counted from 0; None averages all.
        attributes: values of the further columns that were asked for, by name.

    Example:
        >>> Utterance("id10270/5r0dWxy17C8/00001.wav", "/data/vox1/id10270/5r0dWxy17C8/00001.wav", "id10270", 8.12)
    """

    id: str
    path: str
    speaker: str | None = None
    duration: float | None = None
    start: float = 0.0
    channel: int | None = None
    attributes: tuple[tuple[str, str], ...] = ()

    def attribute(self, name: str) -> str:
        """Its value in a column of the manifest; "" where there is none."""
        if name in ("duration", "speaker"):
            value = getattr(self, name)
            return "" if value is None else str(value)
        return dict(self.attributes).get(name, "")


@dataclass(frozen=True)
class Manifest:
    """An ordered set of utterances with unique ids."""

    utterances: tuple[Utterance, ...]
    source: str = ""

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
        """Utterance id -> its index."""
        return {utterance.id: index for index, utterance in enumerate(self.utterances)}

    def pick(self, ids: Iterable[str]) -> Manifest | None:
        """The named utterances in that order; None where one is missing."""
        found = [self.index_of.get(name) for name in ids]
        return (
            None if None in found else Manifest(tuple(self.utterances[index] for index in found if index is not None))
        )

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
        """SHA-256 over ids, speakers, starts, durations (ms) and channels, so that moving the audio changes nothing."""
        return digest.of_blocks(_identity(u) for u in self.utterances)

    @classmethod
    def load(cls, path: str | Path, columns: Sequence[str] = ()) -> Manifest:
        """Read a manifest: .csv, .tsv, .jsonl, .txt (paths), each also gzipped, or a Kaldi data folder.

        Paths inside are relative to the manifest's own folder.

        Args:
            columns: further ones to keep as attributes; of a Kaldi folder, its files utt2COLUMN or spk2COLUMN.
        Raises:
            UsageError: the file is missing or of no known format, or has no such column.
            SpkdError: a malformed line (file and line named) or a duplicate id.
        """
        path = Path(path)
        if path.is_dir():
            if (path / "wav.scp").is_file():
                return cls(tuple(_kaldi(path, columns)), str(path))
            raise UsageError(f"{path}: a folder without wav.scp; make a manifest with `spkd manifest {path}`")
        if not path.exists():
            raise UsageError(f"no manifest {path}; make one with `spkd manifest AUDIO_FOLDER --out {path}`")
        suffix = path.name.removesuffix(".gz").rsplit(".", 1)[-1].lower()
        if suffix not in READERS:
            raise UsageError(
                f"{path}: unknown manifest format .{suffix}; known: .{', .'.join(READERS)}, a Kaldi folder"
            )
        manifest = cls(tuple(READERS[suffix](read_text(path), path, columns)), str(path))
        if not manifest.utterances:
            raise SpkdError(f"{path}: holds no utterances")
        for name in columns:
            if not any(utterance.attribute(name) for utterance in manifest):
                raise UsageError(f"{path}: no column {name!r}, or nothing in it")
        return manifest

    def save(self, path: str | Path) -> None:
        """Write as CSV or JSON lines, by suffix; paths relative to the file's folder where they are under it."""
        path = Path(path)
        folder = path.parent.resolve()
        rows = [dataclasses.asdict(u) | {"path": _relative(u.path, folder)} for u in self.utterances]
        out = io.StringIO()
        if path.suffix == ".csv":
            fields = ["utt", "path", "speaker", "duration", "start"]
            fields += ["channel"] if any(u.channel is not None for u in self.utterances) else []
            writer = csv.DictWriter(out, fields, lineterminator="\n", extrasaction="ignore")
            writer.writeheader()
            for row in rows:
                row["utt"] = row.pop("id")
                writer.writerow({k: "" if v is None else v for k, v in row.items()})
        elif path.suffix == ".jsonl":
            for row in rows:
                named = {
                    "id": row["id"],
                    "audio_filepath": row["path"],
                    "duration": row["duration"],
                    "speaker": row["speaker"],
                    "offset": row["start"],
                    "channel": row["channel"],
                }
                out.write(json.dumps({k: v for k, v in named.items() if v is not None}) + "\n")
        else:
            raise UsageError(f"{path}: manifests are written as .csv or .jsonl")
        write_bytes(path, out.getvalue().encode())


def _identity(u: Utterance) -> bytes:
    """What makes an utterance the same one elsewhere."""
    duration = -1 if u.duration is None else round(u.duration * 1000)
    channel = [] if u.channel is None else [u.channel]
    return json.dumps([u.id, u.speaker, round(u.start * 1000), duration, *channel]).encode()


def measure(manifest: Manifest, workers: int = 8) -> tuple[Manifest, dict[str, str]]:
    """Fill in missing durations from the audio headers, in parallel.

    Returns:
        The manifest without the utterances that cannot be used, and the reason for each of those by id.
    """
    missing = [u for u in manifest if u.duration is None]
    measured: dict[str, float] = {}
    rejected = {u.id: _too_long(u.duration) for u in manifest if (u.duration or 0.0) > MAX_SECONDS}
    if not missing and not rejected:
        return manifest, {}

    def one(utterance: Utterance) -> tuple[str, float | str]:
        try:
            seconds = probe(utterance.path) - utterance.start
            return utterance.id, seconds if seconds > 0 else "its start is beyond the end of the file"
        except AudioError as error:
            return utterance.id, error.reason

    with track("measuring audio", len(missing), "files") as bar, ThreadPoolExecutor(workers) as pool:
        for name, result in pool.map(one, missing):
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
    return Manifest(kept, manifest.source), rejected


def _too_long(seconds: float | None) -> str:
    return f"lasts {seconds:.0f} s in its manifest; durations are in seconds, of at most {MAX_SECONDS:.0f}"


def _relative(path: str, folder: Path) -> str:
    absolute = Path(path).resolve()
    return str(absolute.relative_to(folder)) if absolute.is_relative_to(folder) else str(absolute)


def _utterance(row: Mapping[str, object], where: str, folder: Path, columns: Sequence[str] = ()) -> Utterance:
    """One line of a table, with the further columns as attributes. Raises SpkdError, naming `where`, for values that an
    utterance cannot have."""
    path = _text(row, _PATH, where)
    if path is None:
        raise SpkdError(f"{where}: no audio path{did_you_mean('path', [str(k) for k in row if k])}")
    start, duration = _number(row, _START, where) or 0.0, _number(row, ("duration",), where)
    if _is_speechbrain(row):
        # SpeechBrain counts in samples at 16 kHz, and its duration is that of the whole file.
        stop = _number(row, ("stop",), where)
        duration, start = None if stop is None else (stop - start) / SAMPLE_RATE, start / SAMPLE_RATE
        if duration is not None and duration <= 0:
            raise SpkdError(f"{where}: stop is not after start")
    if duration in (-1.0, 0.0):  # how tools write that they do not know it
        duration = None
    if start < 0 or (duration is not None and duration < 0):
        raise SpkdError(f"{where}: duration and start must not be negative")
    name = _text(row, _ID, where) or Path(path).stem
    speaker, channel = _text(row, _SPEAKER, where), _channel(row, where)
    return Utterance(name, str(folder / path), speaker, duration, start, channel, _attributes(row, columns))


def _attributes(row: Mapping[str, object], columns: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """The values of a line in these columns, as text that can be shown."""
    found = ((name, _value(row, [name, name.lower()])) for name in columns)
    texts = (
        (name, "".join(c for c in str(value) if c.isprintable())[:200]) for name, value in found if value is not None
    )
    return tuple((name, text.strip()) for name, text in texts if text.strip())


def _value(row: Mapping[str, object], names: Iterable[str]) -> object:
    """The first of several columns that holds something."""
    for name in names:
        value = row.get(name)
        if isinstance(value, str) and value.strip().lower() in _MISSING:
            continue
        if value is not None and not (isinstance(value, float) and math.isnan(value)):
            return value
    return None


def _text(row: Mapping[str, object], names: tuple[str, ...], where: str) -> str | None:
    value = _value(row, names)
    if value is None:
        return None
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise SpkdError(f"{where}: {names[0]} is no text ({str(value)[:60]})")
    text = str(value).strip()
    if not text.isprintable() or len(text) > 4096:
        raise SpkdError(f"{where}: {names[0]} holds control characters, or more than 4,096 characters")
    return text


def _number(row: Mapping[str, object], names: tuple[str, ...], where: str) -> float | None:
    value = _value(row, names)
    try:
        number = None if value is None or isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError) as error:
        raise SpkdError(f"{where}: duration or start is not a number ({str(value)[:60]!r})") from error
    if number is not None and not math.isfinite(number):
        raise SpkdError(f"{where}: {names[0]} is not finite ({value})")
    return number


def _channel(row: Mapping[str, object], where: str) -> int | None:
    value = _value(row, _CHANNEL)
    if isinstance(value, list):
        value = value[0] if len(value) == 1 else "several"
    if value is None or value == "average":
        return None
    if str(value).strip() in ("A", "B"):
        return "AB".index(str(value).strip())
    try:
        number = int(str(value))
    except ValueError as error:
        raise SpkdError(f"{where}: channel {str(value)[:40]!r} is not one channel, counted from 0") from error
    if not 0 <= number < 1024:
        raise SpkdError(f"{where}: channel {number} is not one channel, counted from 0")
    return number


def _is_speechbrain(row: Mapping[str, object]) -> bool:
    """Whether a line has SpeechBrain's columns (ID, duration, wav, start, stop, spk_id), whose start is in samples."""
    return {"id", "wav", "start", "stop"} <= row.keys()


def _table(text: str, path: Path, columns: Sequence[str] = ()) -> Iterator[Utterance]:
    """CSV, TSV and the like: the delimiter is the one with which the first line names a path."""
    first = next((line for _, line in numbered_lines(text)), "")
    for delimiter in _DELIMITERS:
        # Longer than any header, and than csv takes.
        header = [name.strip().lower() for name in next(csv.reader([first[:100_000]], delimiter=delimiter), [])]
        if any(name in header for name in _PATH):
            break
    else:
        raise SpkdError(f"{path}:1: the first line must name the columns utt,path,speaker,duration")
    # Line ends within quotes are as the file has them; a lone CR ends a line as LF does.
    source = io.StringIO(re.sub(r"\r\n?", "\n", text))
    reader = csv.reader(source, delimiter=delimiter, skipinitialspace=True)
    try:
        next(reader, None)
        for cells in reader:
            where = f"{path}:{reader.line_num}"
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(header):
                raise SpkdError(f"{where}: expected {len(header)} columns")
            row = dict(zip(header, (cell.strip() for cell in cells), strict=True))
            yield _utterance(row, where, path.parent, columns)
    except csv.Error as error:
        raise SpkdError(f"{path}:{reader.line_num + 1}: not a table ({error})") from error


def _jsonl(text: str, path: Path, columns: Sequence[str] = ()) -> Iterator[Utterance]:
    for number, line in numbered_lines(text):
        where = f"{path}:{number}"
        row = parse_json(line, where)
        if not isinstance(row, dict):
            raise SpkdError(f"{where}: expected a JSON object")
        if "recording" in row:
            yield _lhotse_cut(row, where, path.parent, columns)
        else:
            yield _utterance(row, where, path.parent, columns)


def _paths(text: str, path: Path, columns: Sequence[str] = ()) -> Iterator[Utterance]:
    """A list of audio paths; each is its own id."""
    for number, line in numbered_lines(text, comments=True):
        yield _utterance({"path": line.strip(), "id": line.strip()}, f"{path}:{number}", path.parent)


READERS: dict[str, Callable[[str, Path, Sequence[str]], Iterator[Utterance]]] = {
    "csv": _table,
    "tsv": _table,
    "jsonl": _jsonl,
    "json": _jsonl,
    "txt": _paths,
    "lst": _paths,
}


def _lhotse_cut(cut: Mapping[str, Any], where: str, folder: Path, columns: Sequence[str]) -> Utterance:
    try:
        recording, channel = cut["recording"], cut.get("channel", 0)
        channel = channel[0] if isinstance(channel, list) and len(channel) == 1 else channel
        sources = recording["sources"]
        source = next((s for s in sources if channel in s.get("channels", [0])), sources[0])
        if source["type"] != "file":
            raise SpkdError(f"{where}: cut with a {source['type']!r} source; only files can be read")
        channels = source.get("channels", [0])
        supervision = (cut.get("supervisions") or [{}])[0]
        further = {**(cut.get("custom") or {}), **(supervision.get("custom") or {}), **supervision}
        row = {name: further.get(name) for name in columns} | {
            "id": cut["id"],
            "path": source["source"],
            "speaker": supervision.get("speaker"),
            "duration": _finite(cut["duration"]),
            "start": _finite(cut["start"]),
            # The channel within this file; all of them together where the cut has all.
            "channel": channels.index(channel) if len(channels) > 1 and not isinstance(channel, list) else None,
        }
        if isinstance(channel, list) and sorted(channel) != sorted(channels):
            raise SpkdError(f"{where}: a cut of several channels ({channel}); choose one, or all of its recording")
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise SpkdError(f"{where}: not a Lhotse cut ({str(error)[:80]!r} is missing or of another type)") from error
    return _utterance(row, where, folder, columns)


def _finite(value: Any) -> float:
    """A number of a cut, which always has it. Raises ValueError for anything else."""
    if not math.isfinite(float(value)):
        raise ValueError(f"{value} is not finite")
    return float(value)


def _kaldi(folder: Path, columns: Sequence[str]) -> Iterator[Utterance]:
    wavs, speakers, durations = (
        _kaldi_table(folder / name) if (folder / name).is_file() else {} for name in ("wav.scp", "utt2spk", "utt2dur")
    )
    tables = {name: _kaldi_column(folder, name) for name in columns if name not in ("duration", "speaker")}
    for where, path in wavs.values():
        if path.rstrip().endswith("|"):
            raise SpkdError(f"{where}: commands are not run; convert the audio to files first")

    def utterance(name: str, recording: str, where: str, **more: object) -> Utterance:
        if recording not in wavs:
            raise SpkdError(f"{where}: recording {recording!r} is not in wav.scp")
        path = wavs[recording][1]
        path = path if Path(path).is_file() else str(folder / path)
        speaker = speakers.get(name, ("", None))[1]
        further = {column: table.get(name, table.get(speaker or "")) for column, table in tables.items()}
        return _utterance({**further, "id": name, "path": path, "speaker": speaker, **more}, where, Path(), columns)

    if not (folder / "segments").is_file():
        for name, (where, _) in wavs.items():
            yield utterance(name, name, where, duration=durations.get(name, ("", None))[1])
        return
    for name, (where, rest) in _kaldi_table(folder / "segments").items():
        parts = rest.split()
        if len(parts) not in (3, 4):
            raise SpkdError(f"{where}: expected `utterance recording start end [channel]`")
        row = {"start": parts[1], "end": parts[2], "channel": parts[3] if len(parts) == 4 else None}
        start, end = _number(row, ("start",), where) or 0.0, _number(row, ("end",), where)
        # An end of -1 is the end of the recording.
        length = None if end in (None, -1.0) else (end or 0.0) - start
        if length is not None and length <= 0:
            raise SpkdError(f"{where}: the segment ends before it starts")
        yield utterance(name, parts[0], where, start=start, duration=length, channel=row["channel"])


def _kaldi_column(folder: Path, column: str) -> dict[str, str]:
    """utt2COLUMN or spk2COLUMN. Raises UsageError where there is neither."""
    for file in (folder / f"utt2{column}", folder / f"spk2{column}"):
        if file.is_file():
            return {name: value for name, (_, value) in _kaldi_table(file).items()}
    raise UsageError(f"{folder}: neither utt2{column} nor spk2{column}")


def _kaldi_table(file: Path) -> dict[str, tuple[str, str]]:
    """First column -> (file and line, the rest). Raises SpkdError for an id that is there twice."""
    table: dict[str, tuple[str, str]] = {}
    for number, line in numbered_lines(read_text(file)):
        where, parts = f"{file}:{number}", line.split(maxsplit=1)
        if len(parts) != 2:
            raise SpkdError(f"{where}: expected two columns")
        if parts[0] in table:
            raise SpkdError(f"{where}: {parts[0]!r} is already in {table[parts[0]][0]}")
        table[parts[0]] = (where, parts[1].strip())
    return table


# Layouts: how a corpus on disk names its utterances and speakers. Ids are those of the public trial lists.


def _voxceleb(path: Path) -> tuple[str, str] | None:
    """id10270/5r0dWxy17C8/00001.wav: the id is the last three parts, as in veri_test2.txt."""
    speaker = path.parts[-3] if len(path.parts) >= 3 else ""
    if not re.fullmatch(r"id\d{5}", speaker):
        return None
    return "/".join(path.with_suffix(".wav").parts[-3:]), speaker


def _librispeech(path: Path) -> tuple[str, str] | None:
    """.../1688/142285/1688-142285-0000.flac: the id is the file's stem."""
    match = re.fullmatch(r"(\d+)-\d+-\d+", path.stem)
    return (path.stem, match[1]) if match else None


def _cnceleb(path: Path) -> tuple[str, str] | None:
    """data/id00000/singing-01-001.flac, eval/enroll/id00800-enroll.flac, eval/test/id00800-singing-01-001.flac.

    Ids as in trials.lst: `id00800-enroll`, `test/id00800-singing-01-001.wav`; training: `id00000/singing-01-001`.
    """
    folder = path.parent.name
    match = re.match(r"(id\d{5})-", path.name)
    if folder == "enroll" and match:
        return path.stem, match[1]
    if folder == "test" and match:
        return f"test/{path.stem}.wav", match[1]
    return (f"{folder}/{path.stem}", folder) if re.fullmatch(r"id\d{5}", folder) else None


def _folder(path: Path) -> tuple[str, str] | None:
    """SPEAKER/any/depth/name.wav: the first folder is the speaker."""
    return (str(path), path.parts[0]) if len(path.parts) >= 2 else None


LAYOUTS: dict[str, Callable[[Path], tuple[str, str] | None]] = {
    "voxceleb": _voxceleb,
    "librispeech": _librispeech,
    "cnceleb": _cnceleb,
    "folder": _folder,
}


def build(
    root: str | Path, layout: str | None = None, workers: int = 8, suffix: str | None = None
) -> tuple[Manifest, str, dict[str, str]]:
    """A manifest of every audio file under `root`, measured in parallel.

    Args:
        layout: a name in LAYOUTS; None takes the first that fits nine of ten files.
        suffix: take only files of this one.
    Returns:
        The manifest, the layout's name, and the reason for each file left out (by path relative to root).
    Raises:
        UsageError: no such folder or layout. SpkdError: no audio there, or a layout that fits no file, or two files of
            one id.
    """
    root = Path(root)
    if not root.is_dir():
        raise UsageError(f"{root}: no such folder")
    if layout is not None and layout not in LAYOUTS:
        raise UsageError(f"unknown layout {layout!r}{did_you_mean(layout, LAYOUTS)}")
    wanted = AUDIO_SUFFIXES if suffix is None else {f".{suffix.lower().lstrip('.')}"}
    files = [path.relative_to(root) for path in find_files(root, wanted)]
    if not files:
        raise SpkdError(f"{root}: no audio files ({', '.join(sorted(wanted))})")
    anchored = [Path(root.resolve().name) / p for p in files]  # so that PATH may be the corpus or a part of it
    if layout is None:
        layout = next(
            (
                n
                for n, read in LAYOUTS.items()
                if n != "folder" and sum(read(p) is not None for p in anchored) >= 0.9 * len(files)
            ),
            "folder",
        )
    read = LAYOUTS[layout]
    found, left_out = dict[str, Utterance](), {}
    for relative, anchor in zip(files, anchored, strict=True):
        parsed = read(relative if layout == "folder" else anchor)
        if not _is_utf8(str(relative)):
            left_out[str(relative)] = "its name is not UTF-8"
        elif not str(relative).isprintable():
            left_out[str(relative)] = "its name holds control characters"
        elif parsed is None:
            left_out[str(relative)] = f"does not fit the layout {layout}"
        elif parsed[0] in found:
            other = Path(found[parsed[0]].path).relative_to(root)
            raise SpkdError(
                f"{root}: {other} and {relative} would both be the utterance {parsed[0]!r}; choose with --suffix "
                f"{relative.suffix.lstrip('.')}, or another --layout"
            )
        else:
            found[parsed[0]] = Utterance(parsed[0], str(root / relative), parsed[1])
    if not found:
        raise SpkdError(f"{root}: none of {len(files)} audio files fits the layout {layout}")
    manifest, unreadable = measure(Manifest(tuple(found.values()), str(root)), workers)
    return manifest, layout, left_out | unreadable


def _is_utf8(name: str) -> bool:
    try:
        os.fsencode(name).decode()
    except UnicodeDecodeError:
        return False
    return True
