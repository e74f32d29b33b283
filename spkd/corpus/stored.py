"""Bytes of audio, whether it is a file or lies within a container.

Containers stay open, since an utterance is a few tens of kilobytes of one. All reads are by place (pread), so that
threads share a descriptor.
"""

from __future__ import annotations

import contextlib
import io
import os
import threading
import zlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, cast

from spkd.corpus.address import ARK, DEFLATE, ROW, Address, is_elsewhere, parse, state_of_container
from spkd.corpus.ark import audio_at
from spkd.corpus.expected import check
from spkd.corpus.fetched import opened_or_copied
from spkd.corpus.kept import Kept
from spkd.corpus.local import GONE
from spkd.corpus.local import Opened as Opened
from spkd.corpus.ranges import Range
from spkd.corpus.remote import Remote, open_together, opened
from spkd.corpus.rows import cell
from spkd.errors import SpkdError
from spkd.files.reading import read_bytes, state_of

MOST = 1 << 34  # bytes of audio that is read as a whole
WHOLE = 1 << 22  # bytes: audio up to this size is read at once, larger audio piece by piece
BLOCK = 1 << 16  # bytes of a piece
MOST_AHEAD = 1 << 28  # bytes of a container that are read ahead at once
MOST_OPEN = 64  # containers that stay open
MOST_KEPT = 1 << 28  # bytes of decompressed audio that are kept, as views of one recording follow one another
MOST_RATIO, SMALL = 100, 1 << 26  # most bytes for each compressed one, and bytes that any audio may have besides


_open: Kept[Opened] = Kept(MOST_OPEN, lambda _: 1)
_decompressed: Kept[bytes] = Kept(MOST_KEPT, len)


def container(path: str) -> Opened | Remote:
    """A container, which stays open.

    Raises:
        OSError: it cannot be opened.
        ValueError: it has changed since its manifest was read.
    """
    if is_elsewhere(path):
        check(path, opened(path).state)
        return opened_or_copied(path)
    state = state_of(path)
    check(path, state)
    return _open.get((path, state), lambda: Opened(path))


def read_ahead(paths: Iterable[str]) -> None:
    """Ask the system, or the place of a URL, for audio that is decoded soon, each container from front to end.

    It is asked for no more than `MOST_AHEAD` bytes in each container. Where most of what lies between is other audio,
    the place of a URL is asked for each by itself, and the system for none.
    """
    spans: dict[str, list[int]] = {}
    ranges: dict[str, list[tuple[int, int]]] = {}
    for path in paths:
        address = parse(path)
        if address is not None and address.length and address.storage in ("", DEFLATE):
            span = spans.setdefault(address.container, [address.offset, 0, 0])
            span[0], span[1] = min(span[0], address.offset), max(span[1], address.offset + address.length)
            span[2] += address.length
            ranges.setdefault(address.container, []).append((address.offset, address.length))
    open_together([path for path in spans if is_elsewhere(path)])
    for path, (first, last, total) in spans.items():
        with contextlib.suppress(OSError, ValueError):  # it is missing or has changed, which decoding finds
            if last - first <= min(2 * total + BLOCK, MOST_AHEAD):
                container(path).expect(first, last - first)
            elif isinstance(source := container(path), Remote):
                source.expect_alone(sorted(ranges[path]))


def located(address: Address) -> Address:
    """The address of the bytes themselves, of audio in an entry of a Kaldi archive and of a file elsewhere.

    Raises:
        ValueError: there is no audio, its length is unknown, or the container has changed.
        OSError: the container cannot be opened.
    """
    if address.storage != ARK:
        whole = address.length == 0 and is_elsewhere(address.container)
        return replace(address, length=container(address.container).size) if whole else address
    source = container(address.container)
    return Address(address.container, *audio_at(source.read, source.size, address.offset))


