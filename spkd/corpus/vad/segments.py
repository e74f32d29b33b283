"""Segments of speech from a file: RTTM, segments of Kaldi, and the `vad` files of WeSpeaker.

    SPEAKER call-1 1 12.30 2.75 <NA> <NA> A <NA> <NA>     RTTM (NIST, RT-09): recording, channel, start, duration (s)
    call-1-0007 call-1 12.30 15.05                        Kaldi, WeSpeaker: name, recording, start, end (s)
    call-1 12.30 15.05                                    the same without a name

A recording is the id of an utterance or, where all utterances of the name are of one file, the name of its file without
the suffix; of audio in a container, the last part of its id stands for that name. Times are those within the file.
Segments that overlap are one. What lies up to `OVERSHOOT` beyond the end of the file is cut off, as Kaldi's
extract-segments does by default (--max-overshoot); segments farther beyond it are of another file, or not in seconds.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath, PurePosixPath

from spkd.corpus.address import parse
from spkd.corpus.audio import AUDIO_SUFFIXES, MAX_SECONDS, SAMPLE_RATE, AudioError, probe
from spkd.corpus.manifest import Manifest
from spkd.corpus.utterance import Utterance
from spkd.corpus.vad.base import SEGMENTS, SpeechFinder, Stretches, VADCard
from spkd.errors import SpkdError
from spkd.files.text import MOST, numbered_lines

# First words of the lines of RTTM; those of SPEAKER are segments.
RTTM = (
    *("SPEAKER", "SPKR-INFO", "SEGMENT", "NOSCORE", "NO_RT_METADATA", "LEXEME", "NON-LEX", "NON-SPEECH", "FILLER"),
    *("EDIT", "IP", "SU", "CB", "A/P"),
)
COMMENT = ";;"  # beginning of comments in RTTM
OVERSHOOT = 0.5  # s beyond the end of a file that a segment may have
TO_THE_END = -1.0  # end of a segment of Kaldi that goes on to the end of its recording


class ListedSegments(SpeechFinder):
    """Segments of a file.

    Raises:
        SpkdError: a malformed line (file and line named), or no segments.
    """

    is_costly = False

    def __init__(self, path: Path) -> None:
        self.path, self.card = path, VADCard(SEGMENTS)
        segments: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
        for recording, start, end, channel in _read(path):
            segments[recording].append((start, end, channel))
        self._segments, self._ends = dict(segments), dict[str, float]()
        if not self._segments:
            raise SpkdError(f"{path}: holds no segments")

    def check(self, manifest: Manifest) -> None:
        files: dict[str, str] = {}
        for utterance in manifest:
            if utterance.id in self._segments or (name := _file_name(utterance)) not in self._segments:
                continue
            if files.setdefault(name, utterance.path) != utterance.path:
                raise SpkdError(
                    f"{self.path}: {name!r} is the name of several files, {files[name]} and {utterance.path}; name the "
                    "segments by the ids of the utterances"
                )

    def stretches(self, utterance: Utterance) -> Stretches:
        """Stretches of speech of a measured utterance, from the segments of its id, or of its file.

        Raises:
            AudioError: the file has none of either, or has some that lie beyond the end of the audio.
        """
        found = self._segments.get(utterance.id) or self._segments.get(_file_name(utterance))
        if found is None:
            raise AudioError(utterance.path, "not in the file of segments")
        self._check_within(utterance, found)
        channels = {channel for _, _, channel in found}
        # Tools that know of no channels write 1 or 0 for all.
        tells = len(channels) > 1 or any(word.isdecimal() and int(word) > 1 for word in channels)
        if utterance.channel is not None and tells:
            found = [segment for segment in found if segment[2] == str(utterance.channel + 1)]
        most = round((utterance.duration or 0.0) * SAMPLE_RATE)
        moved = sorted(
            (_sample(start - utterance.start, most), _sample(end - utterance.start, most)) for start, end, _ in found
        )
        merged: Stretches = []
        for first, last in moved:
            if first >= last:
                continue
            if merged and first <= merged[-1][1]:
                merged[-1] = merged[-1][0], max(last, merged[-1][1])
            else:
                merged.append((first, last))
        return merged

    def _check_within(self, utterance: Utterance, segments: Iterable[tuple[float, float, str]]) -> None:
        """Check that the segments of a recording lie in its file, of which an utterance may be a part."""
        last = max(start if end == math.inf else end for start, end, _ in segments)
        path = utterance.path
        if last <= utterance.start + (utterance.whole or 0.0) + OVERSHOOT:
            return
        if path not in self._ends:
            self._ends[path] = probe(path)
        if last > self._ends[path] + OVERSHOOT:
            reason = f"its segments go up to {last:.10g} s, but its file ends at {self._ends[path]:.5g} s"
            raise AudioError(path, f"{reason}; are they in seconds, and of this file?")


def _file_name(utterance: Utterance) -> str:
    """Name of the file of an utterance without the suffix; of audio in a container, the last part of its id."""
    address = parse(utterance.path)
    if address is None:
        return PurePath(utterance.path).stem
    if address.length == 0 and not address.storage:  # a whole file elsewhere
        return PurePosixPath(address.container.partition("?")[0]).stem
    name = PurePosixPath(utterance.id)
    return name.stem if name.suffix.lower() in AUDIO_SUFFIXES else name.name


def _sample(seconds: float, most: int) -> int:
    return min(max(round(min(seconds, MAX_SECONDS) * SAMPLE_RATE), 0), most)


def _read(path: Path) -> Iterator[tuple[str, float, float, str]]:
    """Recording, start (s), end (s) and channel of each segment; "" where the file has no channels."""
    for number, line in numbered_lines(path, most=MOST):
        words, where = line.split(), f"{path}:{number}"
        if words[0].startswith(COMMENT):
            continue
        if words[0] in RTTM and len(words) >= 8:
            if words[0] == "SPEAKER":
                start, duration = _time(words[3], where), _time(words[4], where)
                yield words[1], start, start + duration, words[2]
            continue
        if len(words) not in (3, 4):
            raise SpkdError(
                f"{where}: expected a line of RTTM, or `[name] recording start end` (s), found {line[:80].strip()!r}"
            )
        recording, start = words[-3], _time(words[-2], where)
        end = math.inf if _number(words[-1]) == TO_THE_END else _time(words[-1], where)
        if end < start:
            raise SpkdError(f"{where}: the end ({words[-1]} s) is before the start ({words[-2]} s)")
        yield recording, start, end, ""


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        return math.nan


def _time(word: str, where: str) -> float:
    """A time (s). Raises SpkdError: it is none."""
    seconds = _number(word)
    if not 0 <= seconds < math.inf:
        raise SpkdError(f"{where}: {word[:40]!r} is no time in seconds")
    return seconds
