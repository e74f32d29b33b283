"""Manifests: which utterances there are, where their audio is, who speaks, how long they are.

Read and written: CSV (`utt,path,speaker,duration[,start]`) and JSON lines (NeMo's keys). Read only: Kaldi data
folders (wav.scp, utt2spk, segments, utt2dur) and Lhotse cuts (JSON lines). Built: from folders of audio.
`manifests/README.md` shows a small example of each.
"""

from __future__ import annotations

import csv
import dataclasses
import gzip
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from spkd import digest
from spkd.errors import SpkdError, UsageError, did_you_mean
from spkd.progress import track

AUDIO_SUFFIXES = {".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".au", ".sph"}

_ID = ("utt", "id", "utt_id", "utterance")
_PATH = ("path", "audio_filepath", "wav", "audio")
_SPEAKER = ("speaker", "spk", "spk_id", "label")
_START = ("start", "offset")


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

    Example:
        >>> Utterance("id10270/5r0dWxy17C8/00001.wav", "/data/vox1/id10270/5r0dWxy17C8/00001.wav", "id10270", 8.12)
    """

    id: str
    path: str
    speaker: str | None = None
    duration: float | None = None
    start: float = 0.0
    channel: int | None = None


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
    def load(cls, path: str | Path) -> Manifest:
        """Read a manifest: .csv, .jsonl (either may end in .gz) or a Kaldi data folder.

        Paths inside are relative to the manifest's own folder.

        Raises:
            UsageError: the file is missing or of no known format.
            SpkdError: a malformed line (file and line named) or a duplicate id.
        """
        path = Path(path)
        if path.is_dir():
            if (path / "wav.scp").is_file():
                return cls(tuple(_kaldi(path)), str(path))
            raise UsageError(f"{path}: a folder without wav.scp; make a manifest with `spkd manifest {path}`")
        if not path.is_file():
            raise UsageError(f"no manifest {path}; make one with `spkd manifest AUDIO_FOLDER --out {path}`")
        suffix = path.name.removesuffix(".gz").rsplit(".", 1)[-1].lower()
        readers: dict[str, Callable[[str, Path], Iterator[Utterance]]] = {
            "csv": _csv,
            "jsonl": _jsonl,
            "json": _jsonl,
        }
        if suffix not in readers:
            raise UsageError(f"{path}: unknown manifest format .{suffix}; known: .csv, .jsonl, a Kaldi folder")
        try:
            data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            text = data.decode("utf-8-sig")
        except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
            raise SpkdError(f"{path}: not a UTF-8 text file ({error})") from error
        manifest = cls(tuple(readers[suffix](text, path)), str(path))
        if not manifest.utterances:
            raise SpkdError(f"{path}: holds no utterances")
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
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(out.getvalue())


def _identity(u: Utterance) -> bytes:
    """What makes an utterance the same one elsewhere."""
    duration = -1 if u.duration is None else round(u.duration * 1000)
    channel = [] if u.channel is None else [u.channel]
    return json.dumps([u.id, u.speaker, round(u.start * 1000), duration, *channel]).encode()


def measure(manifest: Manifest, workers: int = 8) -> tuple[Manifest, dict[str, str]]:
    """Fill in missing durations from the audio headers, in parallel.

    Returns:
        The manifest without the utterances that cannot be read, and the reason for each of those by id.
    """
    from spkd.audio import AudioError, probe

    missing = [u for u in manifest if u.duration is None]
    if not missing:
        return manifest, {}
    measured: dict[str, float] = {}
    rejected: dict[str, str] = {}

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


def _relative(path: str, folder: Path) -> str:
    absolute = Path(path).resolve()
    return str(absolute.relative_to(folder)) if absolute.is_relative_to(folder) else str(absolute)


def _pick(row: Mapping[str, object], names: Iterable[str]) -> str | None:
    for name in names:
        if row.get(name) not in (None, ""):
            return str(row[name])
    return None


def _utterance(row: Mapping[str, object], where: str, folder: Path) -> Utterance:
    path = _pick(row, _PATH)
    if path is None:
        raise SpkdError(f"{where}: no audio path{did_you_mean('path', [str(k) for k in row if k])}")
    try:
        duration = _pick(row, ("duration",))
        seconds = None if duration is None else float(duration)
        start = float(_pick(row, _START) or 0.0)
    except ValueError as error:
        raise SpkdError(f"{where}: duration or start is not a number ({error})") from error
    if start < 0 or (seconds is not None and not 0 <= seconds < float("inf")):
        raise SpkdError(f"{where}: duration and start must not be negative")
    return Utterance(_pick(row, _ID) or Path(path).stem, str(folder / path), _pick(row, _SPEAKER), seconds, start)


def _csv(text: str, path: Path) -> Iterator[Utterance]:
    reader = csv.DictReader(io.StringIO(text))
    columns = reader.fieldnames or []
    if not any(name in columns for name in _PATH):
        raise SpkdError(f"{path}:1: the first line must name the columns utt,path,speaker,duration")
    for row in reader:
        where = f"{path}:{reader.line_num}"
        if None in row or None in row.values():
            raise SpkdError(f"{where}: expected {len(columns)} columns")
        yield _utterance(row, where, path.parent)


def _jsonl(text: str, path: Path) -> Iterator[Utterance]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise SpkdError(f"{where}: not valid JSON ({error.msg})") from error
        if not isinstance(row, dict):
            raise SpkdError(f"{where}: expected a JSON object")
        yield _lhotse_cut(row, where, path.parent) if "recording" in row else _utterance(row, where, path.parent)


def _lhotse_cut(cut: Mapping[str, Any], where: str, folder: Path) -> Utterance:
    try:
        source = cut["recording"]["sources"][0]
        if source["type"] != "file":
            raise SpkdError(f"{where}: cut with a {source['type']!r} source; only files can be read")
        supervisions = cut.get("supervisions") or [{}]
        speaker = supervisions[0].get("speaker")
        return Utterance(
            str(cut["id"]),
            str(folder / source["source"]),
            speaker,
            float(cut["duration"]),
            float(cut["start"]),
        )
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise SpkdError(f"{where}: not a Lhotse MonoCut ({error!r})") from error


def _kaldi(folder: Path) -> Iterator[Utterance]:
    wavs = dict(_kaldi_pairs(folder / "wav.scp"))
    for name, path in wavs.items():
        if path.rstrip().endswith("|"):
            raise SpkdError(f"{folder / 'wav.scp'}: {name}: commands are not run; convert the audio to files first")
    speakers = dict(_kaldi_pairs(folder / "utt2spk")) if (folder / "utt2spk").is_file() else {}
    durations = dict(_kaldi_pairs(folder / "utt2dur")) if (folder / "utt2dur").is_file() else {}

    def path_of(recording: str, where: str) -> str:
        if recording not in wavs:
            raise SpkdError(f"{where}: recording {recording!r} is not in wav.scp")
        return str(Path(wavs[recording]) if Path(wavs[recording]).is_file() else folder / wavs[recording])

    try:
        if (folder / "segments").is_file():
            for utt, rest in _kaldi_pairs(folder / "segments"):
                recording, start, end = rest.split()
                path = path_of(recording, f"{folder / 'segments'}: {utt}")
                yield Utterance(utt, path, speakers.get(utt), float(end) - float(start), float(start))
            return
        for utt in wavs:
            seconds = float(durations[utt]) if utt in durations else None
            yield Utterance(utt, path_of(utt, str(folder)), speakers.get(utt), seconds)
    except ValueError as error:
        raise SpkdError(f"{folder}: malformed segments or utt2dur ({error})") from error


def _kaldi_pairs(file: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if not line.strip():
            continue
        parts = line.split(maxsplit=1)
        if len(parts) != 2:
            raise SpkdError(f"{file}:{number}: expected two columns")
        yield parts[0], parts[1].strip()


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


def build(root: str | Path, layout: str | None = None, workers: int = 8) -> tuple[Manifest, str, dict[str, str]]:
    """A manifest of every audio file under `root`, measured in parallel.

    Args:
        layout: a name in LAYOUTS; None takes the first that fits nine of ten files.
    Returns:
        The manifest, the layout's name, and the reason for each file left out (by path relative to root).
    Raises:
        UsageError: no such folder or layout. SpkdError: no audio there, or a layout that fits no file.
    """
    root = Path(root)
    if not root.is_dir():
        raise UsageError(f"{root}: no such folder")
    if layout is not None and layout not in LAYOUTS:
        raise UsageError(f"unknown layout {layout!r}{did_you_mean(layout, LAYOUTS)}")
    files = sorted(p.relative_to(root) for p in root.rglob("*") if p.suffix.lower() in AUDIO_SUFFIXES)
    if not files:
        raise SpkdError(f"{root}: no audio files ({', '.join(sorted(AUDIO_SUFFIXES))})")
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
    found, left_out = [], {}
    for relative, anchor in zip(files, anchored, strict=True):
        parsed = read(relative if layout == "folder" else anchor)
        if parsed is None:
            left_out[str(relative)] = f"does not fit the layout {layout}"
        else:
            found.append(Utterance(parsed[0], str(root / relative), parsed[1]))
    if not found:
        raise SpkdError(f"{root}: none of {len(files)} audio files fits the layout {layout}")
    manifest, unreadable = measure(Manifest(tuple(found), str(root)), workers)
    return manifest, layout, left_out | unreadable
