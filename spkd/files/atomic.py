"""Atomic writing of files, by a temporary name, fsync, rename and fsync of the folder; and reading with limits."""

from __future__ import annotations

import errno
import json
import os
import secrets
from collections import deque
from collections.abc import Collection
from pathlib import Path
from typing import Any

from spkd.errors import SpkdError

PART = ".part"  # suffix of files that are being written
MAX_DEPTH = 64  # most levels of nesting in JSON that is read; the files of spkd have 6
_UNSUPPORTED = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EMLINK, errno.EACCES)


class _Identity:
    """Random name of this process, since host names and process numbers repeat among containers."""

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """Draw a new name, for a forked process."""
        self.name = secrets.token_hex(8)


_identity = _Identity()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_identity.renew)


def worker_id() -> str:
    """The name of this process in claims, commit records and temporary files."""
    return _identity.name


def part_path(path: Path) -> Path:
    """Path next to `path` for a file that is being written, used by this process alone."""
    return path.with_name(f"{path.name}.{worker_id()}{PART}")


def sync_folder(folder: Path) -> None:
    """Make renames within a folder durable, where the file system supports it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically and durably. Its folder is made if it does not exist."""
    temporary = _written(path, data)
    try:
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: Path, tree: Any) -> None:
    """Write a JSON file atomically and durably. Its folder is made if it does not exist."""
    write_bytes(path, _json(tree))


def create_json(path: Path, tree: Any) -> bool:
    """`create_bytes` of a JSON tree."""
    return create_bytes(path, _json(tree))


def create_bytes(path: Path, data: bytes) -> bool:
    """Write a file unless it exists; of several processes exactly one succeeds.

    Returns:
        Whether this process wrote it.
    """
    temporary = _written(path, data)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return _create_without_links(path, data)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)
    return True


def _create_without_links(path: Path, data: bytes) -> bool:
    """`create_bytes` on file systems without hard links. A kill may leave the file incomplete."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    with open(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)
    return True


def _json(tree: Any) -> bytes:
    return (json.dumps(tree, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _written(path: Path, data: bytes) -> Path:
    """Write a temporary file next to `path`, durably; it is removed if writing fails.

    Returns:
        Path of the temporary file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = part_path(path)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    return temporary


def read_bytes(path: Path) -> bytes:
    """Read a whole file.

    Raises:
        SpkdError: it is missing, or not a regular file.
    """
    if not path.is_file():
        raise SpkdError(f"{path}: {'not a regular file' if path.exists() else 'missing'}")
    return path.read_bytes()


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        SpkdError: it is missing, or not JSON.
    """
    return parse_json(read_bytes(path), str(path))


def parse_json(data: bytes | str, where: str) -> Any:
    """Parse JSON of limited depth.

    Args:
        data: the text.
        where: name of the file, for errors.
    Raises:
        SpkdError: not JSON, or nested too deep.
    """
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError) as error:  # ValueError also for integers of thousands of digits
        reason = "nested too deep" if isinstance(error, RecursionError) else " ".join(str(error).split())[:200]
        raise SpkdError(f"{where}: damaged, not valid JSON ({reason})") from error
    if _depth(tree) > MAX_DEPTH:
        raise SpkdError(f"{where}: damaged, JSON nested too deep")
    return tree


def _depth(tree: Any) -> int:
    """Number of levels of nesting, computed without recursion."""
    level, depth = [tree], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            return depth
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]
    return depth


def find_files(root: Path, suffixes: Collection[str]) -> tuple[list[Path], list[Path]]:
    """Every regular file below a folder with one of the suffixes, sorted.

    Symbolic links are followed, but each real folder and file is listed only once, so that circular links end. Of hard
    links, every name is listed.

    Args:
        root: the folder.
        suffixes: suffixes in lower case, each with its dot.
    Returns:
        The files, and the symbolic links to files and folders that are listed under another name.
    """
    # Real folders are searched before linked ones, so that a file is listed under its name without links.
    real, linked = deque([root]), deque[Path]()
    files, repeated, seen = dict[str, Path](), list[Path](), set[str]()
    while real or linked:
        folder = real.popleft() if real else linked.popleft()
        try:
            place = os.path.realpath(folder)
            entries = sorted(os.scandir(folder), key=lambda entry: (entry.is_symlink(), entry.name))
        except OSError:
            continue
        if place in seen:
            repeated.append(folder)
            continue
        seen.add(place)
        for entry in entries:
            path = Path(entry.path)
            try:
                if entry.is_dir():
                    (linked if entry.is_symlink() else real).append(path)
                elif entry.is_file() and path.suffix.lower() in suffixes:
                    where = os.path.realpath(path) if entry.is_symlink() else os.path.join(place, entry.name)
                    repeated += [path] * (files.setdefault(where, path) != path)
            except OSError:  # a broken link, or a folder without permission
                continue
    return sorted(files.values()), sorted(repeated)


def writable_folder(folder: str | Path) -> Path:
    """Make a folder, and check that it can be written, before a long computation.

    Returns:
        Path of the folder.
    Raises:
        SpkdError: it cannot be made or written.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = part_path(path / "probe")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise SpkdError(f"{folder}: cannot be written ({error.strerror})") from error
    return path


def check_writable(path: str | Path) -> None:
    """Check that a file can be written, before a long computation. Neither the file nor its folder is made.

    Raises:
        SpkdError: it is a folder, or the folder of the file cannot be made or written.
    """
    target = Path(path)
    if target.is_dir():
        raise SpkdError(f"{path}: cannot be written (it is a folder)")
    folder = next(parent for parent in target.absolute().parents if parent.exists() or parent.is_symlink())
    try:
        probe = part_path(folder / "probe")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise SpkdError(f"{path}: cannot be written ({error.strerror})") from error
