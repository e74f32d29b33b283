"""Reading of text files: gzipped or not, with or without a byte-order mark, with any line ends."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import math
import re
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

from spkd.errors import SpkdError, UsageError

MOST = 1 << 31  # most characters of a decompressed file; a manifest of ten million utterances has half as many
MOST_OF_LINE = 1 << 22  # most characters of a line
MOST_RATIO, SMALL = 100, 1 << 24  # most characters for each gzipped byte; as many as any file may have besides
MOST_NAMED = 5  # values that differ
LONGEST_VALUE = 60  # characters of a value that are shown
GZIP = b"\x1f\x8b"
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0, "w": 7 * 86_400.0}  # s
WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_lines(path: Path, name: str = "", most: float = math.inf) -> Iterator[str]:
    """Lines of a file without their ends, read one by one. The text is UTF-8, or UTF-16 with a byte-order mark.

    Only line feeds and carriage returns end a line. (str.splitlines would also split at U+2028, which a name may have.)
    A gzipped file of 3 MB could stand for 3 GB: lists are compressed to a tenth or a thirtieth. The text is compared
    with the bytes it was read from as it comes, so that such a file ends in a moment.

    Args:
        name: name of the file in errors, if it is not the path.
        most: most characters that the whole file may have.
    Raises:
        SpkdError: not a regular file, damaged gzip, too long, or not such text.
    """
    name, number, taken = name or str(path), 0, 0
    if not path.is_file():
        raise SpkdError(f"{name}: not a regular file")
    try:
        zipped = _is_zipped(path)
        with open(path, "rb") as file, io.TextIOWrapper(_unzipped(file, zipped), _encoding(path)) as text:
            credible = min(most, SMALL) if zipped else most
            for number, line in enumerate(iter(partial(text.readline, MOST_OF_LINE), ""), 1):
                taken += len(line)
                if len(line) == MOST_OF_LINE:
                    raise SpkdError(f"{name}:{number}: a line of more than {MOST_OF_LINE:,} characters")
                if taken > credible:
                    credible = min(most, SMALL + MOST_RATIO * file.tell()) if zipped else most
                    if taken > credible:
                        what = f" in {file.tell():,} gzipped bytes" if credible < most else ""
                        raise SpkdError(f"{name}: more than {credible:,.0f} characters of text{what}")
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
    """The lines of a file that are not empty, with their numbers. Other arguments and errors as of `read_lines`.

    Args:
        comments: whether lines that begin with `#` are comments, and left out.
    """
    for number, line in enumerate(read_lines(path, name, most), 1):
        if line and not line.isspace() and not (comments and line.lstrip().startswith("#")):
            yield number, line


def _is_zipped(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == GZIP


def _unzipped(file: BinaryIO, zipped: bool) -> BinaryIO:
    return cast(BinaryIO, gzip.GzipFile(fileobj=file)) if zipped else file


def _opened(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path)) if _is_zipped(path) else open(path, "rb")


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
    """A word as a number; None where it is not a finite number, in ASCII digits without underscores."""
    if "_" in word or not word.isascii():
        return None
    try:
        value = float(word)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def dotted(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of nested mappings by their names with dots, as settings are written."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= dotted(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Values that differ, in a line: `width: 8 there, 16 now; ...`; "" where none do.

    Args:
        there: name of each value in what is stored -> the value.
        here: name of each value now -> the value.
    """
    names = [name for name in dict.fromkeys([*there, *here]) if there.get(name) != here.get(name)]
    shown = [f"{name}: {_shown(there.get(name))} there, {_shown(here.get(name))} now" for name in names[:MOST_NAMED]]
    more = f"; and {len(names) - MOST_NAMED} others" if len(names) > MOST_NAMED else ""
    return f"{'; '.join(shown)}{more}"


def _shown(value: Any) -> str:
    """A value as a user writes it, shortened where it is long, such as a digest."""
    text = "none" if value is None else value if isinstance(value, str) else json.dumps(value).replace('"', "")
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


def utc(at: float | None = None) -> str:
    """Time in UTC, such as 2026-01-31T12:00:00Z.

    Args:
        at: the time (s since 1970); None: now.
    """
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))


def counted(count: int, what: str) -> str:
    """Number of things in words, such as `1 utterance` or `1,200 utterances`.

    Args:
        what: one of them; an s makes it several.
    """
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """Path or URL -> short name: its last part, and as many parts before it as make the name unique."""
    parts = {path: path.rstrip("/").split("/") for path in paths}
    names, left = dict[str, str](), dict(parts)
    for count in range(1, max(map(len, parts.values()), default=0) + 1):
        repeats = Counter(tuple(words[-count:]) for words in parts.values())
        for path in [path for path, words in left.items() if repeats[tuple(words[-count:])] == 1]:
            names[path] = "/".join(left.pop(path)[-count:])
    return {path: names.get(path, path.rstrip("/")) for path in parts}


def format_bytes(count: float) -> str:
    """Number of bytes in words, such as `1.5 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.2f} TB"


def seconds_of(text: str, name: str) -> float:
    """A duration that a user wrote, such as `12h` or `30d`, in seconds.

    Raises:
        UsageError: not a number with one of the units s, m, h, d, w.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smhdw])", text)
    if match is None:
        raise UsageError(f"{name} {text}: expected a number and a unit (s, m, h, d, w), such as 30d")
    return float(match[1]) * UNITS[match[2]]
