"""How a target lies on disk: a Zarr v3 array of uncompressed shards, written and read by us without zarr.

Every shard is a header of 128 bytes that says which cache and unit it belongs to (Zarr readers, which go by the index,
never see it), a run of inner chunks in order, the index (offset and length of each, little-endian uint64, both all ones
where the chunk is empty), and the index's crc32c: `sharding_indexed` with `bytes` inside, as the Zarr v3 specification
has it. Laid out so, the used part of a shard is one C-ordered matrix that can be mapped.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from spkd.cache.target import DTYPES, Target
from spkd.errors import SpkdError

UTTERANCE_CHUNK = 64  # rows of an inner chunk
FRAME_CHUNK = 128
EMPTY = 2**64 - 1
HEADER = 128  # bytes


def chunk_rows(target: Target) -> int:
    return UTTERANCE_CHUNK if target.hop is None else FRAME_CHUNK


def shard_rows(target: Target, unit_views: int, unit_seconds: float) -> int:
    """Rows of one shard: enough for every unit the plan can make, a multiple of the inner chunk.

    A view of n samples has at most n / hop + 1 rows.
    """
    most = float(unit_views) if target.rate is None else unit_seconds * target.rate + unit_views
    chunk = chunk_rows(target)
    return chunk * -(-int(np.ceil(most)) // chunk)


def array_metadata(target: Target, rows: int, units: int) -> dict[str, Any]:
    """zarr.json of a target with `units` shards of `rows` rows. Missing rows read as NaN, never as zeros."""
    little_endian = {"name": "bytes", "configuration": {"endian": "little"}}
    sharding = {
        "chunk_shape": [chunk_rows(target), target.dim],
        "codecs": [little_endian],
        "index_codecs": [little_endian, {"name": "crc32c"}],
        "index_location": "end",
    }
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [units * rows, target.dim],
        "data_type": target.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [rows, target.dim]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": "NaN",
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "dimension_names": ["row", "channel"],
        "attributes": {"spkd_target": target.card()},
    }


GROUP_METADATA = {"zarr_format": 3, "node_type": "group", "attributes": {"spkd_cache": 1}}


def shard_path(root: Path, target: Target, unit: int) -> Path:
    return root / target.name / "c" / str(unit) / "0"


def chunk_bytes(target: Target) -> int:
    return chunk_rows(target) * target.dim * DTYPES[target.dtype].itemsize


def header_bytes(fingerprint: str, unit: int) -> bytes:
    """The first bytes of every shard of one unit of one cache."""
    return f"spkd shard 1 {fingerprint} {unit}\n".encode().ljust(HEADER)


def index_bytes(target: Target, rows: int, used_chunks: int) -> bytes:
    """The index of a shard whose first `used_chunks` inner chunks are filled, with its crc32c."""
    index = np.full((rows // chunk_rows(target), 2), EMPTY, "<u8")
    index[:used_chunks, 0] = HEADER + np.arange(used_chunks) * chunk_bytes(target)
    index[:used_chunks, 1] = chunk_bytes(target)
    body = index.tobytes()
    return body + google_crc32c.value(body).to_bytes(4, "little")


def index_length(target: Target, rows: int) -> int:
    """Bytes of a shard's index."""
    return 16 * (rows // chunk_rows(target)) + 4


def expect_shards(paths: Sequence[Path], target: Target, rows: int) -> None:
    """Ask the system to fetch the headers and indices of shards about to be mapped, all at once."""
    for path in paths:
        try:
            with open(path, "rb") as file:
                length = index_length(target, rows)
                for at, count in ((0, HEADER), (max(file.seek(0, 2) - length, 0), length)):
                    os.posix_fadvise(file.fileno(), at, count, os.POSIX_FADV_WILLNEED)
        except (FileNotFoundError, AttributeError):  # map_shard reports the former; macOS lacks the call
            return


@dataclass(frozen=True)
class Shard:
    """The filled rows of a shard, (n, dim), read-only, on the mapping that holds them."""

    rows: np.ndarray
    map: mmap.mmap

    def read_ahead(self, start: int, stop: int) -> None:
        """Ask the system to fetch rows start to stop, without waiting for them."""
        width = self.rows.strides[0]
        first = (HEADER + start * width) // mmap.PAGESIZE * mmap.PAGESIZE
        self.map.madvise(mmap.MADV_WILLNEED, first, HEADER + stop * width - first)


def map_shard(path: Path, target: Target, rows: int, header: bytes) -> Shard:
    """Map a shard of at most `rows` rows. No file stays open: a cache may have more shards than a process has files.

    Raises:
        SpkdError: the shard is missing, truncated, of another cache or unit, or its index is damaged.
    """
    length = index_length(target, rows)
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            if size <= length + HEADER:
                raise SpkdError(f"{path}: truncated shard")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError as error:
        raise SpkdError(f"{path}: missing shard") from error
    if mapped[:HEADER] != header:
        raise SpkdError(f"{path}: a shard of another cache or unit, or damaged in its header")
    used, rest = divmod(size - length - HEADER, chunk_bytes(target))
    if rest or mapped[size - length :] != index_bytes(target, rows, used):
        raise SpkdError(f"{path}: damaged shard (its index does not fit its size)")
    height = used * chunk_rows(target)
    filled = np.frombuffer(mapped, DTYPES[target.dtype], height * target.dim, HEADER)
    return Shard(filled.reshape(height, target.dim), mapped)
