"""Notes of the time at which each shard of a cache was last found whole, from which a verification goes on.

Shards that were found damaged are noted too, so that an extraction reads them, which else looks at no rows.

They are lines of a file in the folder of the cache, or in the user's cache folder where that cannot be written: name
and state of the shard, and the time at which it was found whole (s), or minus the time at which it was found damaged.
Further lines say when a verification of all shards was begun and finished. The notes hold for this copy alone, and are
no part of it.

The state is what the file system knows of a file: size (bytes), number, time of the last change of its content (ns) and
of anything (ns). A copy takes along the first time, not the number and the last time, which no program can set. The
number of the device is left out, since one network file system has several.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from spkd.cache.folder import NOTES, users_files
from spkd.errors import SpkdError
from spkd.files import digest
from spkd.files.atomic import appending, make_folder, write_bytes
from spkd.files.reading import read_text

BEGUN, FINISHED = "begun", "finished"
RESUMED = 7 * 86_400.0  # s after which a verification that was not finished is begun anew
RECENT = 2.0  # s after its last change in which a file may change again without another time


FileState = tuple[int, int, int, int]


def file_state(path: Path) -> FileState | None:
    """The state of a file; None where there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns


class Notes:
    def __init__(self, root: Path) -> None:
        self._root = root
        place = digest.of_bytes(os.fsencode(root.resolve()))
        self._paths = [root / NOTES, *users_files("verified", f"{place}.log")]
        self._file: IO[str] | None = None
        self._found: dict[str, tuple[FileState, float]] = {}
        last = {BEGUN: 0.0, FINISHED: 0.0}
        for name, state, at in (line for path in self._paths for line in _lines(path)):
            if name in last:
                last[name] = max(last[name], at)
            elif name not in self._found or abs(at) >= abs(self._found[name][1]):
                self._found[name] = (state, at)
        goes_on = last[FINISHED] < last[BEGUN] <= time.time() <= last[BEGUN] + RESUMED
        self._begun = last[BEGUN] if goes_on else None

    def begin(self) -> float:
        """Begin a verification of all shards, unless one was begun and not finished.

        Returns:
            The time at which it began.
        """
        if self._begun is None:
            self._begun = time.time()
            self._append(BEGUN, self._begun)
        return self._begun

    def whole_at(self, path: Path) -> float | None:
        """Time at which a shard was found whole; None where that is not known, or the shard has changed since."""
        state, at = self._found.get(self._name(path), (None, 0.0))
        return at if state is not None and state == file_state(path) and 0 <= at <= time.time() else None

    def is_damaged(self, path: Path) -> bool:
        """Whether a shard was found damaged, and has not changed since."""
        state, at = self._found.get(self._name(path), (None, 0.0))
        return at < 0 and state == file_state(path)

    def add(self, path: Path, state: FileState | None, at: float) -> None:
        """Note that a shard is whole or damaged.

        Args:
            state: its state before it was read; None where it is missing.
            at: time at which it was read (s), negative if it is damaged.
        """
        if state is not None and (at < 0 or at - state[2] / 1e9 > RECENT):
            self._found[self._name(path)] = (state, at)
            self._append(self._name(path), *state, at)

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self._root))

    def finish(self) -> None:
        """Note that the verification is finished."""
        text = _line(FINISHED, time.time()) + "".join(_line(name, *s, at) for name, (s, at) in self._found.items())
        for path in self._paths:
            with contextlib.suppress(OSError):
                write_bytes(path, text.encode())
                break
        self._begun = None

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def _append(self, name: str, *numbers: float) -> None:
        if self._file is None:
            self._file = next(filter(None, map(_appended, self._paths)), None)
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk: the notes are missing at the next verification
                self._file.write(_line(name, *numbers))
                self._file.flush()


def _line(name: str, *numbers: float) -> str:
    return "\t".join([name, *map(str, numbers)]) + "\n"


def _lines(path: Path) -> Iterator[tuple[str, Any, float]]:
    """Name, state and time of each line of a file of notes; torn lines are left out."""
    try:
        text = read_text(path, errors="replace")
    except (OSError, SpkdError):
        return
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            name, *state, at = line.split("\t")
            if len(state) == (0 if name in (BEGUN, FINISHED) else 4) and math.isfinite(float(at)):
                yield name, tuple(map(int, state)), float(at)


def _appended(path: Path) -> IO[str] | None:
    """A file that is opened to append lines; None where it cannot be written."""
    try:
        make_folder(path.parent)
        return appending(path)
    except (OSError, SpkdError):
        return None
