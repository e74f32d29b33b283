"""Layout of a stored target: a Zarr v3 array of shards, written and read here without the package zarr.

A shard consists of:

- a header of 128 bytes that names the cache and the unit; Zarr readers find chunks by the index, and never read it;
- its inner chunks, in order;
- the index: offset and length of each chunk, little-endian uint64, both all ones where the chunk is empty;
- the crc32c of the index.

This is `sharding_indexed` of the Zarr v3 specification, with `bytes` inside, and `zstd` where the codec compresses.
The used part of an uncompressed shard is one C-ordered matrix that can be mapped. Of a compressed shard, the chunks
with the rows that are asked for are decoded.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import torch

from spkd.cache.card import FORMAT, Card
from spkd.cache.codec import compressed, make_codec
from spkd.cache.folder import GROUP, array_path
from spkd.errors import SpkdError
from spkd.files.mapped import CHECKED_EVERY
from spkd.files.reading import opened
from spkd.outputs.target import Target

UTTERANCE_CHUNK = 64  # rows of an inner chunk
FRAME_CHUNK = 128
EMPTY = 2**64 - 1
HEADER = 128  # bytes
ZSTD_LEVEL = 1
ZARR_TYPES = {"<f2": "float16", "<f4": "float32", "|i1": "int8", "|u1": "uint8"}


def chunk_rows(target: Target) -> int:
    return UTTERANCE_CHUNK if target.hop is None else FRAME_CHUNK


def shard_rows(target: Target, unit_views: int, unit_seconds: float) -> int:
    """Number of rows of one shard: enough for the largest unit, and a multiple of the inner chunk.

    A view of n samples has at most n / hop + 1 rows.
    """
    most = float(unit_views) if target.rate is None else unit_seconds * target.rate + unit_views
    chunk = chunk_rows(target)
    return chunk * -(-int(np.ceil(most)) // chunk)


@lru_cache
def row_format(target: Target) -> tuple[int, np.dtype]:
    """Number of columns of a stored row, and their type."""
    codec = make_codec(target.codec, target.dim)
    return codec.columns, codec.dtype


def row_bytes(target: Target) -> int:
    columns, dtype = row_format(target)
    return columns * dtype.itemsize


def chunk_bytes(target: Target) -> int:
    """Bytes of an inner chunk before compression."""
    return chunk_rows(target) * row_bytes(target)


def blank(target: Target, count: int) -> bytes:
    """Bytes of `count` empty rows: NaN where the stored type has it, all bits set elsewhere."""
    columns, dtype = row_format(target)
    if dtype.kind == "f":
        return np.full((count, columns), np.nan, dtype).tobytes()
    return b"\xff" * (count * columns)


def array_metadata(target: Target, rows: int, units: int) -> dict[str, Any]:
    """Content of zarr.json for a target with `units` shards of `rows` rows.

    Missing numbers are read as NaN where the stored type has it, never as zeros.
    """
    columns, dtype = row_format(target)
    inner: list[dict[str, Any]] = [{"name": "bytes", "configuration": {"endian": "little"}}]
    sharding = {
        "chunk_shape": [chunk_rows(target), columns],
        "codecs": [*inner, *([_zstd()] if compressed(target.codec) else [])],
        "index_codecs": [*inner, {"name": "crc32c"}],
        "index_location": "end",
    }
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [units * rows, columns],
        "data_type": ZARR_TYPES[dtype.str],
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [rows, columns]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": "NaN" if dtype.kind == "f" else int(np.frombuffer(b"\xff", dtype)[0]),
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "dimension_names": ["row", "channel"],
        "attributes": {"spkd_target": target.to_json()},
    }


def _zstd() -> dict[str, Any]:
    return {"name": "zstd", "configuration": {"level": ZSTD_LEVEL, "checksum": True}}


def zarr_files(card: Card) -> dict[str, dict[str, Any]]:
    """Name -> content of the files that describe a cache to Zarr's readers."""
    group = {"zarr_format": 3, "node_type": "group", "attributes": {"spkd_cache": FORMAT}}
    rows = {target: shard_rows(target, card.unit_views, card.unit_seconds) for target in card.targets}
    return {GROUP: group} | {str(array_path(t)): array_metadata(t, rows[t], card.units) for t in card.targets}


