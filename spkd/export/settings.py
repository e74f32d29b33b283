"""Settings of `spkd export`, and those of each runtime."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from spkd.config import Chooser, Settings, component, key
from spkd.registry import EXPORTS

SCORED = ("onnx", "onnx-int8")


@dataclass
class ONNXSettings:
    """Settings of ONNX."""

    lengths: bool = key(False, "a second input, the lengths of the views of a padded batch")


@dataclass
class Int8Settings:
    """Settings of ONNX in 8-bit integers."""

    manifest: str = key("", "manifest of the speech on which ranges are measured")
    speech: float = key(300.0, "speech on which ranges are measured (s)", low=10, high=1e6)


@dataclass
class LiteRTSettings:
    """Settings of LiteRT."""

    seconds: float = key(4.0, "length that the graph takes (s), for it cannot change", low=0.3, high=60)


@dataclass
class ExportConfig(Chooser, Settings):
    """Settings of `spkd export`."""

    COMMAND: ClassVar[str] = "export"

    to: str = key("onnx", "format", EXPORTS)
    out: str = key("", "file to write, wespeaker: folder (default: in the student's folder, named after the format)")
    waveform: bool = key(False, "take the waveform: the features are computed within the graph")
    calibration: str = key(
        "", "file of `spkd calibrate` that goes with the model (default: the one in the student's folder, if any)"
    )
    trials: str = key("", f"trial list on which student and exported model are scored ({', '.join(SCORED)})")
    trials_manifest: str = key("", "manifest of the trials' audio")
    url: str = key("", "of the model, for its metadata")
    licence: str = key("", "of the model, for its metadata")
    settings: Any = component(EXPORTS)

    def unused(self) -> dict[str, str]:
        """Settings that have no effect, with the reason."""
        reasons = {}
        if self.to not in SCORED:
            reasons["trials"] = f"to={self.to} is not scored"
        if not self.trials or self.to not in SCORED:
            reasons["trials_manifest"] = "no trials are scored"
        if self.to == "wespeaker":
            reason = "WeSpeaker's files hold the network alone, which takes fbank"
            reasons |= dict.fromkeys(("waveform", "calibration", "url", "licence"), reason)
        return reasons
