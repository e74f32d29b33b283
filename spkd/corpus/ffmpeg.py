"""Decoding of formats that libsndfile lacks (m4a, AAC, WMA, AMR, WebM, VOC) by PyAV, with soundfile's interface."""

from __future__ import annotations

import io
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from spkd.corpus.address import parse, suffix_of
from spkd.corpus.stored import Memory, in_memory, read

if TYPE_CHECKING:
    from av import AudioFrame

# The container of each kind of file. It is given to FFmpeg, so that no file is read as a playlist of other files.
FORMATS = {
    **dict.fromkeys((".m4a", ".mp4", ".m4b", ".m4v", ".mov", ".3gp", ".3g2"), "mp4"),
    **dict.fromkeys((".webm", ".mkv", ".mka"), "matroska"),
    **dict.fromkeys((".amr", ".awb"), "amr"),
    ".aac": "aac",
    ".wma": "asf",
    ".avi": "avi",
    ".flv": "flv",
    ".wv": "wv",
    ".tta": "tta",
    ".voc": "voc",  # libsndfile takes the headers of its blocks for samples
}
LENGTHS = ("mp4", "wv", "tta")  # containers whose header tells how long the audio is from its first sample on
RAW = (".aac", ".amr", ".awb")  # packets alone: FFmpeg estimates their length by the first ones
MISSING = "needs PyAV to be decoded: pip install 'spkd[codecs]'"
FAR = 60.0  # s: a later start is sought in the file; up to an earlier one, everything is decoded and dropped
JUMP = 0.05  # s by which times differ from the samples before them where they jump; below, they are imprecise
LONGEST_JUMP = 100_000.0  # s; a longer one is an error in the file
BLOCK = 1 << 20  # frames of silence that are given at once
WARM_UP = 2.0  # s decoded before a start that was sought, since codecs need the audio before it


