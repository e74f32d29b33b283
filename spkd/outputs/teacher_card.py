"""Description of a teacher on the card of a cache."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from spkd.errors import SpkdError
from spkd.files.schema import record


@dataclass(frozen=True)
class TeacherCard:
    """A teacher as a card describes it.

    Attributes:
        family: its name among the teachers.
        weights_sha256: digest of its weights.
        licence: of the weights.
        source: the package, the hub id or the folder's name.
        preprocessing: of the waveform, in words.
        cite: the paper, where there is one.
        library: name and version of the library that ran it, where it is another than torch.
        details: what else the family says of itself: the pooled layer, the network and its settings.
    """

    family: str
    weights_sha256: str
    licence: str
    source: str
    preprocessing: str
    cite: str | None = None
    library: str | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "details"}
        return {name: value for name, value in own.items() if value is not None} | self.details

    @classmethod
    def from_json(cls, tree: Any, where: str) -> TeacherCard:
        """Raises SpkdError where it is not one."""
        if not isinstance(tree, dict):
            raise SpkdError(f"{where}: damaged (expected an object)")
        own = {f.name for f in fields(cls)} - {"details"}
        details = {name: value for name, value in tree.items() if name not in own}
        return record(cls, {name: value for name, value in tree.items() if name in own} | {"details": details}, where)
