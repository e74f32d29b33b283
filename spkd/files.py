"""Writing so that a reader never sees half a file: temporary name, fsync, rename, fsync of the folder."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

from spkd.errors import SpkdError


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data` atomically and durably; its folder is made if need be."""
    os.replace(_written(path, data), path)
    sync_folder(path.parent)


def write_json(path: Path, tree: Any) -> None:
    write_bytes(path, _json(tree))


def create_json(path: Path, tree: Any) -> bool:
    """`create_bytes` of a tree."""
    return create_bytes(path, _json(tree))


def create_bytes(path: Path, data: bytes) -> bool:
    """Write `path` unless it is there: of several processes exactly one succeeds. Returns whether this one did."""
    temporary = _written(path, data)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    sync_folder(path.parent)
    return True


def _json(tree: Any) -> bytes:
    return (json.dumps(tree, indent=1, ensure_ascii=False) + "\n").encode()


def _written(path: Path, data: bytes) -> Path:
    """A temporary file beside `path` that holds `data` durably."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.part")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return temporary


def read_json(path: Path) -> Any:
    """Raises SpkdError, naming the file, where it is missing or is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise SpkdError(f"{path}: missing") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SpkdError(f"{path}: damaged, not valid JSON ({error})") from error


def writable_folder(folder: str | Path) -> Path:
    """Make a folder, and check that it can be written before hours are spent.

    Raises:
        SpkdError: it cannot be made or written.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".{os.getpid()}.part"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise SpkdError(f"{folder}: cannot be written ({error.strerror})") from error
    return path
