"""Learnt parameters and measured errors of a cache's codecs: one file, written once, by one worker."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from spkd.cache.card import Errors
from spkd.cache.codec import Codec, make_codec
from spkd.cache.folder import CODEC
from spkd.errors import SpkdError
from spkd.files import digest
from spkd.files.atomic import create_bytes, parse_json
from spkd.outputs.target import Target


@dataclass(frozen=True)
class Codebook:
    """Fitted codecs of a cache.

    Attributes:
        codecs: target -> its codec.
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
        return save(self._tensors(), metadata)

    def create(self, root: Path, series: str, targets: Sequence[Target]) -> Codebook:
        """Write it next to the card, unless another worker was first.

        Args:
            root: folder of the cache.
            series: `Card.series` of the cache.
            targets: the stored targets.
        Returns:
            The codebook that the folder holds now.
        """
        create_bytes(root / CODEC, self.to_bytes(series))
        return self.load(root, targets, series) or self

    @classmethod
    def load(cls, root: Path, targets: Sequence[Target], series: str | None = None) -> Codebook | None:
        """The codebook of a cache.

        Args:
            root: folder of the cache.
            targets: the stored targets.
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
            with safe_open(path, "np") as file:
                metadata = file.metadata() or {}
                if series is not None and metadata.get("series") != series:
                    return None
                fitted = {target.name: make_codec(target.codec, target.dim) for target in targets}
                for key in file.keys():  # noqa: SIM118  (not a dict)
                    target, name = key.split("/")
                    fitted[target].parameters[name] = file.get_tensor(key)
                return cls(fitted, parse_json(metadata["errors"], str(path)))
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise SpkdError(f"{path}: damaged ({error})") from error
