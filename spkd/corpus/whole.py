"""Files of which libsndfile reads only a part, as their header does not tell how long they are.

These are MP3 without a count of its frames (of which libsndfile estimates the length by the first), or with one of
fewer than there are; Ogg streams one after the other; WAV, RF64 and AU whose writer never came back to fill in the
size.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache

from spkd.corpus.address import state_of_audio
from spkd.corpus.stored import content
from spkd.files.reading import State

BITRATES = {  # kbit/s by MPEG version (1; 2 and 2.5) and layer, for the indices 1 to 14 of a frame header
    (1, 1): range(32, 449, 32),
    (1, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (1, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (2, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (2, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
RATES = (44_100, 48_000, 32_000)  # Hz, of MPEG 1
DELAY = 529  # samples by which an MP3 decoder is late, which mpg123 adds to the delay in a LAME tag
OPUS_RATE = 48_000  # Hz, of the times of Ogg Opus (RFC 7845)
JUMP = 0.15  # s by which times in Ogg Opus exceed its packets where they jump; a packet lasts 0.12 s or less
SLACK = 2048  # bytes that may follow the frames that a Xing header counts: the last frame, an ID3v1 tag


def content_to_read(path: str, form: str, frames: int) -> list[bytes] | None:
    """What to give to libsndfile in place of a file, so that it reads all of it; None where it reads the file whole.

    Args:
        form: libsndfile's name of the format.
        frames: frames (samples of each channel) that libsndfile finds.
    Returns:
        The content of files to be read one after the other.
    Raises:
        ValueError: the sampling rate or the number of channels changes within the file, or it is too large.
    """
    if form == "MP3":
        return _mp3(path, frames)
    if form == "OGG":
        return _ogg(path)
    if form in ("WAV", "WAVEX", "RF64") and frames == 0:
        return _wav(content(path))
    if form == "AU" and frames == 0:
        return _au(content(path))
    return None


# MP3: ISO/IEC 11172-3 and 13818-3; the Xing header and its LAME tag as mpg123 and FFmpeg read them.


@lru_cache(maxsize=1 << 16)
def _frame(second: int, third: int) -> tuple[int, int, int] | None:
    """Length (bytes), samples and sampling rate of a frame, from bytes 2 and 3 of its header; None for no header."""
    version, layer = {3: 1, 2: 2, 0: 4}.get(second >> 3 & 3), 4 - (second >> 1 & 3)
    index, rate = third >> 4, third >> 2 & 3
    if second < 0xE0 or version is None or layer == 4 or index in (0, 15) or rate == 3:
        return None
    hertz = RATES[rate] // version
    bits = 1000 * BITRATES[min(version, 2), layer if version == 1 else min(layer, 2)][index - 1]
    if layer == 1:
        return (12 * bits // hertz + (third >> 1 & 1)) * 4, 384, hertz
    samples = 576 if layer == 3 and version > 1 else 1152
    return samples // 8 * bits // hertz + (third >> 1 & 1), samples, hertz


# Those headers, found in stretches that are no frames without a step of Python for each of their bytes.
HEADER = re.compile(
    b"\xff["
    + b"".join(re.escape(bytes([second])) for second in range(256) if _frame(second, 0x10))
    + b"]["
    + b"".join(re.escape(bytes([third])) for third in range(256) if _frame(0xFB, third))
    + b"]"
)


def _at(data: bytes, place: int) -> tuple[int, int, int] | None:
    if place + 4 > len(data) or not HEADER.match(data, place):
        return None
    return _frame(data[place + 1], data[place + 2])


def _frames(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Place, length (bytes), samples and sampling rate of each whole frame.

    What lies between frames (tags, a damaged stretch) is skipped.
    """
    place, rate = 0, 0  # Hz, of the frame before; 0: there is none
    while place + 4 <= len(data):
        frame = _at(data, place)
        if frame is not None and frame[2] != rate:
            # A header is one for certain where another follows its frame.
            after = place + frame[0]
            following = _at(data, after)
            frame = frame if after == len(data) or (following is not None and following[2] == frame[2]) else None
        if frame is None:
            rate, tag = 0, data[place : place + 10]
            if tag[:3] == b"ID3" and len(tag) == 10:
                place += 10 + sum((byte & 0x7F) << 7 * (3 - i) for i, byte in enumerate(tag[6:]))
            elif (header := HEADER.search(data, place + 1)) is None:
                return
            else:
                place = header.start()
            continue
        if place + frame[0] > len(data):
            return
        yield place, *frame
        place, rate = place + frame[0], frame[2]


