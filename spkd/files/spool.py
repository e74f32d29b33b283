"""Arrays that are made piece by piece: in memory while they are small, and else in a file without a name, mapped.

So what is made of ten million utterances takes disk in the folder of temporary files (TMPDIR), and little memory.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import numpy as np

from spkd.errors import SpkdError

IN_MEMORY = 1 << 22  # bytes of an array up to which it stays in memory
AT_ONCE = 1 << 16  # rows of a stretch


class Spool:
    """Array that grows at its end.

    Args:
        row: shape of a row; () of a number.
    """

    def __init__(self, dtype: np.dtype | type | str, row: tuple[int, ...] = ()) -> None:
        self._dtype, self._row = np.dtype(dtype), row
        self._pieces: list[np.ndarray] = []
        self._waiting = self._count = 0  # bytes of the pieces, rows of all
        self._file: BinaryIO | None = None

    def __len__(self) -> int:
        return self._count

    def add(self, rows: np.ndarray) -> None:
        """Add rows, which are not copied while they are in memory.

        Raises:
            SpkdError: the folder of temporary files is full, or cannot be written.
        """
        piece = np.asarray(rows, self._dtype)
        self._pieces.append(piece)
        self._waiting += piece.nbytes
        self._count += len(piece)
        if self._waiting > IN_MEMORY:
            self._write()

    def array(self) -> np.ndarray:
        """All rows so far; more can be added afterwards, which it lacks. Raises as `add`."""
        if self._file is None:
            empty = np.zeros((0, *self._row), self._dtype)
            joined = self._pieces[0] if len(self._pieces) == 1 else np.concatenate([empty, *self._pieces])
            self._pieces = [joined]
            return joined
        self._write()
        mapped = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(mapped, self._dtype).reshape(-1, *self._row)

    def _write(self) -> None:
        try:
            self._file = self._file or tempfile.TemporaryFile(prefix="spkd-")
            for piece in self._pieces:
                self._file.write(np.ascontiguousarray(piece).data.cast("B") if piece.size else b"")
            self._file.flush()
        except OSError as error:
            raise SpkdError(
                f"{tempfile.gettempdir()}: no temporary file can be written ({error.strerror}); name a folder with "
                "room as the environment's TMPDIR"
            ) from error
        self._pieces, self._waiting = [], 0


def stretches(rows: np.ndarray) -> Iterator[np.ndarray]:
    """Stretches of an array, which are not copied."""
    return (rows[start : start + AT_ONCE] for start in range(0, len(rows), AT_ONCE))


def spooled(dtype: np.dtype | type | str, pieces: Iterable[np.ndarray]) -> np.ndarray:
    """The array of pieces one after the other."""
    made = Spool(dtype)
    for piece in pieces:
        made.add(piece)
    return made.array()


def numbers_in(chosen: np.ndarray) -> Iterator[np.ndarray]:
    """Numbers (B,), or those at which a mask (N,) is true, in stretches."""
    if chosen.dtype != bool:
        yield from stretches(chosen)
        return
    for start in range(0, len(chosen), AT_ONCE):
        yield start + np.flatnonzero(chosen[start : start + AT_ONCE])


def rows_of(items: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers (R,) of the rows of some items (B,), and the ends (B,) of the items' rows among these.

    Args:
        items: numbers of the items.
        ends: (N,) end of each item's rows, which lie one after the other.
    """
    begins = np.where(items > 0, ends[np.maximum(items - 1, 0)], 0)
    counts = ends[items] - begins
    taken = np.cumsum(counts)
    shift = np.repeat(begins - (taken - counts), counts)
    return np.arange(len(shift)) + shift, taken
