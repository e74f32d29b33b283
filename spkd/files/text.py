"""Text files as people's tools write them: gzipped or not, with or without a byte-order mark, with any line ends."""

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

MOST = 1 << 31  # characters of a file, decompressed: manifests of ten million utterances have half of that
MOST_OF_LINE = 1 << 22  # characters
GZIP = b"\x1f\x8b"
WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_lines(path: Path, name: str = "", most: float = math.inf) -> Iterator[str]:
    """Every line of a file without its end, read piece by piece; UTF-8, or UTF-16 where a byte-order mark says so.

    Only line feeds and carriage returns end lines: str.splitlines would also split at U+2028, which may be in a name.

    Args:
        path: of the file.
        name: of the file in errors, where it is not its path.
        most: characters that the whole file may have.
    Raises:
        SpkdError: no regular file, damaged gzip, too long, or not such text (the line named).
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
        path, name, most: as `read_lines` takes them.
        comments: leave out lines that begin with `#`.
    Raises:
        SpkdError: as `read_lines`.
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
    """The number of the first line that is not UTF-8: text is decoded in blocks, and the first reading cannot say."""
    with _opened(path) as source:
        for number, line in enumerate(iter(partial(source.readline, MOST_OF_LINE), b""), 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 1


def finite_number(word: str) -> float | None:
    """The number that a word is; None where it is none, or not finite."""
    try:
        value = float(word)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def format_bytes(count: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.2f} TB"