def _mp3(path: str, frames: int) -> list[bytes] | None:
    if (header := _xing(path, state_of_audio(path), frames)) is None:
        return None
    tag, first, end = header
    return [tag + content(path)[first:end]]


@lru_cache(maxsize=4096)
def _xing(path: str, state: State | None, frames: int) -> tuple[bytes, int, int] | None:
    """Xing header with the number of frames of an MP3 file, and where the frames begin and end that are to follow it.

    mpg123 leaves out the first samples by the LAME tag. The delay there is such that it leaves out a silent frame in
    front of the file's own, and what the file's own tag says.

    Args:
        state: state of the file; it is read once.
        frames: as of `content_to_read`.
    Returns:
        None where mpg123 reads the whole file, or where the file ends before its own header says.
    """
    data = content(path)
    found = next(_frames(data), None)
    if found is None or data[found[0] + 1] >> 1 & 3 != 1:  # layer 3
        return None
    first, _, samples, rate = found
    _, second, third, fourth = data[first : first + 4]
    mono, version_1 = fourth >> 6 == 3, second >> 3 & 3 == 3
    side = bytes((17 if mono else 32) if version_1 else (9 if mono else 17))
    # What the file's own header says.
    at = first + 4 + len(side)
    own, counted, own_delay = data[at : at + 4] in (b"Xing", b"Info"), 0, 0
    if own:
        flags, at = int.from_bytes(data[at + 4 : at + 8], "big"), at + 8
        if flags & 1:
            counted, at = int.from_bytes(data[at : at + 4], "big"), at + 4
        if flags & 2:
            size, at = int.from_bytes(data[at : at + 4], "big"), at + 4
            if counted and first + size + SLACK >= len(data):
                return None
        at += 100 * (flags >> 2 & 1) + 4 * (flags >> 3 & 1)
        if data[at : at + 1].strip(b"\0"):
            own_delay = DELAY + (int.from_bytes(data[at + 21 : at + 24], "big") >> 12)
    # How many frames there are.
    places, end = list[int](), 0
    for place, length, _, hertz in _frames(data):
        if hertz != rate or (data[place + 3] >> 6 == 3) != mono:
            raise ValueError("its sampling rate or number of channels changes within the file; convert it first")
        places.append(place)
        end = place + length
    count = len(places) - (own or data[first + 36 : first + 40] == b"VBRI")
    if (count <= counted) if counted else (count * samples == frames):
        return None
    # A header that says so, in the largest frame of this kind, and the silent frame.
    start = bytes([0xFF, second | 1, 14 << 4 | third & 12, fourth])
    length = (_frame(start[1], start[2]) or (0,))[0]
    delay = (samples - DELAY + own_delay) << 12 | DELAY
    tag = side + b"Info" + (1).to_bytes(4, "big") + (count + 1).to_bytes(4, "big") + b"LAME3.100"
    tag += bytes(12) + delay.to_bytes(3, "big")
    return (start + tag).ljust(length, b"\0") + start.ljust(length, b"\0"), places[len(places) - count], end


# Ogg (RFC 3533), WAV, RF64 (EBU Tech 3306) and AU.


def _ogg(path: str) -> list[bytes] | None:
    """The streams that follow one another in an Ogg file; None where there is one."""
    begins = _streams(path, state_of_audio(path))
    if len(begins) == 1:
        return None
    data = content(path)
    return [data[first:last] for first, last in zip(begins, [*begins[1:], len(data)], strict=True)]


