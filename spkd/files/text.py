"""Text files as people's tools write them: gzipped or not, with or without a byte-order mark, with any line ends."""

from __future__ import annotations

import codecs
import gzip
import io
import math
import re
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO, cast

from spkd.errors import SpkdError

MOST = 1 << 31  # bytes of text, decompressed: manifests of ten million utterances have half of that
MOST_OF_LINE = 1 << 22  # characters
GZIP = b"\x1f\x8b"
# Only what tools mean as line ends: str.splitlines would also split at U+2028, which may be in a name.
LINE_END = re.compile(r"\r\n|\n|\r")


def read_text(path: Path) -> str:
    """The text of a file; UTF-8, or UTF-16 where a byte-order mark says so.

    Raises:
        SpkdError: no regular file, damaged gzip, larger than any list, or not such text (the line named).
    """
    if not path.is_file():
        raise SpkdError(f"{path}: not a regular file")
    try:
        with _opened(path) as source:
            data = source.read(MOST + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise SpkdError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]})") from error
    if len(data) > MOST:
        raise SpkdError(f"{path}: more than {MOST >> 30} GiB of text")
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SpkdError(f"{path}:{line}: not UTF-8 text; convert it (iconv -f latin1 -t utf-8)") from error


def _opened(path: Path) -> BinaryIO:
    with open(path, "rb") as file:
        zipped = file.read(2) == GZIP
    return cast(BinaryIO, gzip.open(path)) if zipped else open(path, "rb")


def stream_lines(path: Path, name: str = "") -> Iterator[tuple[int, str]]:
    """`numbered_lines` of a file without its comments, read piece by piece: for lists of any length.

    Args:
        name: of the file in errors, where it is not its path.
    Raises:
        SpkdError: as `read_text`, and for a line that is none.
    """
    name, number = name or str(path), 0
    if not path.is_file():
        raise SpkdError(f"{name}: not a regular file")
    try:
        with _opened(path) as source:
            start = source.read(2)
        wide = start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        with io.TextIOWrapper(_opened(path), "utf-16" if wide else "utf-8-sig") as text:
            for number, line in enumerate(iter(partial(text.readline, MOST_OF_LINE), ""), 1):
                if len(line) == MOST_OF_LINE:
                    raise SpkdError(f"{name}:{number}: a line of more than {MOST_OF_LINE:,} characters")
                line = line.rstrip("\n")
                if line and not line.isspace() and not line.lstrip().startswith("#"):
                    yield number, line
    except UnicodeDecodeError as error:  # text is decoded in blocks: the line is one of the next few hundred
        raise SpkdError(f"{name}: not UTF-8 text after line {number}; convert it (iconv -f latin1 -t utf-8)") from error
    except (OSError, EOFError, zlib.error) as error:
        raise SpkdError(f"{name}: cannot be read ({' '.join(str(error).split())[:200]})") from error


def numbered_lines(text: str, comments: bool = False) -> Iterator[tuple[int, str]]:
    """The lines that are not empty, with their numbers, without line ends.

    Args:
        comments: leave out lines that begin with `#`.
    """
    start, number = 0, 0
    while start < len(text):
        end = LINE_END.search(text, start)
        line, start = (text[start:], len(text)) if end is None else (text[start : end.start()], end.end())
        number += 1
        if line.strip() and not (comments and line.lstrip().startswith("#")):
            yield number, line


def finite_number(word: str) -> float | None:
    """The number that a word is; None where it is none, or not finite."""
    try:
        value = float(word)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
