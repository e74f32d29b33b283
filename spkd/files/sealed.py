"""JSON files of one record, with a format number, typed fields, and a digest over the fields."""

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
            tree: the parsed JSON.
            where: name of the file, for errors.
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
