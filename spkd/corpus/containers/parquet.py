"""Tables of the Parquet format with audio in their cells, as `datasets` and the Hugging Face hub hold them."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

from spkd.corpus.address import ROW, Address, state_of_container
from spkd.corpus.audio import AUDIO_SUFFIXES
from spkd.corpus.containers.container import IDS, SPEAKERS, Container, Entry, Wanted, of_place, seems_to_bound
from spkd.corpus.manifests.fields import STRETCH
from spkd.corpus.rows import Table, table
from spkd.errors import SpkdError, did_you_mean, first_few

MAGIC = b"PAR1"
PATH_OF_AUDIO = "path"  # field of a struct with audio: the name of the file that it was
AUDIO = ("audio", "wav", "flac", "mp3", "speech", "sound")  # columns with audio, where there are several of bytes
# First bytes of files -> suffix; libsndfile finds the format by itself, FFmpeg does not.
FORMATS = ((b"RIFF", ".wav"), (b"fLaC", ".flac"), (b"OggS", ".ogg"), (b"\x1aE\xdf\xa3", ".mkv"), (b"#!AMR", ".amr"))
LONGEST = 1000  # characters of an id
LONGEST_TYPE = 60  # characters of a type, in errors
# Reason why a row is left out, as `Dataset.to_parquet` of datasets writes it.
ONLY_PATH = (
    "no audio in this row, only its path; write the audio into the table (datasets: embed_table_storage), or name a "
    "table without any audio by itself, whose paths are those of files"
)


class Parquet(Container):
    """Reader of a table with a column of bytes, or of `{bytes, path}`, and of its columns with ids and speakers."""

    describes = "parquet"
    suffixes = (".parquet",)

    def __init__(self, path: str, wanted: Wanted) -> None:
        super().__init__(path, wanted)
        self.has_names = False

    @classmethod
    def recognises(cls, path: str, begin: bytes) -> bool:
        return begin.startswith(MAGIC)

    def entries(self) -> Iterator[Entry]:
        try:
            rows = table(self.path, state_of_container(self.path))
            yield from self._of_table(rows)
        except ValueError as error:
            raise SpkdError(f"{self.path}: {error}") from error

    def _of_table(self, rows: Table) -> Iterator[Entry]:
        column, columns, before = self._audio(rows), rows.schema.names, 0
        has_path = rows.audio[column] != column and rows.schema.field(column).type.get_field_index(PATH_OF_AUDIO) >= 0
        named = {name: name.lower() for name in columns if name != column}
        ids = [self.wanted.id] if self.wanted.id else [n for i in IDS for n, low in named.items() if low == i][:1]
        if self.wanted.id and self.wanted.id not in named:
            raise ValueError(f"no column {self.wanted.id!r}{did_you_mean(self.wanted.id, named)}")
        speakers = [name for name, low in named.items() if low in SPEAKERS or low == self.wanted.speaker.lower()]
        placing = {n for n, low in named.items() if low in of_place(named.values()) and _is_number(rows.schema, n)}
        self._count_unused(rows, {*ids, *speakers, *placing, column})
        classes = class_names(rows.schema.metadata)
        kind = ROW if len(rows.audio) == 1 else f"{ROW}:{column}"
        seen = set[str]()
        for group in range(rows.metadata.num_row_groups):
            part = rows.read(group, [*ids, *speakers, *placing, *([f"{column}.{PATH_OF_AUDIO}"] if has_path else [])])
            count = rows.metadata.row_group(group).num_rows
            paths = [None] * count
            if has_path:
                paths = part.column(column).combine_chunks().field(PATH_OF_AUDIO).to_pylist()
            cells = {name: part.column(name).to_pylist() for name in (*ids, *speakers, *placing)}
            begins: Any = None if rows.lacks_none(group, column) else rows.cells(group, column)
            for number, path in enumerate(paths):
                row, name = before + number, "" if path is None else str(path).lstrip("/")
                if (suffix := PurePosixPath(name).suffix.lower()) not in AUDIO_SUFFIXES:
                    begins = rows.cells(group, column) if begins is None else begins
                    suffix = _suffix(begins[number])
                if suffix not in self.wanted.suffixes:
                    continue
                if begins is not None and path is not None and not begins[number].is_valid:
                    place = _text(path)
                    self.left_out[f"{place} (row {row:,})" if place in self.left_out else place] = ONLY_PATH
                    continue
                self.has_names |= bool(name)
                given = _text(cells[ids[0]][number]) if ids else ""
                key = given or name.removesuffix(PurePosixPath(name).suffix) or f"{row:08d}"
                if not given:
                    key = f"{key}@{row}" if key in seen else key  # names that say nothing: audio.wav
                    seen.add(key)
                found = {
                    each: text
                    for each in speakers
                    if (text := _text(class_name(cells[each][number], classes.get(each, ()))))
                }
                for each in {*speakers} - found.keys():
                    if cells[each][number] not in (None, ""):
                        self.count(self.columns, f"{each} (no text)")
                address = Address(self.path, row, 0, f"{suffix.lstrip('.')}.{kind}")
                place = {named[each]: cells[each][number] for each in placing}
                yield Entry(name or f"row {row}", key, address, found, self.bounds(place), self.channel(place))
            before += count
            self.share((group + 1) / rows.metadata.num_row_groups)

    def _count_unused(self, rows: Table, used: Collection[str]) -> None:
        """Count the columns that nothing uses, and note those that seem to bound the audio."""
        for each in rows.schema:
            if each.name in used:
                continue
            low = each.name.lower()
            is_bound = seems_to_bound(low) or (each.type.num_fields and STRETCH.search(low))
            if is_bound and each.name not in rows.audio:
                self.count(self.bounding, each.name, rows.metadata.num_rows)
            else:
                self.count(self.columns, each.name + " (audio)" * (each.name in rows.audio), rows.metadata.num_rows)

    def _audio(self, rows: Table) -> str:
        """Column with audio. Raises ValueError where there is none, or several and none is named."""
        if self.wanted.audio:
            if self.wanted.audio not in rows.audio:
                near = did_you_mean(self.wanted.audio, rows.audio)
                raise ValueError(f"no column {self.wanted.audio!r} of bytes{near}")
            return self.wanted.audio
        if not rows.audio:
            shown = [f"{each.name} ({str(each.type)[:LONGEST_TYPE]})" for each in rows.schema]
            raise ValueError(f"no column of bytes, or of {{bytes, path}}, among {first_few(shown, most=6)}")
        likely = [name for name in rows.audio if name.lower() in AUDIO]
        if len(rows.audio) > 1 and len(likely) != 1:
            raise ValueError(f"several columns of bytes; choose with --audio: {', '.join(rows.audio)}")
        return (likely or list(rows.audio))[0]


def _is_number(schema: Any, name: str) -> bool:
    """Whether a column holds numbers, or text that may be numbers, but neither times of day nor nested values."""
    return re.match(r"u?int|float|double|halffloat|decimal|(?:large_)?string", str(schema.field(name).type)) is not None


def _suffix(value: Any) -> str:
    """Suffix of audio by its first bytes, as MP3 where they show nothing."""
    begin = bytes(value.as_buffer()[:12]) if value.is_valid else b""
    if begin[4:8] == b"ftyp":
        return ".m4a"
    return next((suffix for magic, suffix in FORMATS if begin.startswith(magic)), ".mp3")


def class_names(metadata: dict[bytes, bytes] | None) -> dict[str, list[str]]:
    """Column -> the names that its numbers stand for, as `datasets.ClassLabel` keeps them in a table's metadata."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return {name: list(f["names"]) for name, f in features.items() if f.get("_type") == "ClassLabel"}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def class_name(value: Any, names: Sequence[str]) -> Any:
    """The name that a number stands for; other values as they are."""
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else value


def _text(value: Any) -> str:
    """A cell as an id or a speaker; "" where it is neither text nor a whole number.

    A column of whole numbers with gaps is one of floats, as pandas writes it.
    """
    value = int(value) if isinstance(value, float) and value.is_integer() else value
    if not isinstance(value, str | int) or isinstance(value, bool):
        return ""
    text = str(value).strip()
    return text if text.isprintable() and len(text) <= LONGEST else ""
