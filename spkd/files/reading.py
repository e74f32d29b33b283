"""Reading of files that anyone may have written: regular files alone, of limited size and depth."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from spkd.errors import SpkdError

MOST_BYTES = 1 << 28  # of a side file; the largest are records of caches of a hundred million views
MOST_OF_SETTINGS = 1 << 20  # bytes of a settings file
MOST_OF_WEIGHTS = 1 << 34  # bytes of a file of weights
# Addresses that a file may name. fsspec has others, and chains of them (`A::B`), which run programs or code.
PROTOCOLS = ("file", "s3", "gs", "az", "http", "https")
MOST_HOLES = 1 << 26  # bytes without room on the disk that a file may have: they take memory where it is read
MAX_DEPTH = 64  # most levels of nesting in JSON that is read; the files of spkd have 6
MOST_BRACKETS = 1 << 24  # most lists and objects in JSON; each takes twenty times the memory of its text

State = tuple[int, int]  # size (bytes) and time of the last change (ns) of a file


def state_of(path: str | Path) -> State | None:
    """Size and time of a file, by which a change of its content is noticed; None where there is none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns


def is_foreign(text: str) -> bool:
    """Whether a text is an address of another protocol than a file may name, or a chain of addresses."""
    protocol, is_address, _ = text.partition("://")
    return "::" in text or (bool(is_address) and protocol not in PROTOCOLS)


def is_irregular(path: str | Path) -> bool:
    """Whether a path names something that is no regular file: a folder, a pipe or a device.

    It is asked once: a file that another process makes or removes at this moment is either regular or not there.
    """
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def opened(path: Path) -> BinaryIO:
    """A regular file, opened for reading. A pipe, which could be waited for without end, is not opened.

    Raises:
        SpkdError: it is missing, or not a regular file.
        OSError: it cannot be read.
    """
    if is_irregular(path):
        raise SpkdError(f"{path}: not a regular file")
    try:
        return open(path, "rb")
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise SpkdError(f"{path}: missing") from error


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """Read a whole file.

    Args:
        most: most bytes that it may have.
    Raises:
        SpkdError: it is missing, not a regular file, larger, or most of it are holes.
    """
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise SpkdError(f"{path}: larger than the {most:,} bytes that it may have")
        check_holes(file, path)
        return file.read(size)


def check_holes(file: BinaryIO, path: Path) -> None:
    """Check that a file is not gigabytes of nothing, which would be read as zeros. Raises SpkdError."""
    size = os.fstat(file.fileno()).st_size
    if size > MOST_HOLES and (empty := holes(file)) > MOST_HOLES:
        raise SpkdError(f"{path}: {empty:,} of its {size:,} bytes are holes; `cp --sparse=never` fills them")


def holes(file: BinaryIO) -> int:
    """Bytes of a file that have no room on the disk, and are read as zeros; 0 where its file system does not tell."""
    size = os.fstat(file.fileno()).st_size
    stored = place = 0
    try:
        while place < size:
            first = os.lseek(file.fileno(), place, os.SEEK_DATA)
            place = os.lseek(file.fileno(), first, os.SEEK_HOLE)
            stored += place - first
    except OSError as error:
        if error.errno != errno.ENXIO:  # which tells that nothing but a hole follows
            return 0
    finally:
        os.lseek(file.fileno(), 0, os.SEEK_SET)
    return size - stored


def holds(path: Path, data: bytes) -> bool:
    """Whether a regular file has a content. A file of another size, which may be any, is not read."""
    return path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data


def check_folder(folder: Path) -> None:
    """Check that a folder which a library reads holds regular files and folders alone, none of which it would wait for.

    Raises:
        SpkdError: it holds something else.
    """
    for path in folder.iterdir():
        if is_irregular(path) and not path.is_dir():
            raise SpkdError(f"{path}: not a regular file")


def read_text(path: Path, most: int = MOST_BYTES, errors: str = "strict") -> str:
    """Read a whole file as UTF-8, with or without a byte-order mark.

    Args:
        errors: as of `bytes.decode`.
    Raises:
        SpkdError: as of `read_bytes`, or it is not UTF-8 text.
    """
    try:
        return read_bytes(path, most).decode("utf-8-sig", errors)
    except UnicodeDecodeError as error:
        raise SpkdError(f"{path}: cannot be read as text ({error})") from error


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises SpkdError: as of `read_bytes` and `parse_json`."""
    return parse_json(read_bytes(path), str(path))


def parse_json(data: bytes | str, where: str) -> Any:
    """Parse JSON of limited depth. Raises SpkdError: not JSON, nested too deep, or of too many parts."""
    count = data.count(b"[") + data.count(b"{") if isinstance(data, bytes) else data.count("[") + data.count("{")
    if count > MOST_BRACKETS:
        raise SpkdError(f"{where}: damaged, JSON of more than {MOST_BRACKETS:,} lists and objects")
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError) as error:  # ValueError also for integers of thousands of digits
        reason = "nested too deep" if isinstance(error, RecursionError) else " ".join(str(error).split())[:200]
        raise SpkdError(f"{where}: damaged, not valid JSON ({reason})") from error
    if count > MAX_DEPTH and _depth(tree) > MAX_DEPTH:  # it has no more levels than brackets
        raise SpkdError(f"{where}: damaged, JSON nested too deep")
    return tree


def _depth(tree: Any) -> int:
    """Number of levels of nesting, computed without recursion."""
    level, depth = [tree], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            return depth
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]
    return depth