def unit_header(card: Card, unit: int) -> bytes:
    """Header of every shard of a unit."""
    part, number = card.part(unit)
    return f"spkd shard 1 {card.part_key(part)} {number}\n".encode().ljust(HEADER)


def index_bytes(target: Target, rows: int, lengths: Sequence[int]) -> bytes:
    """Index of a shard, with its crc32c.

    Args:
        rows: rows of the shard.
        lengths: bytes of each inner chunk in use, which are the first ones.
    """
    index = np.full((rows // chunk_rows(target), 2), EMPTY, "<u8")
    index[: len(lengths), 1] = lengths
    index[: len(lengths), 0] = HEADER + np.cumsum([0, *lengths])[:-1]
    body = index.tobytes()
    return body + google_crc32c.value(body).to_bytes(4, "little")


def index_length(target: Target, rows: int) -> int:
    return 16 * (rows // chunk_rows(target)) + 4


def compress(chunk: bytes) -> bytes:
    """Compress a chunk, with a checksum of its content."""
    from numcodecs.zstd import Zstd

    return bytes(Zstd(ZSTD_LEVEL, checksum=True).encode(chunk))


def decompress(chunk: bytes, size: int) -> bytes:
    """Decompress a chunk, without allocating more than `size` bytes.

    Args:
        size: bytes that it must have after decompression.
    Raises:
        ValueError: damaged, or of another size.
    """
    from numcodecs.zstd import Zstd

    if _claimed_size(chunk) != size:  # checked before anything is allocated
        raise ValueError("is of another size")
    try:
        return bytes(Zstd().decode(chunk, bytearray(size)))
    except RuntimeError as error:
        raise ValueError("cannot be decompressed") from error


def _claimed_size(frame: bytes) -> int | None:
    """Content size in the header of a zstd frame (RFC 8878, 3.1.1.1); None where it has none."""
    if len(frame) < 6 or frame[:4] != b"\x28\xb5\x2f\xfd":
        return None
    descriptor = frame[4]
    single, flag = bool(descriptor & 0x20), descriptor >> 6
    width = (1 if single else 0) if flag == 0 else 2**flag
    position = 5 + (0 if single else 1) + (0, 1, 2, 4)[descriptor & 3]
    value = int.from_bytes(frame[position : position + width], "little")
    return None if width == 0 else value + (256 if width == 2 else 0)


def expect_shards(paths: Sequence[Path], target: Target, rows: int) -> None:
    """Ask the operating system to read the headers and indices of shards that will be mapped next, all at once."""
    for path in paths:
        try:
            with opened(path) as file:
                length = index_length(target, rows)
                for offset, count in ((0, HEADER), (max(file.seek(0, 2) - length, 0), length)):
                    os.posix_fadvise(file.fileno(), offset, count, os.POSIX_FADV_WILLNEED)
        except (SpkdError, AttributeError):  # map_shard reports the former; macOS lacks the call
            return


class CompressedRows:
    """Rows of a compressed shard, decoded when they are read by a slice or by an array of row numbers.

    Args:
        mapped: all bytes of the shard, (size,).
        lengths: bytes of each compressed chunk.
    """

    def __init__(self, mapped: np.ndarray, lengths: np.ndarray, target: Target, path: Path) -> None:
        self._map, self._ends, self._path = mapped, HEADER + np.concatenate([[0], np.cumsum(lengths)]), path
        self._chunk, (self._columns, self._dtype) = chunk_rows(target), row_format(target)
        self._bytes = chunk_bytes(target)

    def __len__(self) -> int:
        return self._chunk * (len(self._ends) - 1)

    def __getitem__(self, key: slice | np.ndarray) -> np.ndarray:
        if isinstance(key, slice):
            first, last = key.start // self._chunk, -(-key.stop // self._chunk)
            return self._decode(first, last)[key.start - first * self._chunk : key.stop - first * self._chunk]
        first, last = int(key.min()) // self._chunk, int(key.max()) // self._chunk + 1
        return self._decode(first, last)[key - first * self._chunk]

    def _decode(self, first: int, last: int) -> np.ndarray:
        chunks = []
        for i in range(first, last):
            try:
                chunks.append(decompress(self._map[self._ends[i] : self._ends[i + 1]].tobytes(), self._bytes))
            except ValueError as error:
                raise SpkdError(f"{self._path}: damaged shard (chunk {i} {error})") from error
        return np.frombuffer(b"".join(chunks), self._dtype).reshape(-1, self._columns)

    def place(self, start: int, stop: int) -> tuple[int, int]:
        """First byte, and the byte after the last, of the chunks with rows `start` to `stop` in the file."""
        return int(self._ends[start // self._chunk]), int(self._ends[-(-stop // self._chunk)])


@dataclass
class Shard:
    """A mapped shard.

    Attributes:
        rows: (n, columns) the filled rows.
        map: (size,) all bytes of the file.
        checked: time (s) at which the file had this size last, by the monotonic clock.
    """

    rows: np.ndarray | CompressedRows
    map: np.ndarray
    path: Path
    checked: float = field(default_factory=time.monotonic)

    def check_size(self, now: float) -> None:
        """Check that the file still has the size with which it was mapped, unless that was checked a moment ago.

        A read beyond the end of a mapped file kills the process. A call of the operating system for every
        shard of every batch would cost more than the rest of the check.

        Args:
            now: time (s) by the monotonic clock.
        Raises:
            SpkdError: the file is gone, or has another size.
        """
        if now - self.checked < CHECKED_EVERY:
            return
        try:
            if os.stat(self.path).st_size == len(self.map):
                self.checked = now
                return
        except OSError as error:
            raise SpkdError(f"{self.path}: gone while it was being read ({error.strerror})") from error
        raise SpkdError(f"{self.path}: changed its size while it was being read")

    def read_ahead(self, start: int, stop: int) -> None:
        """Ask the operating system to read rows `start` to `stop`, without waiting for them."""
        if isinstance(self.rows, CompressedRows):
            first, last = self.rows.place(start, stop)
        else:
            width = self.rows.strides[0]
            first, last = HEADER + start * width, HEADER + stop * width
        first = first // mmap.PAGESIZE * mmap.PAGESIZE
        _libc().madvise(
            ctypes.c_void_p(self.map.ctypes.data + first), ctypes.c_size_t(last - first), mmap.MADV_WILLNEED
        )


@lru_cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def map_shard(path: Path, target: Target, rows: int, header: bytes) -> Shard:
    """Map a shard. No file stays open, since a cache may have more shards than a process may open files.

    Args:
        rows: largest number of rows of a shard of this target.
    Raises:
        SpkdError: the shard is missing, truncated, of another cache or unit, or its index is damaged.
    """
    # Map the file.
    length = index_length(target, rows)
    try:
        size = os.stat(path).st_size
        if size <= length + HEADER:
            raise SpkdError(f"{path}: truncated shard")
        # CPython's mmap keeps a descriptor of its own before 3.13; torch closes it once the file is mapped. The mapping
        # is private, so nothing written to it would reach the file.
        mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy()
    except FileNotFoundError as error:
        raise SpkdError(f"{path}: missing shard") from error
    except RuntimeError as error:
        raise SpkdError(f"{path}: cannot be mapped ({str(error)[:200]})") from error
    mapped.flags.writeable = False
    # Check header and index: the index must be the one that chunks of these lengths give, and they must fill the file.
    if mapped[:HEADER].tobytes() != header:
        raise SpkdError(f"{path}: a shard of another cache or unit, or damaged in its header")
    index = mapped[size - length :].tobytes()
    lengths = chunk_lengths(index)
    if index != index_bytes(target, rows, lengths) or HEADER + sum(lengths) != size - length:
        raise SpkdError(f"{path}: damaged shard (its index does not match its size)")
    # Present the chunks as rows.
    if compressed(target.codec):
        return Shard(CompressedRows(mapped, np.array(lengths, np.int64), target, path), mapped, path)
    if any(n != chunk_bytes(target) for n in lengths):
        raise SpkdError(f"{path}: damaged shard (its chunks are not of the target's size)")
    columns, dtype = row_format(target)
    height = len(lengths) * chunk_rows(target)
    return Shard(np.frombuffer(mapped, dtype, height * columns, HEADER).reshape(height, columns), mapped, path)


def chunk_lengths(index: bytes) -> list[int]:
    """Bytes of every inner chunk in use, from a shard's index."""
    entries = np.frombuffer(index[:-4], "<u8").reshape(-1, 2)
    return entries[entries[:, 0] != EMPTY, 1].tolist()
