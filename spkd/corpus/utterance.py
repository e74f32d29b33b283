"""Utterances, the entries of manifests."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Speech:
    """Speech of an utterance, whose stretches, joined, are the utterance.

    Attributes:
        stretches: for each, its first sample and the one after its last, at 16 kHz from the utterance's start on;
            ascending, without overlap.
        whole: duration of the utterance with its silence (s).
    """

    stretches: tuple[tuple[int, int], ...]
    whole: float

    @property
    def samples(self) -> int:
        """Samples of all stretches."""
        return sum(last - first for first, last in self.stretches)


@dataclass(frozen=True, slots=True)
class Utterance:
    """A stretch of an audio file, or the speech in it.

    Attributes:
        id: unique name in its manifest, which trial lists use.
        speaker: name of the speaker; None where it is unknown.
        duration: duration (s), of the speech alone where `speech` is known; None where it was not measured yet.
        start: start within the file (s).
        channel: the channel to take, counted from 0; None averages all channels.
        attributes: pairs of name and value of the further columns that were asked for.
        speech: stretches of speech, of which views are taken; None: all of it is taken.

    Example:
        >>> Utterance("id10270/5r0dWxy17C8/00001.wav", "/data/vox1/id10270/5r0dWxy17C8/00001.wav", "id10270", 8.12)
    """

    id: str
    path: str
    speaker: str | None = None
    duration: float | None = None
    start: float = 0.0
    channel: int | None = None
    attributes: tuple[tuple[str, str], ...] = ()
    speech: Speech | None = None

    @property
    def whole(self) -> float | None:
        """Duration (s) with silence; None where it was not measured yet."""
        return self.duration if self.speech is None else self.speech.whole

    def attribute(self, name: str) -> str:
        """Value in a column of the manifest; "" where there is none.

        `duration` is that with silence, and `speech` that of the speech alone, where this is known.
        """
        if name == "speech" and self.speech is not None:
            return str(self.duration)
        if name in ("duration", "speaker"):
            value = self.whole if name == "duration" else self.speaker
            return "" if value is None else str(value)
        return dict(self.attributes).get(name, "")

    def of_speech(self, stretches: Iterable[tuple[int, int]], sample_rate: int) -> Utterance:
        """The utterance of its speech alone.

        Args:
            stretches: as of `Speech`.
            sample_rate: of the stretches (Hz).
        """
        speech = Speech(tuple(stretches), self.whole or 0.0)
        return replace(self, duration=speech.samples / sample_rate, speech=speech)

    def places(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Where the samples `start` to `stop` - 1 of the utterance lie: stretches as of `Speech`, at its rate."""
        if self.speech is None:
            return [(start, stop)]
        found, before = [], 0  # samples of speech before the stretch
        for first, last in self.speech.stretches:
            begin, end = max(start - before, 0), min(stop - before, last - first)
            if begin < end:
                found.append((first + begin, first + end))
            before += last - first
        return found
