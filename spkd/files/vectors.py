"""Files of named vectors: Kaldi's ark and scp, and NumPy's .npy next to a list of names.

What is written has its digests beside it, as `sha256sum` writes them: X.ark.sha256 for X.ark and X.scp, X.npy.sha256
for X.npy and X.txt. They are compared when the vectors are read; other tools' files have none. They are also what tells
files of an earlier run, which are replaced, from files of others beside the one that the user named.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from spkd.errors import SpkdError, UsageError, first_line
from spkd.files import digest, kaldi
from spkd.files.atomic import remove_abandoned, write_bytes, writing
from spkd.files.reading import read_text
from spkd.files.text import numbered_lines

KALDI = (".ark", ".scp")
SUFFIXES = (*KALDI, ".npy")
LEAST = 1e-30  # a vector of smaller numbers has few digits in float32, and no length
SECOND = {".ark": ".scp", ".npy": ".txt"}  # suffix of a file of vectors -> that of the file beside it


def write_vectors(out: Path, rows: Iterable[tuple[str, np.ndarray]]) -> int:
    """Write named vectors (D,) or matrices (T, D), each file atomically.

    Args:
        out: the file. X.ark or X.scp writes both of them; X.npy writes an array (N, D), and X.txt with a name per line.
        rows: names, each with its vector or matrix.
    Returns:
        Number of vectors or matrices.
    Raises:
        UsageError: another suffix, or matrices for .npy.
        SpkdError: as of `check_free`.
    """
    first = check_free(out)
    remove_abandoned(out.parent, [file.name for file in files_of(first)])
    with writing(first) as file:
        count, hashed, second = (_write_npy if first.suffix == ".npy" else _write_ark)(first, file, rows)
        lines = [f"{hashed}  {first.name}", f"{digest.of_bytes(second)}  {_second(first).name}"]
        # Until both new files are there, the digests of the old ones are kept: a kill leaves no file without its own.
        earlier = _digests(first) or []
        _write_lines(_digests_of(first), lines + earlier)
    write_bytes(_second(first), second)
    if earlier:
        _write_lines(_digests_of(first), lines)
    return count


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    write_bytes(path, "".join(f"{line}\n" for line in lines).encode())


def check_free(out: Path) -> Path:
    """Check that a file of vectors can be written without replacing files beside it that `write_vectors` did not write.

    Returns:
        The file that will hold the vectors.
    Raises:
        UsageError: another suffix.
        SpkdError: such a file is there.
    """
    if out.suffix not in SUFFIXES:
        raise UsageError(f"{out}: vectors are written as {', '.join(SUFFIXES)}")
    first = _first(out)
    lines = _digests(first) or []
    if lines and {line.partition("  ")[2] for line in lines} != {first.name, _second(first).name}:
        raise _taken(_digests_of(first), out)
    for file in (first, _second(first)):
        is_ours = lines and file.is_file() and f"{digest.of_file(file)}  {file.name}" in lines
        if file != out and os.path.lexists(file) and not is_ours:
            raise _taken(file, out)
    return first


def _taken(file: Path, out: Path) -> SpkdError:
    remedy = "choose another name, or remove it"
    return SpkdError(f"{file}: would be replaced, but was not written with {out.name}; {remedy}")


def _write_ark(ark: Path, file: BinaryIO, rows: Iterable[tuple[str, np.ndarray]]) -> tuple[int, str, bytes]:
    """Write an ark file. Returns the number of entries, the digest of the file, and the content of its scp file."""
    count, lines, state = 0, [], hashlib.sha256()
    for name, values in rows:
        check_names(ark, [name])
        head, entry = f"{name} ".encode(), kaldi.entry(values)
        lines.append(f"{name} {ark.resolve()}:{file.tell() + len(head)}\n")
        file.write(head + entry)
        state.update(head + entry)
        count += 1
    return count, state.hexdigest(), "".join(lines).encode()


def _write_npy(out: Path, file: BinaryIO, rows: Iterable[tuple[str, np.ndarray]]) -> tuple[int, str, bytes]:
    """Write an .npy file. Returns the number of its rows, the digest of the file, and their names as text."""
    names, vectors = [], []
    for name, values in rows:
        if values.ndim != 1:
            raise UsageError(f"{out}: frames of different number; write them as .ark")
        check_names(out, [name])
        names.append(name)
        vectors.append(values)
    data = io.BytesIO()
    np.save(data, np.stack(vectors) if vectors else np.empty((0, 0), np.float32))
    file.write(data.getvalue())
    return len(names), digest.of_bytes(data.getvalue()), "".join(f"{name}\n" for name in names).encode()


def files_of(out: Path) -> tuple[Path, Path, Path]:
    """The files that `write_vectors` writes: that of the vectors, the one beside it, and that of their digests."""
    first = _first(out)
    return first, _second(first), _digests_of(first)


def _first(out: Path) -> Path:
    return out.with_suffix(".npy" if out.suffix == ".npy" else ".ark")


def _second(first: Path) -> Path:
    return first.with_suffix(SECOND[first.suffix])


def _digests_of(first: Path) -> Path:
    return first.with_name(f"{first.name}.sha256")


def _digests(first: Path) -> list[str] | None:
    """Lines of the file of digests beside a file of vectors; None where there is none."""
    file = _digests_of(first)
    return read_text(file, errors="replace").splitlines() if file.exists() else None


def _check(first: Path, *files: Path) -> None:
    """Compare files of vectors with their digests, if those are there.

    Args:
        first: the file that holds the vectors.
        files: this file, the one beside it, or both.
    Raises:
        SpkdError: one of them was changed, or they were not written together.
    """
    if (lines := _digests(first)) is None:
        return
    found = [f"{digest.of_file(file)}  {file.name}" for file in files]
    for file, line in zip(files, found, strict=True):
        if line not in lines:
            raise SpkdError(
                f"{file}: changed since it was written (its digest is not in {_digests_of(first).name}; remove that "
                "file if the change is yours)"
            )
    # Two lines for each time of writing, of which there are several after a kill.
    if not any(set(found) <= set(lines[i : i + 2]) for i in range(0, len(lines), 2)):
        raise SpkdError(f"{first}: not written together with {files[-1]}; a kill left both: run the same command again")


def read_vectors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Named vectors (D,) of a file that `write_vectors` or another tool wrote.

    Commands in an scp file, and objects of Python in any of these files, are refused.

    Raises:
        UsageError: no such file, or another suffix.
        SpkdError: the file is damaged, or its digest is another.
    """
    if path.suffix not in SUFFIXES:
        raise UsageError(f"{path}: vectors are read from {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    try:
        if path.suffix == ".npy":
            _check(path, path, _second(path))
            values = np.load(path, mmap_mode="r", allow_pickle=False)  # mapped: a false shape takes no memory
            names = read_text(_second(path)).replace("\r\n", "\n").split("\n")
            names = names[:-1] if names and not names[-1] else names
            if values.ndim != 2 or len(names) != len(values):
                raise SpkdError(f"{path}: shape {values.shape}, but {len(names)} names in {_second(path)}")
            rows: Iterable[tuple[str, np.ndarray]] = zip(names, values, strict=True)
        else:
            _check(_first(path), path)
            rows = kaldi.entries(kaldi.mapped(path)) if path.suffix == ".ark" else _of_scp(path)
        yield from ((name, _vector(name, values)) for name, values in rows)
    except SpkdError:
        raise
    except Exception as error:  # numpy raises many kinds for damaged files
        raise SpkdError(f"{path}: cannot be read as vectors ({first_line(error)})") from error


def _of_scp(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    last, data = None, None
    for number, line in numbered_lines(path, comments=False):
        name, _, place = line.strip().partition(" ")
        file = Path(place.strip().rpartition(":")[0] or place.strip())
        if "|" in place or not place or not (file := file if file.is_file() else path.parent / file).is_file():
            raise SpkdError(f"{path}, line {number}: {place[:200]!r} is no file")
        if data is None or file != last:
            if file.suffix == ".ark":
                is_beside = _second(file).name == path.name and file.parent.samefile(path.parent)
                _check(file, *((file, path) if is_beside else (file,)))
            last, data = file, kaldi.mapped(file)
        offset = place.strip().rpartition(":")[2]
        yield name, kaldi.parse(data, int(offset) if offset.isdecimal() else 0)[0]


def _vector(name: str, values: Any) -> np.ndarray:
    """A vector (D,), or the row of a matrix (1, D), as a vector."""
    given = np.asarray(values)
    if given.dtype.kind not in "fiu":
        raise SpkdError(f"{name}: holds {given.dtype}, expected real numbers")
    with np.errstate(over="ignore"):
        array = given.astype(np.float32)
    if 0 < float(np.abs(given).max(initial=0)) < LEAST:
        raise SpkdError(
            f"{name}: numbers up to {np.abs(given).max():.2g}, which float32 cannot hold; scale the vectors"
        )
    if array.ndim == 2 and len(array) == 1:
        array = array[0]
    if array.ndim != 1 or not np.isfinite(array).all():
        raise SpkdError(f"{name}: not a vector of finite numbers (shape {array.shape})")
    return array


def check_names(out: Path, names: Iterable[str]) -> None:
    """Check that names can be written to a file, before the vectors are computed.

    Raises:
        UsageError: a name with a space for .ark or .scp, or one that is empty or of several lines.
    """
    for name in names:
        if not name or not name.isprintable():
            raise UsageError(f"{out}: the name {name!r} cannot be written")
        if out.suffix in KALDI and any(c.isspace() for c in name):
            raise UsageError(f"{out}: {name!r} has a space, which Kaldi's files cannot name; write .npy")


def joined(rows: Sequence[tuple[str, np.ndarray]], source: str) -> tuple[list[str], np.ndarray]:
    """Join named vectors into one array.

    Returns:
        The names, and the vectors as an array (N, D).
    Raises:
        SpkdError: there are no vectors, they have different widths, or a name is there twice.
    """
    names = [name for name, _ in rows]
    if not rows or len({values.shape for _, values in rows}) != 1:
        raise SpkdError(f"{source}: {len(rows)} vectors of {len({values.shape for _, values in rows})} widths")
    if len(set(names)) < len(names):
        raise SpkdError(f"{source}: some names are there twice")
    return names, np.stack([values for _, values in rows])
