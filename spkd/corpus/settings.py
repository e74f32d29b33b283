"""Settings of views and of augmentation."""

from __future__ import annotations

import re
from dataclasses import dataclass

from spkd.config import key

CODER_NAMES = ("g711", "gsm", "opus", "mp3", "vorbis")
MANIFEST = "manifest.csv"
VAD = "leaves silence out: none, silero (spkd[vad]), energy (Kaldi's), or a file of segments (RTTM, Kaldi, WeSpeaker)"
MAX_SEED = 2**40
SEVERAL = re.compile("full:(?!0*1?$)[0-9]+")  # view plans of several views of the whole utterance
AS_IT_IS = re.compile("full:0*1")  # that of one view, which is `full` without factors


@dataclass
class AugmentationConfig:
    """Settings of augmentation by noise, reverberation and transmission."""

    noise: str | None = key(
        None, "additive noise: a folder of audio files, or 'synthetic' (coloured noise, no data needed)"
    )
    noise_prob: float = key(0.6, "probability that noise is added to a view, where noise is set", low=0, high=1)
    snr: list[float] = key(
        [5.0, 20.0], "lowest and highest signal-to-noise ratio (dB), where noise is set", low=-100, high=100
    )
    rir: str | None = key(None, "reverberation: a folder of room impulse responses")
    rir_prob: float = key(0.3, "probability that a view is reverberated, where rir is set", low=0, high=1)
    coders: list[str] = key(
        [], "transmission: telephone (g711, gsm), opus, mp3, vorbis, of which each view takes one", CODER_NAMES
    )
    coder_prob: float = key(0.5, "probability that a view is transmitted, where coders are set", low=0, high=1)

    @property
    def is_used(self) -> bool:
        """Whether any augmentation is set."""
        return self.noise is not None or self.rir is not None or bool(self.coders)

    def unused(self) -> dict[str, str]:
        reasons: dict[str, str] = {}
        sources = (("noise", "noise_prob"), ("rir", "rir_prob"), ("coders", "coder_prob"))
        for name, prob in sources:
            if getattr(self, prob) == 0:  # alone it says what is so: a typed 0 turns off what a file sets
                reasons[name] = f"{prob} is 0"
            elif not getattr(self, name):
                reasons[prob] = f"no {name} {'are' if name == 'coders' else 'is'} set"
        if self.noise is None or not self.noise_prob:
            reasons["snr"] = "no noise is set" if self.noise is None else "noise_prob is 0"
        return reasons


@dataclass
class PlanConfig:
    """Settings of the views of each utterance."""

    plan: str = key(
        "full",
        "views of each utterance: full | full:COUNT (whole: as it is, and COUNT - 1 times with a speed and a formant "
        "factor drawn for its speaker) | windows:SECONDS/HOP | crops:COUNT,SECONDS",
    )
    speeds: list[float] = key(
        [1.0], "speed factors; full and windows make one view per speed, crops draw one each", low=0.5, high=2.0
    )
    formants: list[float] = key(
        [1.0],
        "factors by which formants move without the pitch; with speeds: pseudo-speakers, pitch and formants apart; "
        "full and windows make one view per speed and factor",
        low=0.5,
        high=2.0,
    )


@dataclass
class ViewConfig(AugmentationConfig, PlanConfig):
    """Settings of the view plan of a cache."""

    seed: int = key(0, "seed of crop positions, speeds and augmentation", low=0, high=MAX_SEED)
    vad: str = key("none", VAD)

    def unused(self) -> dict[str, str]:
        reasons = super().unused()
        draws_factors = SEVERAL.fullmatch(self.plan) and len(self.speeds) * len(self.formants) > 1
        if not (self.is_used or draws_factors or self.plan.startswith("crops")):
            reasons["seed"] = f"view={self.plan} without augmentation draws nothing at random"
        if SEVERAL.fullmatch(self.plan) and not self.is_used and self.speeds == self.formants == [1.0]:
            reasons["plan"] = "its views of an utterance are the same without speeds, formants or augmentation"
        if AS_IT_IS.fullmatch(self.plan):
            reasons |= dict.fromkeys(("speeds", "formants"), f"view={self.plan} is each utterance as it is")
        return reasons


@dataclass
class FetchConfig:
    """Settings of the copies of files elsewhere on this machine."""

    cache: str | None = key(None, "folder of copies of audio elsewhere, and of decompressed tables, made when read")
    limit: float = key(200, "most that these copies take (GB); those used last stay", positive=True, high=1e9)

    def unused(self) -> dict[str, str]:
        return {"limit": "no fetch.cache is set"} if self.cache is None else {}


@dataclass
class AugmentationFolders:
    """Folders of the audio that augmented a cache's views."""

    noise: str | None = key(None, "folder of the noise with which the cache's views were augmented")
    rir: str | None = key(None, "folder of the impulse responses of the cache's views")
