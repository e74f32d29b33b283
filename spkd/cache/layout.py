"""How a target lies on disk: a Zarr v3 array of uncompressed shards, written and read by us without zarr.

Every shard is a run of inner chunks in order, then the index (offset and length of each, little-endian uint64,
both all ones where the chunk is empty), then the index's crc32c: `sharding_indexed` with `bytes` inside, as the
Zarr v3 specification has it. Laid out so, the used part of a shard is one C-ordered matrix that can be mapped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from spkd.cache.target import DTYPES, Target
from spkd.errors import SpkdError

UTTERANCE_CHUNK = 64  # rows of an inner chunk
FRAME_CHUNK = 128
EMPTY = 2**64 - 1


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


def index_bytes(target: Target, rows: int, used_chunks: int) -> bytes:
    """The index of a shard whose first `used_chunks` inner chunks are filled, with its crc32c."""
    index = np.full((rows // chunk_rows(target), 2), EMPTY, "<u8")
    index[:used_chunks, 0] = np.arange(used_chunks, dtype=np.uint64) * np.uint64(chunk_bytes(target))
    index[:used_chunks, 1] = chunk_bytes(target)
    body = index.tobytes()
    return body + google_crc32c.value(body).to_bytes(4, "little")


def map_shard(path: Path, target: Target, rows: int) -> np.ndarray:
    """The filled rows of a shard, (n, dim), mapped read-only.

    Raises:
        SpkdError: the shard is missing, truncated, or its index is damaged or not of this layout.
    """
    length = 16 * (rows // chunk_rows(target)) + 4
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            if size < length:
                raise SpkdError(f"{path}: truncated shard")
            file.seek(size - length)
            index = file.read(length)
    except FileNotFoundError as error:
        raise SpkdError(f"{path}: missing shard") from error
    used, rest = divmod(size - length, chunk_bytes(target))
    if rest or index != index_bytes(target, rows, used):
        raise SpkdError(f"{path}: damaged shard (its index does not fit its size)")
    shape = (used * chunk_rows(target), target.dim)
    # As a plain array: np.memmap's own __getitem__ is several times slower.
    return np.memmap(path, DTYPES[target.dtype], "r", 0, shape).view(np.ndarray)
