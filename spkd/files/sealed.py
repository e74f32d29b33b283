"""JSON files of one record: the number of their format, typed fields, and a digest over all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from spkd.errors import SpkdError
from spkd.files import digest

Record = TypeVar("Record")
DIGEST = "digest"


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        key: name under which a file holds the number of its format, which tells one kind from another.
        number: of the format.
        kind: what such a file is, for errors.
        remedy: what to do about a file of another format.
    """

    key: str
    number: int
    kind: str
    remedy: str

    def seal(self, content: dict[str, Any]) -> dict[str, Any]:
        """The tree to write: the fields between the number of the format and their digest."""
        return {self.key: self.number, **content, DIGEST: digest.of_tree(content)}

    def open(self, tree: Any, where: str, build: Callable[[dict[str, Any], str], Record]) -> Record:
        """The record of a tree that was read.

        Args:
            tree: the parsed JSON.
            where: name of the file, for errors.
            build: makes the record of the fields, and checks them.
        Raises:
            SpkdError: another kind of file or another format, a field that `build` refuses, or a changed value.
        """
        if not isinstance(tree, dict) or type(tree.get(self.key)) is not int or tree[self.key] != self.number:
            raise SpkdError(f"{where}: not {self.kind} of format {self.number}; {self.remedy}")
        content = {name: value for name, value in tree.items() if name not in (self.key, DIGEST)}
        record = build(content, where)
        if tree.get(DIGEST) != digest.of_tree(content):
            raise SpkdError(f"{where}: damaged (its values are not those of its {DIGEST})")
        return record
