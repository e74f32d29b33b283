"""Files of records that are mapped, so that opening takes no time and memory for each record.

Such a file follows from another one, a plan or a manifest, and is made again where it is missing, damaged or of another
content.

    header      HEADER bytes: its length, JSON with the places of the sections and the content, its own digest
    sections    columns of views, of utterances, names, ...: records of fixed width, one after the other
    checksums   crc32c of every BLOCK bytes of the sections

The header and the checksums are compared with their digests when the file is opened, a block with its checksum when
this process first touches it. So nothing is used that is not covered by a digest, and little is read.
"""

from __future__ import annotations

import json
import mmap
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import numpy as np

from spkd.errors import SpkdError
from spkd.files import digest
from spkd.files.atomic import writing
from spkd.files.reading import opened, parse_json

FORMAT = 1
HEADER = 4096  # bytes
BLOCK = 1 << 14  # bytes under one checksum
CHECKED_EVERY = 1.0  # s after which the size of a mapped file is compared again
AT_ONCE = 1 << 18  # records that are written together
AGAIN = "remove it, and it is made again"  # advice for an error about a mapped file
Sections = Mapping[str, tuple[np.dtype, int, Iterable[np.ndarray]]]  # name -> type of the records, their number, pieces
Bounds = Mapping[str, Mapping[str, tuple[int, int]]]  # section -> field -> least and largest value


class NotThis(SpkdError):
    """The file is missing, short, damaged in its header, or of another content: it is made again."""


