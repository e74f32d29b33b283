"""Settings of student networks: those of all architectures, and those of single ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from spkd.config import Chooser, component, key
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
