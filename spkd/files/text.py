"""Reading of text files: gzipped or not, with or without a byte-order mark, with any line ends."""

from __future__ import annotations

import codecs
import gzip
import io
import math
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO, cast

from spkd.errors import SpkdError

MOST = 1 << 31  # most characters of a decompressed file; a manifest of ten million utterances has half as many
MOST_OF_LINE = 1 << 22  # most characters of a line
GZIP = b"\x1f\x8b"
WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_lines(path: Path, name: str = "", most: float = math.inf) -> Iterator[str]:
    """Lines of a file without their ends, read one by one. The text is UTF-8, or UTF-16 with a byte-order mark.

    Only line feeds and carriage returns end a line. (str.splitlines would also split at U+2028, which a name may have.)

    Args:
        path: path of the file.
        name: name of the file in errors, if it is not the path.
        most: most characters that the whole file may have.
    Raises:
        SpkdError: not a regular file, damaged gzip, too long, or not such text.
    """
    name, number, taken = name or str(path), 0, 0
    if not path.is_file():
        raise SpkdError(f"{name}: not a regular file")
    try:
        with io.TextIOWrapper(_opened(path), _encoding(path)) as text:
            for number, line in enumerate(iter(partial(text.readline, MOST_OF_LINE), ""), 1):
                taken += len(line)
                if len(line) == MOST_OF_LINE:
                    raise SpkdError(f"{name}:{number}: a line of more than {MOST_OF_LINE:,} characters")
                if taken > most:
                    raise SpkdError(f"{name}: more than {most:,.0f} characters of text")
                yield line.rstrip("\n")
    except UnicodeDecodeError as error:
        raise SpkdError(
            f"{name}:{_undecodable_line(path)}: not UTF-8 text; convert it (iconv -f latin1 -t utf-8)"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise SpkdError(f"{name}: cannot be read ({' '.join(str(error).split())[:200]})") from error


def numbered_lines(
    path: Path, name: str = "", comments: bool = True, most: float = math.inf
) -> Iterator[tuple[int, str]]:
    """The lines of a file that are not empty, with their numbers.

    Args:
        path: as of `read_lines`.
        name: as of `read_lines`.
        comments: whether lines that begin with `#` are comments, and left out.
        most: as of `read_lines`.
    Raises:
        SpkdError: as of `read_lines`.
    """
    for number, line in enumerate(read_lines(path, name, most), 1):
        if line and not line.isspace() and not (comments and line.lstrip().startswith("#")):
            yield number, line


def _opened(path: Path) -> BinaryIO:
    with open(path, "rb") as file:
        zipped = file.read(2) == GZIP
    return cast(BinaryIO, gzip.open(path)) if zipped else open(path, "rb")


def _encoding(path: Path) -> str:
    with _opened(path) as source:
        return "utf-16" if source.read(2) in WIDE else "utf-8-sig"


def _undecodable_line(path: Path) -> int:
    """Number of the first line that is not UTF-8, by a second reading; text is decoded in blocks of many lines."""
    with _opened(path) as source:
        for number, line in enumerate(iter(partial(source.readline, MOST_OF_LINE), b""), 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 1


def finite_number(word: str) -> float | None:
    """A word as a number; None where it is not a finite number."""
    try:
        value = float(word)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def format_bytes(count: float) -> str:
    """Number of bytes in words, such as `1.5 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.2f} TB"
