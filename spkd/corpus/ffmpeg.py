"""Decoding of formats that libsndfile lacks (m4a, mp4, AAC, WMA, AMR, WebM) by PyAV, with soundfile's interface."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np

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
}
RAW = (".aac", ".amr", ".awb")  # packets alone: FFmpeg estimates their length by the first ones
MISSING = "needs PyAV to be decoded: pip install 'spkd[codecs]'"
FAR = 60.0  # s: a later start is sought in the file; up to an earlier one, everything is decoded and dropped
WARM_UP = 2.0  # s decoded before a start that was sought, since codecs need the audio before it


class FFmpegFile:
    """An open file, which is read forwards.

    Attributes:
        samplerate: sampling rate of its first audio stream (Hz).
        channels: number of channels of that stream.
        frames: number of frames in its header; 0 where it has none.
    Raises:
        RuntimeError: PyAV is missing, or the file cannot be read.
    """

    def __init__(self, path: str) -> None:
        try:
            import av
        except ImportError as error:
            raise RuntimeError(MISSING) from error
        self._av = av
        try:
            self._file = av.open(
                path, format=FORMATS[Path(path).suffix.lower()], options={"protocol_whitelist": "file"}
            )
        except (av.FFmpegError, ValueError, OSError) as error:
            raise RuntimeError(str(error)) from error
        if not self._file.streams.audio:
            self._file.close()
            raise RuntimeError("holds no audio")
        self._stream = self._file.streams.audio[0]
        self.samplerate, self.channels = int(self._stream.rate or 0), int(self._stream.codec_context.channels)
        if not self.samplerate or not self.channels:
            self._file.close()
            raise RuntimeError("says neither rate nor channels")
        length, base = self._stream.duration, self._stream.time_base
        self._raw = Path(path).suffix.lower() in RAW
        known = not self._raw and length is not None and base is not None
        self.frames = round(float(length * base) * self.samplerate) if known else 0
        self._at, self._blocks = 0, self._decoded()
        self._left = np.empty((0, self.channels), np.float32)

    def __enter__(self) -> FFmpegFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def seek(self, frame: int) -> None:
        """Go forwards to a frame.

        Args:
            frame: number of the frame, counted from the first one of the stream, which may begin late.
        Raises:
            RuntimeError: the file cannot be read there.
        """
        base = self._stream.time_base
        # Where times are rounded to milliseconds (Matroska, WMA), a place that was sought is not known to the sample.
        if frame < FAR * self.samplerate or base * self.samplerate > 1:
            self._drop(frame)
            return
        try:
            next(self._blocks)
            frame += self._at
            self._file.seek(int((frame / self.samplerate - WARM_UP) / base), stream=self._stream)
            self._blocks = self._decoded()
            first = next(self._blocks)
        except (self._av.FFmpegError, StopIteration) as error:
            raise RuntimeError(f"cannot be read from {frame / self.samplerate:.0f} s on") from error
        self._left = first
        self._drop(max(frame - self._at, 0))

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
        """Blocks of samples (frames, channels), float32; `_at` becomes the number of their first frame."""
        planar = self._av.AudioResampler(format="fltp")
        begun = False
        try:
            for frame in self._file.decode(self._stream):
                if not begun:
                    begun, self._at = True, round(float((frame.pts or 0) * (frame.time_base or 0)) * self.samplerate)
                for block in planar.resample(frame):
                    yield np.ascontiguousarray(block.to_ndarray().T)
        except (self._av.FFmpegError, ValueError, OSError) as error:
            raise RuntimeError(str(error)) from error


def takes(path: str) -> bool:
    """Whether this module decodes a file, by its suffix."""
    return Path(path).suffix.lower() in FORMATS
