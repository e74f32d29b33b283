"""Notes of the time at which each shard of a cache was last found whole, from which a verification goes on.

Shards that were found damaged are noted too, so that an extraction reads them, which else looks at no rows.

They are lines of a file in the folder of the cache, or in the user's cache folder where that cannot be written: name
and state of the shard, and the time at which it was found whole (s), or minus the time at which it was found damaged.
Further lines say when a verification of all shards was begun and finished. The notes hold for this copy alone, and are
no part of it.

Of several lines on a shard, the last one counts: lines are in the order of what happened, while the clocks of machines
differ. Damage counts until a later line, or another size or time of the content, shows that it was mended.

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

from spkd.cache.folder import NOTES
from spkd.errors import SpkdError
from spkd.files import digest
from spkd.files.atomic import appending, make_folder, users_files, write_bytes
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
        last = self._read()
        goes_on = last[FINISHED] < last[BEGUN] <= time.time() <= last[BEGUN] + RESUMED
        self._begun = last[BEGUN] if goes_on else None

    def _read(self) -> dict[str, float]:
        """Read the last line of each file on each shard. Returns the time of the last begin and of the last end."""
        self._found: list[dict[str, tuple[FileState, float]]] = [{} for _ in self._paths]
        last = {BEGUN: 0.0, FINISHED: 0.0}
        for path, found in zip(self._paths, self._found, strict=True):
            for name, state, at in _lines(_text(path)):
                if name in last:
                    last[name] = max(last[name], at)
                else:
                    found[name] = (state, at)
        return last

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
        if self.is_damaged(path):
            return None
        now, present = time.time(), file_state(path)
        notes = [found[self._name(path)] for found in self._found if self._name(path) in found]
        return max((at for state, at in notes if state == present and 0 <= at <= now), default=None)

    def is_damaged(self, path: Path) -> bool:
        """Whether a shard was found damaged, and its content has not changed since.

        A copy of it with the same times, and a link to it, are as damaged.
        """
        if (present := file_state(path)) is None:
            return False
        notes = (found.get(self._name(path)) for found in self._found)
        return any(note is not None and note[1] < 0 and _content(note[0]) == _content(present) for note in notes)

    def damaged(self) -> list[Path]:
        """The shards that were found damaged, and whose content has not changed since."""
        names = {name for found in self._found for name, (_, at) in found.items() if at < 0}
        return [path for name in sorted(names) if self.is_damaged(path := self._root / name)]

    def add(self, path: Path, state: FileState | None, at: float) -> None:
        """Note that a shard is whole or damaged.

        Args:
            state: its state before it was read; None where it is missing.
            at: time at which it was read (s), negative if it is damaged.
        """
        if state is not None and (at < 0 or at - state[2] / 1e9 > RECENT):
            self._append(self._name(path), *state, at)

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self._root))

    def finish(self) -> None:
        """Note that the verification is finished, and leave out lines that later ones replace, and mended damage."""
        self._read()  # others have added lines meanwhile
        for path, found in zip(self._paths, self._found, strict=True):
            notes = {name: note for name, note in found.items() if note[1] >= 0 or self.is_damaged(self._root / name)}
            text = _line(FINISHED, time.time()) + "".join(_line(name, *s, at) for name, (s, at) in notes.items())
            with contextlib.suppress(OSError):
                write_bytes(path, text.encode())
                break
        self._begun = None

    def _append(self, name: str, *numbers: float) -> None:
        """Add a line to the first file that can be written, and to those whose last one says that it is damaged."""
        is_noted = False
        for path, found in zip(self._paths, self._found, strict=True):
            if is_noted and not (name in found and found[name][1] < 0):
                continue
            # It is opened for each line, as another process may replace it by a shorter one.
            if (file := _appended(path)) is not None:
                with contextlib.suppress(OSError), file:  # a full disk: the note is missing at the next verification
                    file.write(_line(name, *numbers))
                is_noted = True


def _content(state: FileState) -> tuple[int, int]:
    """Size and time of the content, which a copy takes along."""
    return state[0], state[2]


def _line(name: str, *numbers: float) -> str:
    return "\t".join([name, *map(str, numbers)]) + "\n"


def noted_damaged(text: str) -> set[str]:
    """Names of the shards that are damaged by the last line on each, in notes of which the shards are not at hand."""
    return {name for name, at in {name: at for name, _, at in _lines(text)}.items() if at < 0}


def _text(path: Path) -> str:
    """Content of a file of notes; "" where it cannot be read."""
    try:
        return read_text(path, errors="replace")
    except (OSError, SpkdError):
        return ""


def _lines(text: str) -> Iterator[tuple[str, Any, float]]:
    """Name, state and time of each line of notes; torn lines are left out."""
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
