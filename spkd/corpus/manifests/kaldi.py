"""Data folders of Kaldi and ESPnet: wav.scp, and optional utt2spk or spk2utt, segments, utt2dur."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from spkd.corpus.address import ARK, Address, is_elsewhere
from spkd.corpus.expected import expect, state_text
from spkd.corpus.manifests.fields import names_of, number, utterance
from spkd.corpus.manifests.reader import Reader, Source
from spkd.corpus.manifests.relative import place_of
from spkd.corpus.utterance import Utterance
from spkd.errors import SpkdError, UsageError
from spkd.files.reading import state_of
from spkd.files.text import MOST, numbered_lines

IN_ARCHIVE = re.compile(r"(.+):(\d+)(\[.*\])?")  # ARCHIVE:OFFSET, and a range of its samples
Table = dict[str, tuple[str, str]]  # first column -> (file and line, the rest)


class KaldiFolder(Reader):
    """Reader of a folder with wav.scp."""

    describes = "a Kaldi or ESPnet folder (wav.scp)"

    def __init__(self, source: Source, columns: Sequence[str]) -> None:
        super().__init__(source, columns)
        self.folder = source.path
        self._archives: dict[str, str] = {}

    @classmethod
    def recognises(cls, source: Source) -> bool:
        return (source.path / "wav.scp").is_file()

    def utterances(self) -> Iterator[Utterance]:
        wavs, durations = _table(self.folder / "wav.scp"), self._optional("utt2dur")
        speakers = self._optional("utt2spk") or self._inverted("spk2utt")
        further = {name: self._column(name) for name in self.columns if name not in ("duration", "speaker")}
        for where, path in wavs.values():
            if path.rstrip().endswith("|"):
                raise SpkdError(f"{where}: commands are not run; convert the audio to files first")
        used, unlabelled, labels = set[str](), set[str](), bool(speakers)
        rows = self._rows(wavs, durations)
        names = names_of(("id", "path", "speaker", "start", "duration", "channel"), str(self.folder))
        for row, where, recording in rows:
            if recording not in wavs:
                raise SpkdError(f"{where}: recording {recording!r} is not in wav.scp")
            used.add(recording)
            speaker = speakers.get(row["id"] or "", ("", None))[1]
            row |= {column: table.get(row["id"] or "", table.get(speaker or "")) for column, table in further.items()}
            row |= {"speaker": speaker, "path": self._audio(wavs[recording][1], where)}
            made, _ = utterance(row, names, where, Path(), self.columns)
            yield made
            if speakers.pop(made.id, None) is None and labels:
                unlabelled.add(made.id)
        if not labels:
            self.notes.append("neither utt2spk nor spk2utt: speakers are unknown")
        self._count(len(unlabelled), "utterances without a speaker", unlabelled)
        self._count(len(speakers), "utterances with a speaker but without audio", speakers)
        self._count(len(wavs.keys() - used), "recordings of wav.scp without a segment", wavs.keys() - used)

    def _audio(self, text: str, where: str) -> str:
        """Path of a recording, or its address in an archive."""
        if Path(text).is_file():
            return place_of(text, self.folder, where)
        if (match := IN_ARCHIVE.fullmatch(text)) is None:
            return text if is_elsewhere(text) else str(self.folder / text)
        if match[3]:
            raise SpkdError(f"{where}: a range ({match[3]}) of an entry; write segments instead")
        return str(Address(self._archive(match[1], where), int(match[2]), 0, ARK))

    def _archive(self, path: str, where: str) -> str:
        """An archive where it is: paths of ESPnet and Kaldi are relative to the folder of the recipe."""
        if is_elsewhere(path):
            return path
        if path not in self._archives:
            self._archives[path] = archive = place_of(path, self.folder, where, above=True)
            if (state := state_of(archive)) is not None:
                expect(archive, state_text(state))
        return self._archives[path]

    def _rows(self, wavs: Table, durations: Table) -> Iterator[tuple[dict[str, str | None], str, str]]:
        """Fields of each utterance, the file and line that names it, and its recording."""
        if not (self.folder / "segments").is_file():
            for name, (where, _) in wavs.items():
                yield {"id": name, "duration": durations.get(name, ("", None))[1]}, where, name
            return
        for name, (where, rest) in _table(self.folder / "segments").items():
            parts = rest.split()
            if len(parts) not in (3, 4):
                raise SpkdError(f"{where}: expected `utterance recording start end [channel]`")
            times = {"start": parts[1], "end": parts[2]}
            start, end = number(times, "start", where) or 0.0, number(times, "end", where)
            # An end of -1 is the end of the recording.
            length = None if end is None or end == -1 else end - start
            if length is not None and length <= 0:
                raise SpkdError(f"{where}: the segment ends before it starts")
            channel = parts[3] if len(parts) == 4 else None
            row = {"id": name, "start": parts[1], "duration": None if length is None else repr(length)}
            yield {**row, "channel": channel}, where, parts[0]

    def _optional(self, name: str) -> Table:
        return _table(self.folder / name) if (self.folder / name).is_file() else {}

    def _inverted(self, name: str) -> Table:
        """Utterance -> speaker, from a file with the utterances of each speaker."""
        speakers: Table = {}
        for speaker, (where, members) in self._optional(name).items():
            for member in members.split():
                if member in speakers:
                    raise SpkdError(f"{where}: {member!r} has another speaker in {speakers[member][0]}")
                speakers[member] = (where, speaker)
        return speakers

    def _column(self, column: str) -> dict[str, str]:
        """Utterance or speaker -> value, from utt2COLUMN or spk2COLUMN."""
        for file in (self.folder / f"utt2{column}", self.folder / f"spk2{column}"):
            if file.is_file():
                return {name: value for name, (_, value) in _table(file).items()}
        raise UsageError(f"{self.folder}: neither utt2{column} nor spk2{column}")

    def _count(self, count: int, what: str, names: Sequence[str] | set[str] | Table) -> None:
        if count:
            self.notes.append(f"{what}: {count:,} (first: {min(names)!r})")


def _table(file: Path) -> Table:
    """Read a file of two columns."""
    table: Table = {}
    for line_number, line in numbered_lines(file, comments=False, most=MOST):
        where, parts = f"{file}:{line_number}", line.split(maxsplit=1)
        if len(parts) != 2:
            raise SpkdError(f"{where}: expected two columns")
        if parts[0] in table:
            raise SpkdError(f"{where}: {parts[0]!r} is already in {table[parts[0]][0]}")
        table[parts[0]] = (where, parts[1].strip())
    return table
