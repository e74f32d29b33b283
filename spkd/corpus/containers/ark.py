"""Kaldi's archives of audio (wav.ark), as wav-copy, ESPnet and kaldiio write them."""

from __future__ import annotations

import re
from collections.abc import Iterator

from spkd.corpus.address import Address
from spkd.corpus.ark import audio_at
from spkd.corpus.containers.container import Container, Entry, Wanted
from spkd.errors import SpkdError

LONGEST_KEY = 4096  # bytes
BEGIN = re.compile(rb"[^\s\0]{1,900} (?:RIFF|RIFX|AUDIO|fLaC)")


class KaldiArchive(Container):
    """Reader of an archive from end to end; no bytes but headers are read."""

    describes = "Kaldi's wav.ark"
    suffixes = (".ark",)

    def __init__(self, path: str, wanted: Wanted) -> None:
        super().__init__(path, wanted)
        self.has_names = False

    @classmethod
    def recognises(cls, path: str, begin: bytes) -> bool:
        return BEGIN.match(begin) is not None

    def entries(self) -> Iterator[Entry]:
        source, at, count = self.opened(), 0, 0
        while at < source.size:
            try:
                key, space, _ = source.read(at, min(LONGEST_KEY, source.size - at)).partition(b" ")
                if not space:
                    raise ValueError("no key and a space")
                name = key.decode()
                if not name.isprintable():
                    raise ValueError("a key with control characters")
                offset, length, kind = audio_at(source.read, source.size, at + len(key) + 1)
            except (ValueError, OSError) as error:
                if not count:
                    raise SpkdError(f"{self.path}: not an archive of audio that can be read ({error})") from error
                self.left_out[""] = (
                    f"damaged from byte {at:,} on ({error}); what lies before is taken: {count:,} entries"
                )
                return
            yield Entry(name, name, Address(self.path, offset, length, kind))
            at, count = offset + length, count + 1
            self.share(at / source.size)
