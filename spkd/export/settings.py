"""Settings of `spkd export`, and those of each runtime."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from spkd.config import Chooser, Settings, component, key, section
from spkd.registry import EXPORTS


@dataclass
class ONNXSettings:
    lengths: bool = key(False, "a second input, the lengths of the views of a padded batch")


@dataclass
class Int8Settings:
    manifest: str = key("", "manifest of the speech on which ranges are measured")
    speech: float = key(300.0, "speech on which ranges are measured (s)", low=10, high=1e6)


@dataclass
class LiteRTSettings:
    seconds: float = key(4.0, "length that the graph takes (s), for it cannot change", low=0.3, high=60)


@dataclass
class LongestSettings:
    """Settings of formats with graphs for a single view, up to a length."""

    seconds: float = key(10.0, "greatest length that the graph takes (s); of the waveform the only one", low=1, high=60)


@dataclass
class WebSettings:
    runtime: str = key(
        "", "folder of the npm package onnxruntime-web, which goes along (default: node_modules/onnxruntime-web)"
    )
    seconds: float = key(4.0, "length of a recording with the microphone (s)", low=1, high=60)


@dataclass
class ExportedModelConfig:
    """Settings of the exported student."""

    dimension: int | None = key(
        None,
        "numbers of the embedding, the first ones, that the exported model gives, of a student trained with "
        "student.nested (default: all)",
        low=1,
        high=65_536,
    )


@dataclass
class ExportConfig(Chooser, Settings):
    COMMAND: ClassVar[str] = "export"

    to: str = key("onnx", "format", EXPORTS)
    out: str = key(
        "",
        "file to write; of wespeaker and web a folder (default: in the student's folder, named after the format)",
        is_replaced=True,
    )
    model: ExportedModelConfig = section(ExportedModelConfig)
    waveform: bool = key(False, "take the waveform: the features are computed within the graph")
    calibration: str = key(
        "", "file of `spkd calibrate` that goes with the model (default: the one in the student's folder, if any)"
    )
    trials: str = key("", "trial list on which student and exported model are scored, where the file is an ONNX model")
    trials_manifest: str = key("", "manifest of the trials' audio")
    url: str = key("", "of the model, for its metadata")
    licence: str = key("", "of the model, for its metadata")
    settings: Any = component(EXPORTS)

    def unused(self) -> dict[str, str]:
        reasons = {key_: f"to={self.to}: {reason}" for key_, reason in EXPORTS[self.to].lacks.items()}
        if not self.trials or "trials" in reasons:
            reasons["trials_manifest"] = "no trials are scored"
        return reasons
