"""Description of a teacher on the card of a cache."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from spkd.errors import SpkdError
from spkd.files import digest
from spkd.files.schema import record


@dataclass(frozen=True)
class TeacherCard:
    """Description of a teacher on a card.

    Attributes:
        source: the package, the hub id or the name of the folder.
        preprocessing: preprocessing of the waveform, in words.
        cite: the paper; None where there is none.
        library: name and version of the library that ran it; None for torch.
        details: further facts of the family, such as the pooled layer, the network and its settings.
    """

    family: str
    weights_sha256: str
    licence: str
    source: str
    preprocessing: str
    cite: str | None = None
    library: str | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def model_digest(self, vad: str | None) -> str:
        """Digest of what decides on the model's embeddings: the weights, the settings under which they run, the speech.

        Args:
            vad: what finds the speech that it is given; None where it is given whole utterances.
        """
        return digest.of_tree({"weights": self.weights_sha256, "details": self.details, "vad": vad})

    def to_json(self) -> dict[str, Any]:
        """The description as JSON, with the details at its top level."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "details"}
        return {name: value for name, value in values.items() if value is not None} | self.details

    @classmethod
    def from_json(cls, tree: Any, where: str) -> TeacherCard:
        """A description from its JSON, checked. Raises SpkdError: it is not a description of a teacher."""
        if not isinstance(tree, dict):
            raise SpkdError(f"{where}: damaged (expected an object)")
        names = {f.name for f in fields(cls)} - {"details"}
        details = {name: value for name, value in tree.items() if name not in names}
        return record(cls, {name: value for name, value in tree.items() if name in names} | {"details": details}, where)
