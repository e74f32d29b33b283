"""Learnt parameters and measured errors of a cache's codecs: one file, written once, by one worker."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from spkd.cache.card import Errors
from spkd.cache.codec import Codec, make_codec
from spkd.cache.folder import CODEC
from spkd.errors import SpkdError
from spkd.files import digest
from spkd.files.atomic import write_bytes
from spkd.files.reading import parse_json, read_bytes
from spkd.files.sealed import open_tensors, seal_tensors
from spkd.outputs.target import Target


@dataclass(frozen=True)
class Codebook:
    """Fitted codecs of a cache.

    Attributes:
        errors: target -> its errors (see codec.error and codec.divergence).
    """

    codecs: dict[str, Codec]
    errors: Errors

    @property
    def digest(self) -> str | None:
        """SHA-256 over all learnt parameters; None where there are none."""
        learnt = self._tensors()
        if not learnt:
            return None
        return digest.of_blocks(name.encode() + learnt[name].tobytes() for name in sorted(learnt))

    def _tensors(self) -> dict[str, np.ndarray]:
        return {f"{t}/{name}": v for t, codec in self.codecs.items() for name, v in codec.parameters.items()}

    def to_bytes(self, series: str) -> bytes:
        """Content of its file, a safetensors file."""
        metadata = {"series": series, "errors": json.dumps(self.errors, sort_keys=True)}
        return seal_tensors(save, self._tensors(), metadata)

    def save(self, root: Path, series: str) -> None:
        """Write it next to the card, before the card. The caller holds `claims.changing`.

        Args:
            series: `Card.series` of the cache.
        """
        write_bytes(root / CODEC, self.to_bytes(series))

    @classmethod
    def load(cls, root: Path, targets: Sequence[Target], series: str | None = None) -> Codebook | None:
        """The codebook of a cache.

        Args:
            series: `Card.series` that it must have; None accepts any.
        Returns:
            None where there is no codebook, or where it is of another series.
        Raises:
            SpkdError: it is damaged.
        """
        path = root / CODEC
        if not path.is_file():
            return None
        try:
            data = read_bytes(path)
            metadata = open_tensors(data, str(path))
            if series is not None and metadata.get("series") != series:
                return None
            fitted = {target.name: make_codec(target.codec, target.dim) for target in targets}
            for key, values in load(data).items():
                target, name = key.split("/")
                fitted[target].parameters[name] = values
            return cls(fitted, parse_json(metadata["errors"], str(path)))
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise SpkdError(f"{path}: damaged ({error})") from error
