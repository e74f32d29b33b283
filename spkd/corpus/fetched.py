"""Copies of files elsewhere, and of decompressed tables, in a folder of this machine, which all processes of it share.

A copy appears whole under a name that is made of its URL and of the state of the file there, so that one of a file that
has changed is never read. It is locked as long as a process reads it. Where a new one finds no room, those that nobody
reads and that were used longest ago are removed, and nothing else in the folder is; where that is not enough, the file
is read from its place.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from spkd.config import without_unused
from spkd.corpus.address import ROW
from spkd.corpus.kept import Kept
from spkd.corpus.local import Opened
from spkd.corpus.remote import Remote, is_elsewhere, opened
from spkd.corpus.settings import FetchConfig
from spkd.files.atomic import PartFile, appending, check_is_path, remove_abandoned, writable_folder
from spkd.progress import log

if TYPE_CHECKING:
    from spkd.corpus.manifest import Manifest

LOCK = "copies.lock"  # file that is locked while room is made, and files of copies that are being made
NAME = re.compile(r"[0-9a-f]{32}\.copy")
BLOCK = 1 << 22  # bytes that are fetched at once
REQUESTS = 8  # under way at once for one copy
MOST_OPEN = 8  # copies that stay open in a process, and locked


@dataclass(frozen=True)
class Copies:
    """Folder of copies.

    Attributes:
        limit: most bytes of all copies.
    """

    folder: Path
    limit: int

    def of(self, url: str, file: Remote) -> Opened | None:
        """The copy of a file, which is made where it is not there; None where there is no room for it."""

        def fill(part: PartFile) -> None:
            with ThreadPoolExecutor(REQUESTS, "copy") as pool:
                for _ in pool.map(lambda place: _fill(part, file, place), range(0, file.size, BLOCK)):
                    pass

        return self.copy(json.dumps([url, file.state]), lambda: (file.size, fill))

    def copy(self, content: str, make: Callable[[], tuple[int, Callable[[PartFile], None]]]) -> Opened | None:
        """The copy of a content, which is made where it is not there; None where there is no room for it.

        Args:
            content: what it is a copy of, and of which state of that.
            make: gives its bytes, and a function that writes them into a file of this size.
        Raises:
            OSError: of what is copied.
        """
        name = hashlib.sha256(content.encode()).hexdigest()[:32]
        path = self.folder / f"{name}.copy"
        with self._locked(f"{name}.lock"):  # of those that want one copy, one makes it
            if (found := _held(path)) is None and self._make(path, *make()):
                found = _held(path)
        return found

    def _make(self, path: Path, size: int, fill: Callable[[PartFile], None]) -> bool:
        """Make a copy. Returns whether there was room."""
        part: PartFile | None = None
        try:
            if (part := self._room(path, size)) is None:
                return False
            fill(part)
            part.publish()
        except OSError as error:
            if error.errno is None:  # of what is copied, not of this disk
                raise
            log(f"note: fetch.cache={self.folder}: {error.strerror}; audio is read from its place")
            return False
        finally:
            if part is not None:
                part.abandon()
        return True

    def _room(self, path: Path, size: int) -> PartFile | None:
        """The file of a copy with room for all its bytes; None where there is none below the limit."""
        with self._locked(LOCK):
            remove_abandoned(self.folder)
            entries = {entry.name: entry.stat() for entry in os.scandir(self.folder) if entry.is_file()}
            copies = {name: status for name, status in entries.items() if NAME.fullmatch(name)}
            taken = sum(status.st_size for status in copies.values())
            taken += sum(status.st_size for name, status in entries.items() if NAME.match(name) and name not in copies)
            for name in sorted(copies, key=lambda name: copies[name].st_mtime_ns):
                if taken + size <= self.limit:
                    break
                if size <= self.limit and _remove(self.folder / name):
                    taken -= copies[name].st_size
            if taken + size > self.limit:
                return None
            part = PartFile(path)
            part.file.truncate(size)  # by which others see the room that it takes
            return part

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Lock of a name among all processes and threads of this machine."""
        path = self.folder / name
        while True:
            with appending(path) as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if not _is_at(file.fileno(), path):
                    continue
                yield
                if name != LOCK:
                    path.unlink(missing_ok=True)
                return


def _fill(part: PartFile, file: Remote, place: int) -> None:
    data = file.fetched(place, min(BLOCK, file.size - place))
    while data:
        written = os.pwrite(part.file.fileno(), data, place)
        data, place = data[written:], place + written


def _held(path: Path) -> Opened | None:
    """A copy, locked against its removal, as used now; None where there is none."""
    try:
        file = Opened(str(path))
        fcntl.flock(file.descriptor, fcntl.LOCK_SH)
        if not _is_at(file.descriptor, path):  # it was removed before it was locked
            return None
        os.utime(path)
    except OSError:
        return None
    return file


def _remove(path: Path) -> bool:
    """Remove a copy unless somebody reads it. Returns whether it was removed."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
    except OSError:  # read by somebody, or on a file system without locks
        return False
    finally:
        os.close(descriptor)
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


_copies: list[Copies] = []  # the folder of this process, if any; forked processes have it, too
_open: Kept[Opened | Remote] = Kept(MOST_OPEN, lambda _: 1)


def copies() -> Copies | None:
    """Folder of the copies of this process; for a process that is not forked from this one."""
    return _copies[0] if _copies else None


def use(copies: Copies | None) -> None:
    """Read files elsewhere from copies in a folder from now on; None: from their places."""
    _copies[:] = [] if copies is None else [copies]


class Fetching(Protocol):
    """Settings of a command that reads audio."""

    fetch: FetchConfig


def copy_to(config: Fetching, manifest: Manifest) -> None:
    """Read the audio of a manifest from copies in the folder that is set, if any.

    Raises:
        UsageError: the folder is an address, or was typed though no audio of the manifest is elsewhere or in a table.
        SpkdError: the folder cannot be written.
    """
    if config.fetch.cache is None:
        return
    check_is_path(config.fetch.cache)
    columns = manifest.utterances
    if not any(map(is_elsewhere, columns.folders)) and not any(f".{ROW}" in name for name in columns.names):
        without_unused(config, {"fetch": f"no path in {manifest.source} is a URL, or in a table of Parquet"})
    else:
        use(Copies(writable_folder(config.fetch.cache), round(config.fetch.limit * 1e9)))


def opened_or_copied(url: str) -> Opened | Remote:
    """A file elsewhere, or its copy here. Raises OSError as `Remote` does."""
    file = opened(url)
    if not _copies:
        return file
    return _open.get((_copies[0], url, file.state), lambda: _copies[0].of(url, file) or file)
