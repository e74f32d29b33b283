"""Files with a digest over what they hold: JSON files of one record, with a format number and typed fields; tensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from spkd.errors import SpkdError
from spkd.files import digest
from spkd.files.reading import parse_json

Record = TypeVar("Record")
DIGEST = "digest"
CHECK = "check"  # field of a record of a cache that holds the digest of the others


@dataclass(frozen=True)
class Format:
    """Format of a kind of file.

    Attributes:
        key: field that holds the number of the format; its name identifies the kind of file.
        number: number of the format.
        kind: noun for such a file, for errors.
        remedy: advice for a file of another format, for errors.
    """

    key: str
    number: int
    kind: str
    remedy: str

    def seal(self, content: dict[str, Any]) -> dict[str, Any]:
        """The JSON tree to write: the number of the format, the fields, and their digest."""
        return {self.key: self.number, **content, DIGEST: digest.of_tree(content)}

    def open(self, tree: Any, where: str, build: Callable[[dict[str, Any], str], Record]) -> Record:
        """The record of a JSON tree that was read.

        Args:
            build: function of the fields and the name of the file, which checks the fields and returns the record.
        Raises:
            SpkdError: another kind of file, another format, a field that `build` refuses, or a changed value.
        """
        if not isinstance(tree, dict) or type(tree.get(self.key)) is not int or tree[self.key] != self.number:
            raise SpkdError(f"{where}: not {self.kind} of format {self.number}; {self.remedy}")
        content = {name: value for name, value in tree.items() if name not in (self.key, DIGEST)}
        record = build(content, where)
        if tree.get(DIGEST) != digest.of_tree(content):
            raise SpkdError(f"{where}: damaged (its values are not those of its {DIGEST})")
        return record


def self_digest(tree: Mapping[str, Any]) -> str:
    """Digest of a record of a cache without its field `check`."""
    return digest.of_tree({name: value for name, value in tree.items() if name != CHECK})


def seal_tensors(
    save: Callable[[Any, dict[str, str] | None], bytes],
    tensors: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """Content of a safetensors file whose metadata hold a digest over tensors and metadata.

    The same tensors and metadata always give the same bytes; those of safetensors have metadata in any order.

    Args:
        save: function `save` of safetensors.numpy or safetensors.torch.
    """
    given = dict(metadata or {})
    sealed = save(tensors, given | {DIGEST: _digest(*_divided(save(tensors, given or None), "tensors"))})
    header, values = _divided(sealed, "tensors")
    text = json.dumps(header, sort_keys=True).encode()
    text += b" " * (-len(text) % 8)  # values begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + values


def open_tensors(data: bytes, where: str) -> dict[str, str]:
    """The metadata of a safetensors file that `seal_tensors` made, after a comparison with its digest.

    Raises:
        SpkdError: not such a file, or a changed value.
    """
    header, values = _divided(data, where)
    metadata = header.get("__metadata__")
    expected = metadata.pop(DIGEST, None) if isinstance(metadata, dict) else None
    if expected != _digest(header, values):
        raise SpkdError(f"{where}: damaged (its values are not those of its {DIGEST})")
    return dict(metadata or {})


def _divided(data: bytes, where: str) -> tuple[dict[str, Any], bytes]:
    """Header and values of a safetensors file: eight bytes of the header's length, the header as JSON, the values."""
    length = int.from_bytes(data[:8], "little")
    header = parse_json(data[8 : 8 + length], where)
    if not isinstance(header, dict) or len(data) < 8 + length:
        raise SpkdError(f"{where}: damaged, not a file of tensors")
    return header, data[8 + length :]


def _digest(header: dict[str, Any], values: bytes) -> str:
    return digest.of_blocks((digest.of_tree({"__metadata__": {}} | header).encode(), values))
