"""Audio in Kaldi's archives: what follows a key and a space, as Kaldi's wav-copy and kaldiio write it."""

from __future__ import annotations

import re
from collections.abc import Callable

MARK = b"AUDIO"  # of kaldiio, before the number of bytes of the length, the length, and a file of any format
# A space behind a key, and audio: FLAC with its first block (RFC 9639, 8.1 and 8.2), WAV, or an entry of kaldiio.
ENTRY = re.compile(rb" (?:fLaC[\x00\x80]\x00\x00\x22|RIF[FX].{4}WAVE|AUDIO[\x01-\x08])", re.DOTALL)
LONGEST = 13  # bytes of such a beginning
BLOCK = 1 << 18  # bytes that are searched at once
HEAD = 16  # bytes that tell an entry's kind
STREAMED = (0, 0xFFFFFFFF, 0x7FFFFFFF)  # sizes in the header of a WAV that was never filled in
FORMATS = {b"RIFF": "wav", b"RIFX": "wav", b"RF64": "rf64", b"fLaC": "flac", b"OggS": "ogg", b"FORM": "aiff"}


def audio_at(read: Callable[[int, int], bytes], size: int, offset: int) -> tuple[int, int, str]:
    """Place of the audio of an entry.

    Args:
        read: function that gives the bytes of the archive at an offset, of a length.
        size: bytes of the archive.
        offset: place behind the key and the space, as in a wav.scp.
    Returns:
        The offset and the length of a file of audio (bytes), and its format as the suffix of a file has it.
    Raises:
        ValueError: the entry is something else, lies beyond the end, or its length is unknown.
    """
    if offset >= size:
        raise ValueError("lies beyond the end of its archive")
    head = read(offset, min(HEAD, size - offset))
    if head.startswith(MARK):
        count = head[len(MARK)] if len(head) > len(MARK) else 0
        if not 0 < count <= 8:
            raise ValueError("damaged (its length)")
        begin = offset + len(MARK) + 1
        length, offset = int.from_bytes(read(begin, count), "little"), begin + count
        head = read(offset, min(4, size - offset))
        kind = FORMATS.get(head[:4], "wav")
    elif head[:4] in (b"RIFF", b"RIFX"):
        stated = int.from_bytes(head[4:8], "little" if head[:4] == b"RIFF" else "big")
        if stated in STREAMED:
            raise ValueError("a WAV of unknown length, as its writer never filled it in; write the archive again")
        length, kind = 8 + stated, "wav"
    elif head[:4] == b"fLaC":  # its headers give no length: up to the end, where no other entry begins before it
        if (other := _next_entry(read, size, offset + len(MARK))) is not None:
            reason = f"FLAC of unknown length, as another entry begins near byte {other:,}"
            raise ValueError(f"{reason}; write the archive again as WAV, or by kaldiio, which adds lengths")
        length, kind = size - offset, "flac"
    else:
        shown = head[:5].decode("ascii", "backslashreplace")
        raise ValueError(f"no audio in this entry, which begins with {shown!r}; archives of features hold none")
    if offset + length > size:
        raise ValueError("cut off by the end of its archive")
    return offset, length, kind


def _next_entry(read: Callable[[int, int], bytes], size: int, offset: int) -> int | None:
    """Place of the first entry that begins behind an offset; None where none does."""
    while offset < size:
        if (match := ENTRY.search(read(offset, min(BLOCK, size - offset)))) is not None:
            return offset + match.start()
        offset += BLOCK - LONGEST
    return None