def _inflated(address: Address) -> bytes:
    """Bytes of audio that is compressed in a zip. Raises ValueError where they are damaged, or too many."""
    data = container(address.container).read(address.offset, address.length)
    most = SMALL + MOST_RATIO * len(data)
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        made = stream.decompress(data, most)
    except zlib.error as error:
        raise ValueError(f"damaged in its zip ({error})") from error
    if not stream.eof:
        ends = "longer than audio can be" if len(made) == most else "its compressed bytes end early"
        raise ValueError(f"damaged in its zip ({ends})")
    return _compared(made, address)


def _compared(data: bytes, address: Address) -> bytes:
    """The data. Raises ValueError where they are not those of which the directory of the zip has the CRC."""
    if address.crc is not None and zlib.crc32(data) != address.crc:
        raise ValueError("damaged in its zip (its CRC is not that of the directory)")
    return data


def _kept(address: Address) -> bytes | None:
    """Bytes that are not those of the container as they lie there; None where they are."""
    state = state_of_container(address.container)
    check(address.container, state)
    if address.storage == DEFLATE:
        return _decompressed.get((address, state), lambda: _inflated(address))
    if address.storage == ROW:
        return cell(address, state)
    return None


def read(address: Address) -> bytes:
    """Bytes of audio in a container.

    Raises:
        ValueError: they are not there, damaged, or too many.
        OSError: the container cannot be read.
    """
    address = located(address)
    if address.length > MOST:
        raise ValueError(f"larger than the {MOST:,} bytes that it may have")
    if (kept := _kept(address)) is not None:
        return kept
    return _compared(container(address.container).read(address.offset, address.length), address)


def content(path: str) -> bytes:
    """Bytes of audio, of a file or an address. Raises ValueError where they cannot be read."""
    address = parse(path)
    try:
        return read_bytes(Path(path), MOST) if address is None else read(address)
    except SpkdError as error:
        raise ValueError(str(error).removeprefix(f"{path}: ")) from error
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error


def size_of(path: str) -> int:
    """Bytes of audio. Raises ValueError or OSError where it cannot be read."""
    address = parse(path)
    if address is None:
        return os.stat(path).st_size
    kept = _kept(located(address))
    return located(address).length if kept is None else len(kept)


class Memory:
    """File in memory, which libraries read as any file.

    Attributes:
        descriptor: its descriptor, at the beginning of what was written.
    """

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("audio", os.MFD_CLOEXEC)
        self.process, self._size = os.getpid(), 0

    def __del__(self) -> None:
        if (descriptor := self.__dict__.pop("descriptor", None)) is not None:
            os.close(descriptor)

    def write(self, data: bytes) -> None:
        """Replace the content. Raises OSError where there is no memory."""
        view, place = memoryview(data), 0
        while place < len(data):
            place += os.pwrite(self.descriptor, view[place:], place)
        os.ftruncate(self.descriptor, len(data))
        os.lseek(self.descriptor, 0, os.SEEK_SET)
        self._size = len(data)

    def release(self) -> None:
        """Keep it for the next audio of this thread: what takes time is to make its pages."""
        if self._size <= WHOLE:
            _spare.memory = self


_spare = threading.local()


def in_memory(data: bytes) -> Memory | None:
    """A file in memory with a content; None where the system has no such files. `release` it after its use."""
    if not hasattr(os, "memfd_create"):
        return None
    memory, _spare.memory = getattr(_spare, "memory", None), None
    if memory is None or memory.process != os.getpid():  # that of a fork is its parent's, too
        memory = Memory()
    memory.write(data)
    return memory


def piecewise(address: Address, header: bool = False) -> BinaryIO | None:
    """Audio as a file that is read piece by piece; None where it is to be read at once.

    Args:
        header: whether only its header is needed.
    """
    address = located(address)
    if address.storage or (address.length <= WHOLE and not header):
        return None
    source = container(address.container)
    if address.offset + address.length > source.size:
        raise ValueError(GONE)
    return cast(BinaryIO, io.BufferedReader(Range(source, address.offset, address.length), 4096 if header else BLOCK))
