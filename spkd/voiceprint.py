"""Voiceprints: what is kept of a person's recordings to verify them later."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from spkd.errors import SpkdError, UsageError
from spkd.files import schema
from spkd.files.reading import parse_json
from spkd.files.sealed import Format

FORMAT = Format("spkd_voiceprint", 1, "a voiceprint", "it is what `Voiceprint.to_bytes` gives")
MOST = 1 << 20  # numbers in an embedding


@dataclass(frozen=True)
class Voiceprint:
    """Voiceprint of a person, for one model.

    Attributes:
        embedding: (D,) float32: mean of the embeddings of the recordings, each of them divided by its length. Its
            product with the embedding of another recording, divided by its length too, is the mean of the cosines of
            that recording with those of the person.
        model: digest of the model, see `SpeakerModel.digest`.
        recordings: number of recordings.
        seconds: their total duration (s).
        enrolled: date of the enrolment, as 2026-11-30.
        remarks: problems of the recordings, as phrases; usually ().
        mapped_by: fingerprint of the map by which it came from another model (`EmbeddingMap`); "" where `model` itself
            embedded the recordings.
    """

    embedding: np.ndarray = field(repr=False)
    model: str
    recordings: int = field(metadata={"low": 1, "high": 10**9})
    seconds: float = field(metadata={"low": 0, "high": 1e12})
    enrolled: str
    remarks: tuple[str, ...] = ()
    mapped_by: str = ""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Voiceprint) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self.to_bytes())

    def to_json(self) -> dict[str, Any]:
        """The fields, with the embedding in base64 (little-endian float32)."""
        return {
            "embedding": base64.b64encode(self.embedding.astype("<f4").tobytes()).decode(),
            "model": self.model,
            "recordings": self.recordings,
            "seconds": self.seconds,
            "enrolled": self.enrolled,
            "remarks": list(self.remarks),
            "mapped_by": self.mapped_by,
        }

    @classmethod
    def from_json(cls, tree: Any, where: str) -> Voiceprint:
        """A voiceprint from parsed JSON. Raises SpkdError: it is none."""
        if not isinstance(tree, Mapping) or not isinstance(tree.get("embedding"), str):
            raise SpkdError(f"{where}: damaged (no embedding)")
        try:
            values = np.frombuffer(base64.b64decode(tree["embedding"], validate=True), "<f4").astype(np.float32)
        except ValueError as error:
            raise SpkdError(f"{where}: damaged (embedding: {error})") from error
        length = float(np.linalg.norm(values.astype(np.float64)))
        if not 0 < len(values) <= MOST or not math.isfinite(length) or not 0 < length < 1.001:
            raise SpkdError(f"{where}: damaged (embedding: no mean of unit vectors)")
        rest = schema.record(_Rest, {name: value for name, value in tree.items() if name != "embedding"}, where)
        return cls(values, **{f.name: getattr(rest, f.name) for f in fields(_Rest)})

    def to_bytes(self) -> bytes:
        """The voiceprint as bytes, to be kept anywhere."""
        return json.dumps(FORMAT.seal(self.to_json())).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Voiceprint:
        """A voiceprint from its bytes. Raises UsageError: no bytes; SpkdError: they are no voiceprint, or damaged."""
        if not isinstance(data, bytes | bytearray):
            raise UsageError(f"expected the bytes of a voiceprint, got a {type(data).__name__}")
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            raise SpkdError("a voiceprint: damaged (not UTF-8)") from error
        return FORMAT.open(parse_json(text, "a voiceprint"), "a voiceprint", cls.from_json)


@dataclass(frozen=True)
class _Rest:
    """Fields of a voiceprint beside its embedding."""

    model: str
    recordings: int = field(metadata={"low": 1, "high": 10**9})
    seconds: float = field(metadata={"low": 0, "high": 1e12})
    enrolled: str
    remarks: tuple[str, ...]
    mapped_by: str = ""