@lru_cache(maxsize=4096)
def _streams(path: str, state: State | None) -> list[int]:
    """Place of the beginning of each stream of an Ogg file; `state` is its state, so that it is read once."""
    data = content(path)
    begins, in_header = [0], True
    for place, _ in _pages(data):
        if (is_first := bool(data[place + 5] & 2)) and not in_header:
            begins.append(place)
        in_header = is_first
    return begins


def _pages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Place of each page of an Ogg file, and the sizes of its segments."""
    place = 0
    while (place := data.find(b"OggS", place)) >= 0 and place + 27 <= len(data):
        segments = data[place + 27 : place + 27 + data[place + 26]]
        yield place, segments
        place += 27 + len(segments) + sum(segments)


@lru_cache(maxsize=4096)
def opus_jumps(path: str, state: State | None) -> bool:
    """Whether times jump within a stream of Ogg Opus: libsndfile leaves no silence there, but seeks by time.

    Args:
        state: state of the file; it is read once.
    """
    data = content(path)
    before, lasts, begins = -1, 0, True  # time at the end of the page before, samples since, whether a packet begins
    for place, segments in _pages(data):
        time = int.from_bytes(
            data[place + 6 : place + 14], "little", signed=True
        )  # samples at 48 kHz; -1: no packet ends
        at = place + 27 + len(segments)
        for size in segments:
            lasts += _opus_samples(data[at : at + 2]) if begins else 0
            at, begins = at + size, size < 255
        if time < 0:
            continue
        if before > 0 and time - before > lasts + JUMP * OPUS_RATE:
            return True
        # Of a packet that goes on in the next page, the samples are counted here already.
        before, lasts = (-1 if data[place + 5] & 2 else time), 0
    return False


def _opus_samples(begin: bytes) -> int:
    """Samples at 48 kHz of an Opus packet with these first bytes (RFC 6716, 3.1 and 3.2)."""
    if not begin:
        return 0
    mode, code = begin[0] >> 3, begin[0] & 3
    if mode < 12:
        length = (480, 960, 1920, 2880)[mode & 3]
    else:
        length = (480, 960)[mode & 1] if mode < 16 else (120, 240, 480, 960)[mode & 3]
    return length * ((1, 2, 2)[code] if code < 3 else (begin[1] & 63 if len(begin) > 1 else 0))


def _wav(data: bytes) -> list[bytes] | None:
    """A WAV file whose samples reach to its end, where its header says that it has none; None where it has none."""
    chunks = dict(_chunks(data, 12))
    at = chunks.get(b"data")
    if data[:4] == b"RF64" and b"ds64" in chunks:  # the sizes are in that chunk
        ds64 = chunks[b"ds64"]
        data = b"RIFF" + data[4:ds64] + b"JUNK" + data[ds64 + 4 :]
        if at is not None:
            data = data[: at + 4] + bytes(4) + data[at + 8 :]
    if at is None or data[at + 4 : at + 8] != bytes(4):
        return None
    after = at + 8
    for name, place in _chunks(data, after):
        if not name.strip().isalnum():
            break
        after = place + 8 + int.from_bytes(data[place + 4 : place + 8], "little")
    # Nothing but further chunks follows in a file without samples.
    return None if after + after % 2 == len(data) + len(data) % 2 else [data[: at + 4] + b"\xff" * 4 + data[at + 8 :]]


def _au(data: bytes) -> list[bytes] | None:
    """An AU file whose samples reach to its end, where its header says that it has none; None where it has none."""
    begin = int.from_bytes(data[4:8], "big" if data[:4] == b".snd" else "little")
    return None if len(data) <= begin or data[8:12] != bytes(4) else [data[:8] + b"\xff" * 4 + data[12:]]


def _chunks(data: bytes, place: int) -> Iterator[tuple[bytes, int]]:
    """Name and place of each chunk of a WAV file from a place on."""
    while place + 8 <= len(data):
        yield data[place : place + 4], place
        size = int.from_bytes(data[place + 4 : place + 8], "little")
        place += 8 + size + size % 2
