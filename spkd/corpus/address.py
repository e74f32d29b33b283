"""Addresses of audio within containers, `CONTAINER#OFFSET+LENGTH.KIND`: `/data/000.tar#1536+32044.flac`.

An address stands wherever the path of an audio file may stand. A path that exists is a file, whatever its name. The
container may be elsewhere, `s3://bucket/000.tar#1536+32044.flac`, and so may a file, `https://host/a.flac`.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

from spkd.corpus.remote import is_elsewhere as is_elsewhere
from spkd.corpus.remote import opened
from spkd.files.reading import State, state_of

DEFLATE, ROW, ARK, CRC = "deflate", "row", "ark", "crc"
PATTERN = re.compile(
    rf"(?P<container>.+)#(?P<offset>\d{{1,19}})\+(?P<length>\d{{1,19}})"
    rf"\.(?P<kind>[a-z0-9]{{1,8}}(?:\.{DEFLATE}(?::[0-9a-f]{{8}})?|\.{CRC}:[0-9a-f]{{8}}|\.{ROW}(?::.+)?)?)",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Address:
    """Place of audio within a container.

    Attributes:
        container: path of the file that holds it.
        offset: place of its first byte; of a row of a table, its number from 0.
        length: its bytes, as they are stored; 0 of a whole file elsewhere, and of an entry of a Kaldi archive whose own
            header tells.
        kind: its format, as the suffix of a file has it (`flac`); followed by `.deflate:CRC` where it is compressed in
            a zip (without the CRC, it is not compared), by `.crc:CRC` where it is stored there, and by `.row`, or
            `.row:COLUMN`, where it is a cell of a table; `ark`: an entry of a Kaldi archive, whose header names the
            format.
    """

    container: str
    offset: int
    length: int
    kind: str

    def __str__(self) -> str:
        return f"{self.container}#{self.offset}+{self.length}.{self.kind}"

    @property
    def suffix(self) -> str:
        """Suffix of a file of this audio."""
        return f".{self.kind.partition('.')[0]}"

    @property
    def storage(self) -> str:
        """How it is stored: DEFLATE, ROW, ARK, or "" where its bytes are those of a file."""
        if self.kind == ARK:
            return ARK
        storage = self.kind.partition(".")[2].partition(":")[0]
        return "" if storage == CRC else storage

    @property
    def column(self) -> str:
        """Column of a cell of a table; "" where the only one with audio is meant."""
        return self.kind.partition(":")[2] if self.storage == ROW else ""

    @property
    def crc(self) -> int | None:
        """CRC-32 of the audio, as the directory of its zip has it; None where none is known."""
        storage, _, stated = self.kind.partition(".")[2].partition(":")
        return int(stated, 16) if stated and storage in (CRC, DEFLATE) else None


def parse(text: str) -> Address | None:
    """The address in a text; None where it is the path of a file, or has another form."""
    if "#" not in text and not is_elsewhere(text):
        return None
    address = _parsed(text)
    return None if address is None or (not is_elsewhere(text) and os.path.lexists(text)) else address


@lru_cache(maxsize=1 << 12)
def _parsed(text: str) -> Address | None:
    if (match := PATTERN.fullmatch(text)) is not None:
        return Address(match["container"], int(match["offset"]), int(match["length"]), match["kind"])
    if is_elsewhere(text):
        path = text.partition("?")[0] if text.startswith("http") else text
        return Address(text, 0, 0, PurePosixPath(path).suffix.lower().lstrip("."))
    return None


def file_of(path: str) -> str:
    """Path of the file that holds audio: the container of an address, and else the path itself."""
    address = parse(path)
    return path if address is None else address.container


def suffix_of(path: str) -> str:
    """Suffix by which audio is decoded, in lower case."""
    address = parse(path)
    return Path(path).suffix.lower() if address is None else address.suffix


def state_of_audio(path: str) -> State | None:
    """Size and time of the file that holds audio; None where there is none."""
    return state_of_container(file_of(path))


def state_of_container(path: str) -> State | None:
    """Size and time of a container, or size and name of the content elsewhere; None where there is none."""
    if not is_elsewhere(path):
        return state_of(path)
    try:
        return opened(path).state
    except OSError:
        return None


def relative_path(path: str, folder: Path) -> str:
    """A path as a manifest in a folder has it: relative where it lies below the folder."""
    if is_elsewhere(path):
        return path
    absolute = Path(path).resolve()
    return str(absolute.relative_to(folder)) if absolute.is_relative_to(folder) else str(absolute)
