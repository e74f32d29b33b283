"""Errors, and their report to the user in one line, without a traceback."""

from __future__ import annotations

import difflib
import errno
import os
import shlex
import sys
import tempfile
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path

MOST_SHOWN = 2000  # most characters of an error that are shown


class SpkdError(Exception):
    """Failure that the user can mend. Exit code 1."""

    exit_code = 1


class UsageError(SpkdError):
    """Error in the command itself, such as an unknown key or a bad value. Exit code 2."""

    exit_code = 2


class Interrupted(SpkdError):
    """Interruption by the user. Exit code 130, as in shells."""

    exit_code = 130


def printable(text: str) -> str:
    """Text in one line, with escapes instead of characters that a terminal would obey, or could not show."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    shown = shown.encode(encoding, "backslashreplace").decode(encoding)
    return shown if len(shown) <= MOST_SHOWN else f"{shown[:MOST_SHOWN]}..."


def first_line(error: BaseException) -> str:
    """First line of an error's message, or its class where it has none.

    Lines in which torch advises to load a file unsafely (weights_only) are left out.
    """
    lines = [line for line in str(error).splitlines() if line.strip() and "weights_only" not in line]
    return (lines[0].strip() if lines else type(error).__name__)[:300]


def did_you_mean(word: str, valid: Iterable[str]) -> str:
    """Hint for an unknown word: the valid word with the nearest spelling, or the valid words where none is near.

    Args:
        word: the unknown word.
        valid: the valid words.
    Returns:
        `; did you mean 'x'?`, `; valid: x, y`, or "" where there are many valid words.
    """
    choices = sorted(map(str, valid))
    near = difflib.get_close_matches(word[:200], choices, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; valid: {', '.join(choices)}" if 0 < len(choices) <= 12 else ""


def reported(error: Exception, command: Sequence[str], plug_ins: Sequence[str] = ()) -> int:
    """Print an error in one line.

    Args:
        error: the error.
        command: the command and its arguments.
        plug_ins: modules of other packages, to which their errors are to be reported.
    Returns:
        The exit code.
    """
    if isinstance(error, SpkdError):
        # Some errors have further lines, one for each damaged file.
        lines, code = str(error).split("\n"), error.exit_code
    elif isinstance(error, BrokenPipeError):  # the reader of the output has ended, such as `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    elif isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        lines = [f"not enough memory ({first_line(error)}); lower batch_size, or take shorter views or utterances"]
        code = 1
    elif "bus error" in str(error).lower() or "shared memory" in str(error).lower():
        lines = [
            "shared memory (/dev/shm) is exhausted; give the container more (docker run --shm-size=8g), or workers=0"
        ]
        code = 1
    elif isinstance(error, OSError):
        lines, code = [_of_system(error)], 1
    else:
        log = _kept(error, command)
        lines = [
            f"unexpected failure of `{shlex.join(['spkd', *command[1:3]])}`: {type(error).__name__}: "
            f"{first_line(error)}; the traceback is in {log}; please report it to {_owner(error, plug_ins)} with that "
            "file"
        ]
        code = 1
    print("\n".join(printable(line) for line in [f"error: {lines[0]}", *lines[1:]]), file=sys.stderr)
    return code


def _owner(error: Exception, plug_ins: Sequence[str]) -> str:
    """Phrase for those to whom an unexpected error is to be reported.

    They are the owners of the innermost call that is in spkd or in a plug-in.
    """
    packages = [
        frame.f_globals.get("__name__", "").partition(".")[0] for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    last = next((name for name in reversed(packages) if name == "spkd" or name in plug_ins), "spkd")
    return "the project" if last == "spkd" else f"the package of {last}"


def _of_system(error: OSError) -> str:
    """Line for an error of the operating system."""
    where = f"{error.filename}: " if error.filename else ""
    if error.errno == errno.ENOSPC:
        return (
            f"{error.filename or 'output'}: the disk is full; everything committed stays valid; "
            "free some room and run the same command again"
        )
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return f"{where}too many open files; raise the limit (ulimit -n 65536) and run the same command again"
    if error.errno == errno.EROFS:
        return f"{where}the file system is read-only"
    return f"{where}{error.strerror or first_line(error)}"


def _kept(error: Exception, command: Sequence[str]) -> str:
    """Write the traceback to a file.

    Returns:
        Path of the file.
    """
    text = f"{shlex.join(command)}\n{''.join(traceback.format_exception(error))}"
    try:
        descriptor, path = tempfile.mkstemp(prefix="spkd-error-", suffix=".log")
        with open(descriptor, "w", errors="backslashreplace") as file:
            file.write(text)
    except OSError:
        return "no file (the disk is full)"
    return str(Path(path))
