"""SHA-256 of what spkd has to recognise again: bytes, files, JSON trees, named tensors. Always as 64 hex digits."""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def of_bytes(*blocks: bytes) -> str:
    """The digest of byte strings, one after the other."""
    return of_blocks(blocks)


def of_blocks(blocks: Iterable[bytes]) -> str:
    """The digest of blocks that come one by one, so that a large file is never held whole."""
    state = hashlib.sha256()
    for block in blocks:
        state.update(block)
    return state.hexdigest()


def of_file(path: Path) -> str:
    """The digest of a file's content. Raises OSError where it cannot be read, or would be waited for or never end."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def of_tree(tree: Any) -> str:
    """The digest of a JSON tree, whatever the order of its keys and its layout in a file."""
    return of_bytes(json.dumps(tree, sort_keys=True).encode())


def of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """The digest of named tensors, whatever file they came in."""
    return of_blocks(
        block
        for name in sorted(tensors)
        for block in (name.encode(), tensors[name].detach().cpu().contiguous().numpy().tobytes())
    )