class MappedFile:
    """Sections of records in a file, mapped and checked by blocks.

    Args:
        content: what the header must say of the content: the digest of what it follows from, and the rest.
        bounds: values that the fields of some sections may have, whatever the checksums say.
    Raises:
        NotThis: missing, short, damaged in its header, or of another content.
    """

    def __init__(self, path: Path, content: Mapping[str, Any], bounds: Bounds) -> None:
        self._path, self._content, self._bounds = path, content, bounds
        try:
            with opened(path) as file:
                places, checks = _read_header(file, content, str(path))
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                self._bytes = np.frombuffer(self._map, np.uint8)
                end = checks["offset"]
                self._checks = self._bytes[end : end + 4 * checks["count"]].view("<u4").copy()
        except NotThis:
            raise
        except (SpkdError, OSError, ValueError, KeyError, TypeError) as error:
            raise NotThis(f"{path}: cannot be used ({str(error)[:200]})") from error
        if digest.of_bytes(self._checks.tobytes()) != checks["sha256"]:
            raise NotThis(f"{path}: damaged (its checksums are not those of its header)")
        self._end, self._sized = end, time.monotonic()
        self._seen = np.zeros(len(self._checks), bool)
        self._rows = {
            name: self._bytes[place["offset"] : place["offset"] + place["bytes"]].view(_dtype(place["fields"]))
            for name, place in places.items()
        }
        self._fields = {
            name: {field: rows[field] for field in rows.dtype.names or ()} for name, rows in self._rows.items()
        }
        self._offset = {name: place["offset"] for name, place in places.items()}
        self._unchecked = {name for name, rows in self._rows.items() if len(rows)}  # sections with unseen blocks

    def __reduce__(self) -> tuple[Any, ...]:
        # A spawned process maps the file itself.
        return MappedFile, (self._path, self._content, self._bounds)

    def count(self, section: str) -> int:
        """Number of records in a section."""
        return len(self._rows[section])

    def fields(self, section: str) -> tuple[str, ...]:
        return self._rows[section].dtype.names or ()

    def matches(self, section: str, dtype: np.dtype, count: int) -> bool:
        """Whether a section has so many records of a type."""
        return section in self._rows and self._rows[section].dtype == dtype and len(self._rows[section]) == count

    def take(self, section: str, name: str, numbers: np.ndarray) -> np.ndarray:
        """A field of the records of some numbers. Raises SpkdError: a block is damaged, or the file was cut off."""
        # Every batch of a training comes through here: what costs more than the records do is done once in a while.
        if time.monotonic() - self._sized >= CHECKED_EVERY:
            self._check_size()
        rows, numbers = self._rows[section], numbers.astype(np.int64, copy=False)
        # As numbers without a sign, those below 0 are the largest of all.
        if len(numbers) and numbers.view(np.uint64).max() >= len(rows):
            raise IndexError(f"{section}: a number outside of 0 to {len(rows) - 1}")
        if section in self._unchecked:
            width = rows.dtype.itemsize
            first = numbers * width + (self._offset[section] - HEADER)
            self._check(np.concatenate([first // BLOCK, (first + (width - 1)) // BLOCK]))
        return self._fields[section][name][numbers]

    def part(self, section: str, start: int, stop: int) -> np.ndarray:
        """Records `start` to `stop` - 1, which are not copied. Raises SpkdError: as of `take`."""
        self._check_size()
        rows = self._rows[section][start:stop]
        if len(rows):
            first = self._offset[section] - HEADER + start * rows.dtype.itemsize
            self._check(np.arange(first // BLOCK, (first + rows.nbytes - 1) // BLOCK + 1))
        return rows

    def whole(self, section: str) -> np.ndarray:
        """All records of a section, as of `part`."""
        return self.part(section, 0, self.count(section))

    def check(self) -> None:
        """Check every block. Raises SpkdError: one is damaged, or the file was cut off."""
        self._check_size()
        self._check(np.arange(len(self._seen)))

    def _check_size(self) -> None:
        """Check that the file has not become shorter: a read beyond its end kills the process."""
        if (size := self._map.size()) < len(self._bytes):
            cut = f"{size} bytes instead of {len(self._bytes)}"
            raise SpkdError(f"{self._path}: cut off while it was being read ({cut}); {AGAIN}")
        self._sized = time.monotonic()

    def _check(self, blocks: np.ndarray) -> None:
        new = blocks[~self._seen[blocks]]
        if not len(new):
            return
        for block in np.unique(new).tolist():
            start = HEADER + block * BLOCK
            stop = min(start + BLOCK, self._end)
            wrong = google_crc32c.value(self._bytes[start:stop].tobytes()) != self._checks[block]
            if wrong or not self._within_bounds(start, stop):
                raise SpkdError(f"{self._path}: damaged; {AGAIN}")
            self._seen[block] = True
        for section in list(self._unchecked):
            begin = self._offset[section] - HEADER
            end = begin + self._rows[section].nbytes
            if self._seen[begin // BLOCK : -(-end // BLOCK)].all():
                self._unchecked.discard(section)  # another thread may have been here

    def _within_bounds(self, start: int, stop: int) -> bool:
        """Whether the records that begin in a block have values that they may have."""
        for section, fields in self._bounds.items():
            rows, offset = self._rows[section], self._offset[section]
            width = rows.dtype.itemsize
            inside = rows[max(-(-(start - offset) // width), 0) : max(-(-(stop - offset) // width), 0)]
            for name, (low, high) in fields.items() if len(inside) else ():
                values = inside[name]
                if values.min() < low or values.max() > high:
                    return False
        return True


class Texts(Sequence[str]):
    """Strings of a section `NAME`, whose ends are the field `end` of another section."""

    def __init__(self, file: MappedFile, name: str, ends: str) -> None:
        self._file, self._name, self._ends = file, name, ends

    def __len__(self) -> int:
        return self._file.count(self._ends)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            return list(self._stretch(start, max(start, stop)))[::step]
        number = range(len(self))[key]
        return next(self._stretch(number, number + 1))

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), AT_ONCE):
            yield from self._stretch(start, min(start + AT_ONCE, len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(str.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]

    def _stretch(self, start: int, stop: int) -> Iterator[str]:
        if start == stop:
            return
        ends = self._file.part(self._ends, max(start - 1, 0), stop)["end"].tolist()
        begin = ends.pop(0) if start else 0
        data = self._file.part(self._name, begin, ends[-1])["byte"].tobytes()
        first = begin
        for end in ends:
            yield data[begin - first : end - first].decode()
            begin = end


def write_mapped(path: Path, content: Mapping[str, Any], sections: Sections) -> None:
    """Write a file of sections atomically and durably.

    Args:
        content: as of `MappedFile`.
        sections: its sections; the pieces are in order.
    """
    places, offset = {}, HEADER
    for name, (dtype, count, _) in sections.items():
        places[name] = {"offset": offset, "bytes": dtype.itemsize * count, "fields": _fields(dtype)}
        offset += dtype.itemsize * count
    checks, rest = [], b""
    with writing(path) as file:
        file.write(bytes(HEADER))
        for name, (dtype, count, pieces) in sections.items():
            written = 0
            for piece in pieces:
                data = np.ascontiguousarray(piece, dtype).tobytes()
                file.write(data)
                written += len(data)
                data = rest + data
                whole = len(data) // BLOCK * BLOCK
                checks += [google_crc32c.value(data[at : at + BLOCK]) for at in range(0, whole, BLOCK)]
                rest = data[whole:]
            if written != dtype.itemsize * count:
                raise SpkdError(f"{path}: {name} has {written} bytes instead of {dtype.itemsize * count}")
        checks += [google_crc32c.value(rest)] if rest else []
        listed = np.array(checks, "<u4").tobytes()
        file.write(listed)
        header = {
            "spkd_mapped": FORMAT,
            "content": content,
            "sections": places,
            "checksums": {"offset": offset, "count": len(checks), "sha256": digest.of_bytes(listed)},
        }
        text = json.dumps(header).encode()
        sealed = len(text).to_bytes(8, "little") + text + bytes.fromhex(digest.of_bytes(text))
        if len(sealed) > HEADER:
            raise SpkdError(f"{path}: too many sections")
        file.seek(0)
        file.write(sealed)


def _read_header(file: BinaryIO, content: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Places of the sections and of the checksums in a file. Raises NotThis, ValueError, KeyError or TypeError."""
    data, size = file.read(HEADER), os.fstat(file.fileno()).st_size
    length = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + length]
    if len(data) < HEADER or digest.of_bytes(text) != data[8 + length : 40 + length].hex() or any(data[40 + length :]):
        raise NotThis(f"{where}: damaged in its header")
    header = parse_json(text, where)
    if header["spkd_mapped"] != FORMAT or header["content"] != content:
        raise NotThis(f"{where}: of another content, or another format")
    places, checks, offset = header["sections"], header["checksums"], HEADER
    for place in places.values():
        if place["offset"] != offset or place["bytes"] < 0 or place["bytes"] % _dtype(place["fields"]).itemsize:
            raise NotThis(f"{where}: damaged (its sections do not follow one another)")
        offset += place["bytes"]
    if (checks["offset"], checks["count"]) != (offset, -(-(offset - HEADER) // BLOCK)):
        raise NotThis(f"{where}: damaged (its checksums are not those of its sections)")
    if size != offset + 4 * checks["count"]:
        raise NotThis(f"{where}: damaged ({size} bytes instead of {offset + 4 * checks['count']})")
    return places, checks


def _fields(dtype: np.dtype) -> list[list[str]]:
    assert dtype.fields is not None
    return [[name, field[0].str] for name, field in dtype.fields.items()]


def _dtype(fields: Sequence[Sequence[str]]) -> np.dtype:
    dtype = np.dtype([(str(name), str(kind)) for name, kind in fields])
    if dtype.hasobject or any(field[0].kind not in "iuf" for field in (dtype.fields or {}).values()):
        raise ValueError("a section of other than numbers")
    return dtype
