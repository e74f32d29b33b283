"""Files of this machine of which ranges are read, such as containers of audio."""

from __future__ import annotations

import errno
import os
import stat

from spkd.files.reading import MOST_HOLES

GONE = "lies beyond the end of its container; was it truncated?"


class Opened:
    """An open container.

    Attributes:
        size: its bytes.
        descriptor: its descriptor, open as long as this object is there.
    Raises:
        OSError: it cannot be opened, or is no regular file.
    """

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        status = os.fstat(self.descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", path)
        self.size = status.st_size

    def __del__(self) -> None:
        # Threads may still read from a container that is kept open no more; the last of them closes it.
        if (descriptor := self.__dict__.pop("descriptor", None)) is not None:
            os.close(descriptor)

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of a range. Raises ValueError where it lies beyond the end, or is gigabytes of nothing."""
        if offset + length > self.size:
            raise ValueError(GONE)
        if length > MOST_HOLES and (empty := self._holes(offset, length)) > MOST_HOLES:
            raise ValueError(f"{empty:,} of its {length:,} bytes are holes; `cp --sparse=never` fills them")
        data = os.pread(self.descriptor, length, offset)
        if len(data) == length:
            return data
        blocks = [data]  # a read gives 2 GiB at most
        while (left := length - sum(map(len, blocks))) > 0:
            if not (block := os.pread(self.descriptor, left, offset + length - left)):
                raise ValueError(GONE)
            blocks.append(block)
        return b"".join(blocks)

    def expect(self, offset: int, length: int) -> None:
        """Ask the system to read a range, which is read soon. Raises OSError."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.descriptor, offset, length, os.POSIX_FADV_WILLNEED)

    def _holes(self, offset: int, length: int) -> int:
        """Bytes of a range that have no room on the disk; 0 where its file system does not tell."""
        stored, place, end = 0, offset, offset + length
        try:
            while place < end:
                first = os.lseek(self.descriptor, place, os.SEEK_DATA)
                place = os.lseek(self.descriptor, first, os.SEEK_HOLE)
                stored += max(min(place, end) - min(first, end), 0)
        except OSError as error:
            if error.errno != errno.ENXIO:
                return 0
        return length - stored
