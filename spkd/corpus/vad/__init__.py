"""Detection of speech (voice activity detection, VAD), by which the silence of utterances is left out."""

from __future__ import annotations

import functools
from pathlib import Path

from spkd.corpus.vad.base import NONE, Detector, SpeechFinder
from spkd.corpus.vad.segments import ListedSegments
from spkd.errors import UsageError, did_you_mean
from spkd.registry import DETECTORS


def detector_of(name: str) -> Detector | None:
    """The detector of a name in DETECTORS, one for the whole process; None for `none`.

    Raises:
        UsageError: there is no such detector, or a package is missing.
    """
    if name != NONE and name not in DETECTORS:
        raise UsageError(f"vad={name}: {NONE}, {', '.join(DETECTORS)}{did_you_mean(name, [NONE, *DETECTORS])}")
    return None if name == NONE else _made(name)


@functools.cache
def _made(name: str) -> Detector:
    detector: Detector = DETECTORS[name]()
    return detector


def finder_of(name: str) -> SpeechFinder | None:
    """What finds the speech of utterances, by the value of the setting `vad`; None for `none`.

    Args:
        name: none, a name in DETECTORS, or a file of segments.
    Raises:
        UsageError: neither of these, or a package is missing.
        SpkdError: a malformed file.
    """
    if name == NONE or name in DETECTORS:
        return detector_of(name)
    if not Path(name).is_file():
        raise UsageError(
            f"vad={name}: none, {', '.join(DETECTORS)} or a file of segments{did_you_mean(name, [NONE, *DETECTORS])}"
        )
    return ListedSegments(Path(name))