class FFmpegFile:
    """An open file, which is read forwards.

    Its frames are numbered by the times in the file, from the first one on: where times jump (a recording that was
    paused, packets that were lost), there is silence, so that a frame is where players and `ffmpeg -ss` find it. Where
    times go back, frames are counted on.

    Attributes:
        samplerate: sampling rate of its first audio stream (Hz).
        channels: number of channels of that stream.
        frames: number of frames in its header; 0 where it has none.
    Raises:
        RuntimeError: PyAV is missing, or the file cannot be read.
    """

    def __init__(self, path: str, container: str | None = None) -> None:
        """
        Args:
            container: FFmpeg's name of the container; None: by the suffix.
        """
        try:
            import av
        except ImportError as error:
            raise RuntimeError(MISSING) from error
        self._av = av
        self._memory: Memory | None = None
        try:
            container = container or FORMATS[suffix_of(path)]
            self._file = av.open(self._readable(path), format=container, options={"protocol_whitelist": "file"})
        except (av.FFmpegError, ValueError, OSError) as error:
            self._release()
            raise RuntimeError(str(error)) from error
        if not self._file.streams.audio:
            self.close()
            raise RuntimeError("holds no audio")
        self._stream = self._file.streams.audio[0]
        self.samplerate, self.channels = int(self._stream.rate or 0), int(self._stream.codec_context.channels)
        if not self.samplerate or not self.channels:
            self.close()
            raise RuntimeError("says neither rate nor channels")
        length, base = self._stream.duration, self._stream.time_base
        self._raw = suffix_of(path) in RAW
        known = container in LENGTHS and length is not None and base is not None
        self.frames = round(float(length * base) * self.samplerate) if known else 0
        self._origin: float | None = None  # time of the first frame (s); None: not known yet
        self._next: int | None = 0  # number of the frame that is decoded next; None: not known after a search
        self._blocks = self._decoded()
        self._left = np.empty((0, self.channels), np.float32)

    def __enter__(self) -> FFmpegFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()
        self._release()

    def _readable(self, path: str) -> str | io.BytesIO:
        """What PyAV opens. Audio of a container becomes a file in memory, so that FFmpeg finds its size, and seeks."""
        if (address := parse(path)) is None:
            return path
        self._memory = in_memory(data := read(address))
        return io.BytesIO(data) if self._memory is None else f"/proc/self/fd/{self._memory.descriptor}"

    def _release(self) -> None:
        memory, self._memory = self._memory, None
        if memory is not None:
            memory.release()

    def seek(self, frame: int) -> None:
        """Go forwards to a frame.

        Args:
            frame: number of the frame, from the first one of the stream, which may begin late.
        Raises:
            RuntimeError: the file cannot be read there.
        """
        base = self._stream.time_base
        # Where times are rounded to milliseconds (Matroska, WMA), a place that was sought is not known to the sample.
        if frame < FAR * self.samplerate or base * self.samplerate > 1:
            self._drop(frame)
            return
        try:
            left = next(self._blocks)
            if self._origin is None:  # a stream without times
                self._left = left
                self._drop(frame)
                return
            self._file.seek(int((self._origin + frame / self.samplerate - WARM_UP) / base), stream=self._stream)
            self._next, self._blocks = None, self._decoded()
            self._left = next(self._blocks)
        except (self._av.FFmpegError, StopIteration) as error:
            raise RuntimeError(f"cannot be read from {frame / self.samplerate:.0f} s on") from error
        first = (self._next or 0) - len(self._left)
        if first > frame:
            raise RuntimeError(f"cannot be read from {frame / self.samplerate:.0f} s on")
        self._drop(frame - first)

    def count(self) -> int:
        """Number of frames, found by reading the whole file; raw packets are not decoded.

        Raises:
            RuntimeError: the file is damaged.
        """
        if not self._raw:
            return sum(map(len, self._blocks))
        try:
            seconds = sum(p.duration * p.time_base for p in self._file.demux(self._stream) if p.size)
        except (self._av.FFmpegError, ValueError, OSError) as error:
            raise RuntimeError(str(error)) from error
        return round(seconds * self.samplerate)

    def read(self, frames: int, dtype: str = "float32", always_2d: bool = True) -> np.ndarray:
        """Read the next frames.

        Args:
            dtype: as of soundfile; always float32.
            always_2d: as of soundfile; always true.
        Returns:
            (frames, channels), float32; fewer frames at the end of the file.
        Raises:
            RuntimeError: the file is damaged.
        """
        blocks, count = [self._left], len(self._left)
        while count < frames and (block := next(self._blocks, None)) is not None:
            blocks.append(block)
            count += len(block)
        whole = np.concatenate(blocks)
        self._left = whole[frames:]
        return whole[:frames]

    def _drop(self, frames: int) -> None:
        while frames > 0 and len(dropped := self.read(min(frames, 1 << 20))):
            frames -= len(dropped)

    def _decoded(self) -> Iterator[np.ndarray]:
        """Blocks of samples (frames, channels), float32, by their times; `_next` becomes the number after each."""
        planar = self._av.AudioResampler(format="fltp")
        try:
            for frame in self._file.decode(self._stream):
                yield from self._silence_before(frame)
                if self._next is None:
                    continue
                for block in planar.resample(frame):
                    samples = np.ascontiguousarray(block.to_ndarray().T)
                    self._next += len(samples)
                    yield samples
        except (self._av.FFmpegError, ValueError, OSError) as error:
            raise RuntimeError(str(error)) from error

    def _silence_before(self, frame: AudioFrame) -> Iterator[np.ndarray]:
        """Blocks of silence between the last frame and one whose time is later. After a search, `_next` is found."""
        if frame.pts is None or frame.time_base is None:
            return
        time = float(frame.pts * frame.time_base)
        if self._origin is None:
            self._origin = time - (self._next or 0) / self.samplerate
        place = round((time - self._origin) * self.samplerate)
        if self._next is None:
            self._next = place
        jump = place - self._next
        if jump > LONGEST_JUMP * self.samplerate:
            raise RuntimeError(f"its times jump by {jump / self.samplerate:.0f} s")
        if jump < -JUMP * self.samplerate:
            self._origin = time - self._next / self.samplerate
        if jump > JUMP * self.samplerate:
            for _ in range(0, jump, BLOCK):
                count = min(BLOCK, place - self._next)
                self._next += count
                yield np.zeros((count, self.channels), np.float32)


def takes(path: str) -> bool:
    """Whether this module decodes a file, by its suffix."""
    return suffix_of(path) in FORMATS
