"""Errors, and their report to the user in one line, without a traceback."""

from __future__ import annotations

import difflib
import errno
import os
import re
import shlex
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

MOST_SHOWN = 2000  # most characters of an error that are shown
SYNONYMS = {"gpu": "cuda", "learning-rate": "lr"}  # folded word -> ours, whose spelling is not near
# Beginnings of addresses, also as a path has them, whose slashes are one.
BEGINNINGS = "|".join(rf"(?<={scheme})" for scheme in ("://", "http:/", "https:/", "s3:/", "gs:/", "az:/", "hf:/"))
# The user part of an address in a text: up to the last @ of the line where what follows a colon is no port.
USER = re.compile(rf"(?:{BEGINNINGS})(?:[^/?#\s@:\[]*:(?!\d{{1,5}}(?:[^\w@]|$))[^\n]*@|[^/?#\s]+@)")
QUERY = re.compile(rf"((?:\w://|{BEGINNINGS})[^?\n]*)\?(?!\*\*\*)\S[^\n]*")


class SpkdError(Exception):
    """Failure that the user can mend. Exit code 1."""

    exit_code = 1


class UsageError(SpkdError):
    """Error in the command itself, such as an unknown key or a bad value. Exit code 2."""

    exit_code = 2


class Interrupted(BaseException):
    """Interruption by the user. Exit code 130, as in shells.

    It is raised anywhere, and is no Exception, so that no code that reads a file takes it for damage of the file.
    """

    exit_code = 130


def without_secrets(text: str) -> str:
    """Text with `***` in the place of credentials in addresses: `user:password@`, and all that follows `?`.

    As nothing tells where an address ends that has a space or a quote, more may be left out, up to the end of the line.
    """
    return QUERY.sub(r"\1?***", USER.sub("***@", text))


def public_address(url: str) -> str:
    """An address, or a path on this machine, without credentials."""
    scheme, mark, rest = url.partition("://")
    if not mark:
        return without_secrets(url)
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    _, at, host = authority.rpartition("@")
    path, query, _ = f"{host}{rest[len(authority) :]}".partition("?")
    return without_secrets(f"{scheme}://{'***@' if at else ''}{path}{'?***' if query else ''}")


def check_address(url: str) -> None:
    """Check that user and password of a web address can be separated from what follows.

    Raises:
        UsageError: they cannot; the address is not in the message, as any of its parts may be a password.
    """
    scheme, _, rest = url.partition("://")
    if scheme not in ("http", "https"):
        return
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    place, _, query = rest[len(authority) :].partition("?")
    host = re.sub(r"\[.*\]", "", authority.rpartition("@")[2])
    _, colon, port = host.partition(":")
    has_user_behind = "@" in place or (not place and "@" in query)
    if (colon and not re.fullmatch(r"\d{0,5}", port)) or (has_user_behind and (colon or "@" in authority)):
        raise UsageError(
            "an address whose user, password and host cannot be separated; write / as %2F, ? as %3F, # as %23 and "
            ": as %3A in a password, and @ as %40 in a path"
        )


def printable(text: str) -> str:
    """Text in one line, with escapes instead of characters that a terminal would obey, or could not show.

    Credentials in addresses are left out.
    """
    shown = without_secrets(text)
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in shown)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    shown = shown.encode(encoding, "backslashreplace").decode(encoding)
    return shown if len(shown) <= MOST_SHOWN else f"{shown[:MOST_SHOWN]}..."


def first_line(error: BaseException) -> str:
    """First line of an error's message, or its class where it has none.

    Lines in which torch advises to load a file unsafely (weights_only) are left out.
    """
    lines = [line for line in str(error).splitlines() if line.strip() and "weights_only" not in line]
    return (lines[0].strip() if lines else type(error).__name__)[:300]


def listed(words: Sequence[str], last: str = "and") -> str:
    """Words in a sentence: `a, b and c`."""
    return f" {last} ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def bracketed(key: str, text: str) -> str:
    """Hint for a text with commas where a list was expected, `; a list is written KEY=[a,b]`; "" without commas."""
    return f"; a list is written {key}=[{shlex.quote(text)}]" if "," in text else ""


def first_few(words: Sequence[object], most: int = 3) -> str:
    """The first of many words: `a, b, c, ...`."""
    return ", ".join(map(str, words[:most])) + (", ..." if len(words) > most else "")


def did_you_mean(word: str, valid: Iterable[str]) -> str:
    """Hint for an unknown word: the valid word with the nearest spelling, or the valid words where none is near.

    Capitals do not matter, nor whether words are joined by - or by _.

    Returns:
        `; did you mean 'x'?`, `; valid: x, y`, or "" where there are many valid words.
    """
    choices = sorted({str(choice) for choice in valid} - {word})
    folded = {_folded(choice): choice for choice in choices}
    word = synonym(word)
    near = difflib.get_close_matches(_folded(word[:200]), folded, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {folded[near[0]]!r}?"
    return f"; valid: {', '.join(choices)}" if 0 < len(choices) <= 16 else ""


def synonym(word: str) -> str:
    """The word of spkd for another one of the same meaning."""
    return SYNONYMS.get(_folded(word), word)


def _folded(word: str) -> str:
    return word.casefold().replace("_", "-")


def reported(
    error: Exception | Interrupted, command: Sequence[str], plug_ins: Callable[[], Sequence[str]] = tuple
) -> int:
    """Print an error in one line.

    Args:
        plug_ins: gives the modules of other packages, to which their errors are to be reported; asked only where an
            error is unexpected, since the metadata of every installed package is read for it.
    Returns:
        The exit code.
    """
    if isinstance(error, SpkdError | Interrupted):
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
        lines, code = [of_system(error)], 1
    else:
        log = _kept(error, command)
        lines = [
            f"unexpected failure of `{shlex.join(['spkd', *command[1:3]])}`: {type(error).__name__}: "
            f"{first_line(error)}; the traceback is in {log}; please report it to {_owner(error, plug_ins())} "
            "with that file"
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


FULL = (errno.ENOSPC, errno.EDQUOT)  # errors of a disk without room


def of_system(error: OSError) -> str:
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
    """Write the traceback to a file."""
    text = without_secrets(f"{shlex.join(command)}\n{''.join(traceback.format_exception(error))}")
    try:
        descriptor, path = tempfile.mkstemp(prefix="spkd-error-", suffix=".log")
        with open(descriptor, "w", errors="backslashreplace") as file:
            file.write(text)
    except OSError:
        return "no file (the disk is full)"
    return str(Path(path))
