"""Base classes of what finds the speech of utterances: detectors, and files of segments."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from spkd.corpus.audio import decode
from spkd.corpus.manifest import Manifest
from spkd.corpus.utterance import Utterance

NONE = "none"  # value of the setting `vad` by which utterances are taken whole
SEGMENTS = "segments"  # name of a file of segments on cards
Stretches = list[tuple[int, int]]  # first sample of each stretch of speech, and the one after its last


@dataclass(frozen=True)
class VADCard:
    """Description of what found the speech of views.

    Attributes:
        detector: a name in DETECTORS, or `segments` of a file. The digests of the manifests cover the segments.
        version: version of the detector; "" for segments.
        weights_sha256: digest of its weights; "" where it has none.
    """

    detector: str
    version: str = ""
    weights_sha256: str = ""
    parameters: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join(filter(None, (self.detector, self.version)))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class SpeechFinder(ABC):
    """Base class of what finds the speech of utterances. Several threads may use one at once.

    Attributes:
        is_costly: whether finding takes time, so that what was found is kept.
    """

    card: VADCard
    is_costly: bool = True

    def check(self, manifest: Manifest) -> None:  # noqa: B027  # most have nothing to check
        """Check that the names of a manifest's utterances are clear. Raises SpkdError: they are not."""

    @abstractmethod
    def stretches(self, utterance: Utterance) -> Stretches:
        """Stretches of speech of a measured utterance, as `Speech` has them; [] where there is none.

        Raises:
            AudioError: the audio cannot be used.
        """


class Detector(SpeechFinder):
    """Base class of detectors of speech in waveforms.

    Attributes:
        finds_speech: whether it distinguishes speech from other sound.
    """

    finds_speech: bool = True

    def stretches(self, utterance: Utterance) -> Stretches:
        return self.detect(decode(utterance.path, utterance.start, utterance.duration, utterance.channel).wave)

    @abstractmethod
    def detect(self, wave: np.ndarray) -> Stretches:
        """Stretches of speech in a waveform (samples,) at 16 kHz."""


def joined(wave: np.ndarray, stretches: Stretches) -> np.ndarray:
    """Stretches of a waveform (samples,), one after the other."""
    return np.concatenate([wave[first:last] for first, last in stretches])
