"""SHA-256 of bytes, files, JSON trees and named tensors, as 64 hexadecimal digits."""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spkd.files.reading import check_holes, is_irregular

if TYPE_CHECKING:
    from torch import Tensor


def of_bytes(*blocks: bytes) -> str:
    """Digest of the concatenation of byte strings."""
    return of_blocks(blocks)


def of_blocks(blocks: Iterable[bytes]) -> str:
    """Digest of the concatenation of blocks, which are read one by one."""
    state = hashlib.sha256()
    for block in blocks:
        state.update(block)
    return state.hexdigest()


def of_file(path: Path) -> str:
    """Digest of a file's content.

    Raises:
        OSError: it cannot be read, or is not a regular file.
        SpkdError: most of it are holes.
    """
    if is_irregular(path):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    with open(path, "rb") as file:
        check_holes(file, path)
        return hashlib.file_digest(file, "sha256").hexdigest()


def of_tree(tree: Any) -> str:
    """Digest of a JSON tree, independent of the order of its keys and of its layout in a file."""
    # As it is read back: keys that are numbers are text in JSON, and sorted as text ("10" before "9").
    return of_bytes(json.dumps(json.loads(json.dumps(tree)), sort_keys=True).encode())


def of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Digest of named tensors, independent of the file that holds them."""
    return of_blocks(
        block
        for name in sorted(tensors)
        for block in (name.encode(), tensors[name].detach().cpu().contiguous().numpy().tobytes())
    )
