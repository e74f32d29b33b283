"""Tar archives: WebDataset, WeSpeaker, Lhotse Shar, NeMo, and those of corpora. Only headers are read."""

from __future__ import annotations

import contextlib
import os
import posixpath
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, cast

from spkd.corpus.containers.members import Archive, Member
from spkd.corpus.ranges import Source
from spkd.errors import SpkdError

LARGEST_HEADER = 1 << 24  # bytes of a long name or of a PAX header
WINDOW = 1 << 11  # bytes that are read at once: headers are far from one another
BLOCK = 512  # bytes, the unit of tar (POSIX.1-1988 ustar)
PADDING = 1 << 20  # bytes of zeros behind the end mark: up to a multiple of 20 blocks, or of what the writer was given
# First bytes of compressed files -> command that unpacks them.
COMPRESSED = {
    b"\x1f\x8b": "gunzip -k",
    b"BZh": "bunzip2 -k",
    b"\xfd7zXZ\0": "unxz -k",
    b"\x28\xb5\x2f\xfd": "zstd -d",
    b"\x04\x22\x4d\x18": "lz4 -d",
}


class Tar(Archive):
    """Reader of the headers of a tar: ustar, GNU and PAX."""

    describes = "tar"
    suffixes = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")

    @classmethod
    def recognises(cls, path: str, begin: bytes) -> bool:
        if compression(begin) is not None:
            return path.lower().endswith(cls.suffixes)
        with contextlib.suppress(tarfile.TarError, ValueError):
            tarfile.TarInfo.frombuf(begin[:BLOCK], "utf-8", "surrogateescape")
            return True
        return path.lower().endswith(".tar")

    def members(self) -> Iterator[Member]:
        source = self.opened()
        if (command := compression(_start(source))) is not None:
            raise SpkdError(
                f"{self.path}: compressed, so that no member can be read by itself; `{command} {self.path}`"
            )
        by_name: dict[str, tuple[int, int]] = {}  # the target of a hard link is an earlier member
        end, count = 0, 0
        try:
            headers = cast(BinaryIO, _Headers(source))
            with tarfile.TarFile(fileobj=headers, encoding="utf-8", errors="surrogateescape") as tar:
                for info in _infos(tar):
                    name = posixpath.normpath(info.name).lstrip("/")
                    place, end = (info.offset_data, info.size), tar.offset
                    if info.islnk():
                        target = posixpath.normpath(info.linkname).lstrip("/")
                        if target not in by_name:
                            self._leave_out(name, "a link to no earlier member")
                            continue
                        place = by_name[target]
                    elif info.issym():
                        self._leave_out(name, "a symbolic link")
                        continue
                    elif not info.isfile():
                        if not info.isdir():
                            self._leave_out(name, "not a regular file")
                        continue
                    elif info.issparse():
                        self._leave_out(name, "a sparse member, whose bytes do not lie together")
                        continue
                    if sum(place) > source.size:
                        self._leave_out(name, "cut off by the end of its tar")
                        continue
                    by_name[name] = place
                    count += 1
                    if count % 1024 == 0:
                        self.share(end / source.size / 2)
                    yield Member(name, *place)
                end = tar.offset
                self._check_end(source, end, count)
        except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError, EOFError) as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            if not count and not self.left_out:
                raise SpkdError(f"{self.path}: not a tar that can be read ({reason})") from error
            self._damaged(f"damaged from byte {end:,} on ({reason}); what lies before is taken: {count:,} files")

    def _leave_out(self, name: str, reason: str) -> None:
        if posixpath.splitext(name)[1].lower() in self.wanted.suffixes:
            self.left_out[name.encode(errors="backslashreplace").decode()] = reason

    def _damaged(self, reason: str) -> None:
        self.left_out[""] = reason

    def _check_end(self, source: Source, end: int, count: int) -> None:
        """Note where the last header that was read is not the end of the archive, as tarfile stops at what is none."""
        mark = source.read(end, max(min(2 * BLOCK, source.size - end), 0))
        behind = source.read(end, max(min(PADDING, source.size - end), 0))
        taken = f"what lies before is taken: {count:,} files"
        if mark.strip(b"\0"):
            self._damaged(f"no header at byte {end:,}; {taken}")
        elif len(mark) < BLOCK:
            self._damaged(f"ends without an end mark at byte {source.size:,}, as if it was cut off; {taken}")
        elif behind.strip(b"\0"):
            self._damaged(f"further bytes behind its end mark at byte {end:,} (two tars in one file?); {taken}")


def _infos(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Headers one by one. Raises tarfile.ReadError where they lead back."""
    before = -1
    while (info := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # which tarfile keeps
        if tar.offset <= before or info.size < 0:
            raise tarfile.ReadError("headers that lead back")
        before = tar.offset
        yield info


def compression(begin: bytes) -> str | None:
    """Command that unpacks a file with these first bytes; None where it is not compressed."""
    return next((command for magic, command in COMPRESSED.items() if begin.startswith(magic)), None)


def _start(source: Source) -> bytes:
    return source.read(0, min(source.size, BLOCK))


class _Headers:
    """Headers of a tar as a file for tarfile, by small reads at their places.

    Raises:
        tarfile.ReadError: a header of more bytes than one has.
    """

    def __init__(self, source: Source) -> None:
        self._source, self._place = source, 0
        self._window, self._begin = b"", 0
        self.name, self.mode = "", "rb"

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = offset
        return offset

    def read(self, count: int = -1) -> bytes:
        if not 0 <= count <= LARGEST_HEADER:
            raise tarfile.ReadError(f"a header of {count:,} bytes")
        last = min(self._place + count, self._source.size)
        if not (self._begin <= self._place and last <= self._begin + len(self._window)):
            self._begin = self._place
            length = max(count, min(WINDOW, self._source.size - self._place))
            self._window = self._source.read(self._place, max(min(length, self._source.size - self._place), 0))
        data = self._window[self._place - self._begin : last - self._begin]
        self._place += len(data)
        return data

    def close(self) -> None:
        self._window = b""
