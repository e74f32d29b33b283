"""Settings of `spkd enrol`, `spkd verify`, `spkd identify` and `spkd voices`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from spkd.config import Settings, key, section
from spkd.teachers.settings import DEVICES, VoiceModelConfig

VOICES = "voices.json"


@dataclass
class EnrolVoiceConfig(Settings):
    COMMAND: ClassVar[str] = "enrol"
    HINTS: ClassVar[dict[str, str]] = {"student": "model", "out": "voices"}

    model: VoiceModelConfig = section(VoiceModelConfig)
    vad: str = key("none", "leaves silence out, as at the calibration: none, silero (spkd[vad]) or energy (Kaldi's)")
    voices: str = key(VOICES, "file of the enrolled voices")
    device: str = key("auto", "auto takes CUDA, then MPS, then CPU; cuda:N is one of several", DEVICES)


@dataclass
class VerifyVoiceConfig(EnrolVoiceConfig):
    COMMAND: ClassVar[str] = "verify"

    threshold: str = key(
        "eer", "threshold of the calibration (eer, min_dcf_0.01, false_alarm_0.01, ...), or a log-likelihood ratio"
    )
    map_by: str | None = key(
        None, "folder of the map by which voices came from another model: its calibration decides on them"
    )


@dataclass
class IdentifyVoiceConfig(VerifyVoiceConfig):
    COMMAND: ClassVar[str] = "identify"
