"""Ranges of containers as files, for libraries that read those."""

from __future__ import annotations

import io
import os
from typing import Any, Protocol


class Source(Protocol):
    """What gives bytes of a range.

    Attributes:
        size: bytes of the whole.
    """

    size: int

    def read(self, offset: int, length: int) -> bytes: ...


class Range(io.RawIOBase):
    """Range of a container as a file."""

    def __init__(self, source: Source, offset: int, length: int) -> None:
        self._source, self._offset, self._length, self._place = source, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = max((0, self._place, self._length)[whence] + offset, 0)
        return self._place

    def readinto(self, buffer: Any) -> int:
        count = max(min(len(buffer), self._length - self._place), 0)
        buffer[:count] = self._source.read(self._offset + self._place, count)
        self._place += count
        return count
