"""Utterances, the entries of manifests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Utterance:
    """A stretch of speech in an audio file.

    Attributes:
        id: unique name in its manifest, which trial lists use.
        speaker: name of the speaker; None where it is unknown.
        duration: duration (s); None where it was not measured yet.
        start: start within the file (s).
        channel: the channel to take, counted from 0; None averages all channels.
        attributes: pairs of name and value of the further columns that were asked for.

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

    def attribute(self, name: str) -> str:
        """Value in a column of the manifest; "" where there is none."""
        if name in ("duration", "speaker"):
            value = getattr(self, name)
            return "" if value is None else str(value)
        return dict(self.attributes).get(name, "")
