"""Settings of student networks: those of all architectures, and those of single ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from spkd.config import Chooser, component, key
from spkd.errors import UsageError
from spkd.registry import STUDENTS

FBANK_NAMES = ("kaldi", "sherpa", "wespeaker", "3d-speaker")


@dataclass
class SSLSettings:
    layers: int = key(2, "transformer layers", low=1, high=1000)
    adapters: int = key(
        0, "width of the adapters parallel to the feed-forward layers, for one-step (0: none)", low=0, high=65_536
    )


@dataclass
class StudentConfig(Chooser):
    name: str = key("xvector", "architecture", STUDENTS)
    channels: int | None = key(None, "width (default: the architecture's own)", low=1, high=65_536)
    embedding: int = key(192, "embedding dimension", low=1, high=65_536)
    nested: list[int] = key(
        [],
        "sizes at which the embedding is usable by its first numbers alone, e.g. [32,64,128,256]: every loss on the "
        "embedding is the mean over them; rising, the last is the embedding's",
        low=1,
        high=65_536,
    )
    nested_crops: list[float] = key(
        [],
        "a crop length (s) for each nested size, rising, the last is crop: each batch has one of them, drawn at "
        "random, and trains the sizes whose length it reaches",
        low=0.05,
        high=100_000,
    )
    features: str = key(
        "kaldi",
        "fbank that the student takes: sherpa for phones (sherpa-onnx computes it), wespeaker or 3d-speaker for "
        "weights of these toolkits",
        FBANK_NAMES,
    )
    init: str | None = key(
        None,
        "initial weights: a student trained by spkd, a state dictionary of the same architecture, or, for ssl, a "
        "transformers model (folder or hub id)",
    )
    settings: Any = component(STUDENTS)

    def unused(self) -> dict[str, str]:
        return {} if self.nested else {"nested_crops": "no student.nested is set"}

    def check_nested(self, crop: float) -> None:
        """Check the nested sizes and their crops. Raises UsageError where they are not as declared.

        Args:
            crop: length of the student's crops (s).
        """
        sizes, lengths = self.nested, self.nested_crops
        if sizes and (len(sizes) < 2 or not _rises(sizes) or sizes[-1] != self.embedding):
            raise UsageError(
                f"student.nested={_listed(sizes)}: give two sizes or more, rising, of which the last is "
                f"student.embedding={self.embedding}"
            )
        if lengths and (len(lengths) != len(sizes) or not _rises(lengths) or lengths[-1] != crop):
            raise UsageError(
                f"student.nested_crops={_listed(lengths)}: give a length (s) for each of student.nested="
                f"{_listed(sizes)}, rising, of which the last is crop={crop:g}"
            )


def _rises(values: Sequence[float]) -> bool:
    return all(a < b for a, b in pairwise(values))


def _listed(values: Sequence[float]) -> str:
    return f"[{','.join(f'{value:g}' for value in values)}]"
