"""Files of named vectors: Kaldi's ark and scp (through kaldiio), and NumPy's .npy next to a list of names."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spkd.errors import SpkdError, UsageError, first_line
from spkd.files.atomic import part_path, write_bytes

KALDI = (".ark", ".scp")
SUFFIXES = (*KALDI, ".npy")


def write_vectors(out: Path, rows: Iterable[tuple[str, np.ndarray]]) -> int:
    """Write named vectors (D,) or matrices (T, D), each file atomically.

    Args:
        out: the file. X.ark or X.scp writes both of them; X.npy writes an array (N, D), and X.txt with a name per line.
        rows: names, each with its vector or matrix.
    Returns:
        Number of vectors or matrices.
    Raises:
        UsageError: another suffix, matrices for .npy, or kaldiio is missing.
    """
    if out.suffix not in SUFFIXES:
        raise UsageError(f"{out}: vectors are written as {', '.join(SUFFIXES)}")
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".npy":
        return _write_npy(out, rows)
    kaldiio = _kaldiio()
    ark, scp, count, lines = out.with_suffix(".ark"), out.with_suffix(".scp"), 0, []
    part = part_path(ark)
    try:
        with open(part, "wb") as file:
            for name, values in rows:
                check_names(out, [name])
                file.write(f"{name} ".encode())
                lines.append(f"{name} {ark.resolve()}:{file.tell()}\n")
                entry = io.BytesIO()
                kaldiio.save_ark(entry, {"x": np.ascontiguousarray(values, np.float32)})
                file.write(entry.getvalue().removeprefix(b"x "))
                count += 1
        part.replace(ark)
    finally:
        part.unlink(missing_ok=True)
    write_bytes(scp, "".join(lines).encode())
    return count


def _write_npy(out: Path, rows: Iterable[tuple[str, np.ndarray]]) -> int:
    names, vectors = [], []
    for name, values in rows:
        if values.ndim != 1:
            raise UsageError(f"{out}: frames of different number; write them as .ark")
        check_names(out, [name])
        names.append(name)
        vectors.append(values)
    data = io.BytesIO()
    np.save(data, np.stack(vectors) if vectors else np.empty((0, 0), np.float32))
    write_bytes(out, data.getvalue())
    write_bytes(out.with_suffix(".txt"), "".join(f"{name}\n" for name in names).encode())
    return len(names)


def read_vectors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Named vectors (D,) of a file that `write_vectors` or another tool wrote. Commands in an scp file are refused.

    Raises:
        UsageError: no such file, another suffix, or kaldiio is missing.
        SpkdError: the file is damaged.
    """
    if path.suffix not in SUFFIXES:
        raise UsageError(f"{path}: vectors are read from {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    try:
        if path.suffix == ".npy":
            values = np.load(path, allow_pickle=False)
            names = path.with_suffix(".txt").read_text("utf-8").split("\n")
            names = names[:-1] if names and not names[-1] else names
            if values.ndim != 2 or len(names) != len(values):
                raise SpkdError(f"{path}: shape {values.shape}, but {len(names)} names in {path.with_suffix('.txt')}")
            yield from zip(names, values, strict=True)
        else:
            yield from _read_kaldi(path)
    except SpkdError:
        raise
    except Exception as error:  # numpy and kaldiio raise many kinds for damaged files
        raise SpkdError(f"{path}: cannot be read as vectors ({first_line(error)})") from error


def _read_kaldi(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    kaldiio = _kaldiio()
    if path.suffix == ".ark":
        yield from ((name, _vector(name, values)) for name, values in kaldiio.load_ark(str(path)))
        return
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        name, _, place = line.strip().partition(" ")
        file = Path(place.strip().rpartition(":")[0] or place.strip())
        if "|" in place or not place or not (file := file if file.is_file() else path.parent / file).is_file():
            raise SpkdError(f"{path}, line {number}: {place[:200]!r} is no file")
        offset = place.strip().rpartition(":")[2]
        yield name, _vector(name, kaldiio.load_mat(f"{file}:{offset}" if offset.isdecimal() else str(file)))


def _vector(name: str, values: Any) -> np.ndarray:
    """A vector (D,), or the row of a matrix (1, D), as a vector.

    Raises:
        SpkdError: another shape, or numbers that are not finite.
    """
    array = np.asarray(values, np.float32)
    if array.ndim == 2 and len(array) == 1:
        array = array[0]
    if array.ndim != 1 or not np.isfinite(array).all():
        raise SpkdError(f"{name}: not a vector of finite numbers (shape {array.shape})")
    return array


def check_names(out: Path, names: Iterable[str]) -> None:
    """Check that names can be written to a file, before the vectors are computed.

    Args:
        out: the file.
        names: the names.
    Raises:
        UsageError: a name with a space for .ark or .scp, or one that is empty or of several lines.
    """
    for name in names:
        if not name or not name.isprintable():
            raise UsageError(f"{out}: the name {name!r} cannot be written")
        if out.suffix in KALDI and any(c.isspace() for c in name):
            raise UsageError(f"{out}: {name!r} has a space, which Kaldi's files cannot name; write .npy")


def _kaldiio() -> Any:
    try:
        import kaldiio
    except ImportError as error:
        raise UsageError("ark and scp need kaldiio: pip install 'spkd[kaldi]'") from error
    return kaldiio


def joined(rows: Sequence[tuple[str, np.ndarray]], source: str) -> tuple[list[str], np.ndarray]:
    """Join named vectors into one array.

    Args:
        rows: names, each with its vector.
        source: name of the file, for errors.
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
