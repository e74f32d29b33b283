"""Vectors and matrices of numbers in Kaldi's ark files, binary or text. Nothing else in such a file is read."""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from spkd.files.reading import opened

BINARY = b"\0B"
KINDS = {b"FV ": ("<f4", 1), b"DV ": ("<f8", 1), b"FM ": ("<f4", 2), b"DM ": ("<f8", 2)}  # type and dimensions
LONGEST_NAME = 4096  # bytes
LONGEST_TEXT = 1 << 26  # bytes of an entry in text


def entry(values: np.ndarray) -> bytes:
    """Bytes of a vector (D,) or a matrix (T, D) in an ark file, which follow its name and a space."""
    sizes = b"".join(struct.pack("<bi", 4, size) for size in values.shape)
    return BINARY + {1: b"FV ", 2: b"FM "}[values.ndim] + sizes + values.astype("<f4").tobytes()


def mapped(path: Path) -> mmap.mmap:
    """An ark file as memory. Raises ValueError where it is empty, and as of `opened`."""
    with opened(path) as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def entries(data: mmap.mmap) -> Iterator[tuple[str, np.ndarray]]:
    """Named vectors (D,) and matrices (T, D) of an ark file, in order.

    Raises:
        ValueError: as of `parse`, or a name that is too long.
    """
    at = 0
    while at < len(data):
        space = data.find(b" ", at, at + LONGEST_NAME)
        if space < 0:
            raise ValueError(f"no name and a space at byte {at:,}")
        name = data[at:space].decode()
        values, at = parse(data, space + 1)
        yield name, values
        while data[at : at + 1].isspace():
            at += 1


def parse(data: mmap.mmap, at: int) -> tuple[np.ndarray, int]:
    """The vector (D,) or matrix (T, D) at an offset (bytes), and the offset behind it.

    Raises:
        ValueError: something else, such as a compressed matrix, audio or an object of Python; or a damaged entry.
    """
    if data[at : at + 2] != BINARY:
        return _parse_text(data, at)
    kind, at = data[at + 2 : at + 5], at + 5
    if kind not in KINDS:
        remedy = "; copy it with Kaldi's copy-feats --compress=false" if kind.startswith(b"CM") else ""
        raise ValueError(f"{kind.decode(errors='replace')!r} is no vector or matrix of floats{remedy}")
    dtype, dimensions = KINDS[kind]
    try:
        sizes = struct.unpack_from("<" + "bi" * dimensions, data, at)[1::2]
    except struct.error as error:
        raise ValueError("it ends within an entry") from error
    at += 5 * dimensions
    if min(sizes) < 0:
        raise ValueError(f"an entry of {sizes} numbers")
    values = np.frombuffer(data, dtype, math.prod(sizes), at).reshape(sizes)  # refuses more than there is
    return values.astype(np.float32), at + values.nbytes


def _parse_text(data: mmap.mmap, at: int) -> tuple[np.ndarray, int]:
    end = data.find(b"]", at, at + LONGEST_TEXT)
    bracket, _, numbers = data[at : max(end, at)].partition(b"[")
    if end < 0 or bracket.strip() or not numbers.strip():
        raise ValueError("an entry that is no vector or matrix of numbers, which alone are read")
    rows = [[float(number) for number in line.split()] for line in numbers.split(b"\n") if line.strip()]
    return np.array(rows[0] if len(rows) == 1 else rows, np.float32), end + 1
