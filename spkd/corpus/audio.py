"""Decoding of audio with soundfile or PyAV, averaging of channels, and resampling to 16 kHz.

All waveforms are float32 in [-1, 1]. A path is that of a file, or an address within a container (see address.py).
"""

from __future__ import annotations

import io
import math
import os
import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any, BinaryIO

import numpy as np
import soundfile
import torch

from spkd.corpus.address import file_of, is_elsewhere, parse, state_of_audio
from spkd.corpus.ffmpeg import FORMATS, MISSING, WARM_UP, FFmpegFile, takes
from spkd.corpus.stored import Memory, in_memory, piecewise, read, size_of
from spkd.corpus.whole import content_to_read, opus_jumps
from spkd.files.reading import State, is_irregular

AUDIO_SUFFIXES = {
    *(".wav", ".wave", ".w64", ".rf64", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".mp2", ".mpga"),
    *(".aiff", ".aif", ".aifc", ".au", ".snd", ".sph", ".nist", ".caf"),
    *FORMATS,
}
# Suffixes of audio that cannot be decoded here: without a header, or in formats that neither library reads.
OTHER_SUFFIXES = {".raw", ".pcm", ".wv1", ".wv2", ".shn", ".spx", ".ape", ".mpc", ".ra", ".rm", ".m4p", ".ac3", ".dts"}
SAMPLE_RATE = 16_000  # Hz
SLACK = 0.1  # s by which a file may be shorter than its manifest says (rounding, resampling)
MAX_SECONDS = 100_000.0  # s of one utterance (28 h); a larger number is a duration in another unit
BLOCK = 1 << 20  # frames decoded at once, since a header may claim more than fits into memory
FULL_SCALE = 16.0  # peak above which float samples are at the scale of integers
PLAUSIBLE = 200  # most frames per byte of a compressed file; if a header claims more, the frames are counted
CLIPPED = "are clipped"  # start of the remark on samples in spite of which a decision is made
CLIPPED_SHARE = 0.02  # share of the samples that is remarked on
RESOLVED = 0.01  # peak below which samples of 16 bits have too few steps to show where they were clipped
# Of the search for the level at which samples were clipped, see `_is_flattened`.
LOWEST = 0.7  # standard deviations above which samples are counted
STEP, BAND = 0.02, 10  # natural logarithm of the ratio of levels that are told apart, and their number in a band
FLATTENED = 1.8  # samples in the band of that level for one in the band below; speech has at most 1.4
FEWEST = 500  # samples in that band
LOOKED_AT = 1 << 15  # most samples that are counted: of longer waveforms, every second, third, ...
LARGEST_KERNEL = 1 << 24  # most numbers in the table of filters; rates without a common factor would need 10^9
EXACT = ("PCM", "FLOAT", "DOUBLE", "ULAW", "ALAW")  # beginnings of libsndfile's names of codings without a memory
ZEROS, ROLLOFF = 6, 0.99  # zero crossings of the sinc on each side, cut-off of the low rate


class AudioError(Exception):
    """A file that cannot be used. It is listed as a rejection, and does not end a run.

    Args:
        reason: the reason, to follow the name of the file.
        state: `state_of` the file that was decoded and found to be unusable; None where it could not be decoded, which
            may be otherwise at the next attempt.
    """

    def __init__(self, path: str, reason: str, state: State | None = None) -> None:
        super().__init__(f"{path}: {reason}")
        self._path, self.reason, self.state = path, reason, state

    def __reduce__(self) -> tuple[Any, ...]:
        return AudioError, (self._path, self.reason, self.state)


@dataclass(frozen=True)
class Decoded:
    """A decoded stretch of a file.

    Attributes:
        wave: (samples,) mono waveform at 16 kHz.
        rate: sampling rate of the file (Hz).
        channels: number of channels of the file.
        remark: what makes speech unlikely in the waveform, in a few words that follow `samples`; "" where nothing does.
    """

    wave: np.ndarray
    rate: int
    channels: int
    state: State | None
    remark: str = ""


def probe(path: str) -> float:
    """Duration of a file (s), from its header; or by decoding, where the header cannot be true.

    Raises:
        AudioError: missing, not a regular file, unreadable or empty.
    """
    with _opened(path, header=True) as file:
        frames, rate = file.frames, file.samplerate
        if frames <= 0 or frames > PLAUSIBLE * size_of(path) or _is_estimate(file):
            try:
                frames = file.count() if isinstance(file, FFmpegFile) else _count(file)
            except (soundfile.LibsndfileError, RuntimeError, OSError) as error:
                raise _unreadable(path, error) from error
    if frames <= 0:
        raise AudioError(path, "holds no samples")
    if frames / rate > MAX_SECONDS:
        raise AudioError(path, f"lasts {frames / rate:.0f} s; longer than {MAX_SECONDS:.0f} s is not supported")
    return frames / rate


def sample_rate(path: str) -> int:
    """Sampling rate of a file (Hz), from its header.

    Raises:
        AudioError: missing, not a regular file, unreadable or empty.
    """
    with _opened(path, header=True) as file:
        return int(file.samplerate)


def channel_count(path: str) -> int:
    """Number of channels of a file, from its header. Raises as `sample_rate`."""
    with _opened(path, header=True) as file:
        return int(file.channels)


def decode(path: str, start: float = 0.0, duration: float | None = None, channel: int | None = None) -> Decoded:
    """Decode a stretch of a file to a mono waveform at 16 kHz.

    Args:
        start: start of the stretch (s).
        duration: length of the stretch (s); None takes everything up to the end.
        channel: the channel to take, counted from 0; None averages all channels.
    Raises:
        AudioError: missing, not a regular file, unreadable, empty, without that channel, or with samples that are not
            finite or far beyond full scale.
    """
    # Read the stretch: (frames, channels).
    state = state_of_audio(path)
    with _opened(path) as file:
        rate, channels = file.samplerate, file.channels
        if channel is not None and channel >= channels:
            raise AudioError(path, f"has {channels} channels; channel {channel} was asked for (counted from 0)", state)
        try:
            if start:
                file.seek(round(start * rate))
            samples = _read(file, None if duration is None else round(duration * rate))
        except (soundfile.LibsndfileError, RuntimeError, OSError, ValueError, OverflowError) as error:
            raise _unreadable(path, error) from error
        except MemoryError as error:
            raise AudioError(path, "does not fit into memory; cut it into shorter utterances") from error
    wave = _one_channel(path, samples, channel, state)
    return Decoded(resample(wave, rate, SAMPLE_RATE), rate, channels, state, remark_on(wave, samples))


def _one_channel(path: str, samples: np.ndarray, channel: int | None, state: State | None) -> np.ndarray:
    """(frames,): a channel, or the mean of all.

    Args:
        samples: (frames, channels).
        channel: as of `decode`.
    Raises:
        AudioError: no samples, or samples that are not finite or far beyond full scale.
    """
    if len(samples) == 0:
        raise AudioError(path, "holds no samples", state)
    one = samples[:, channel or 0] if samples.shape[1] == 1 or channel is not None else samples.mean(axis=1)
    wave = np.ascontiguousarray(one)
    peak = _peak(wave)
    if not math.isfinite(peak):
        raise AudioError(path, "holds samples that are not finite (NaN or infinite)", state)
    if peak > FULL_SCALE:
        raise AudioError(path, f"holds float samples up to {peak:.6g}: at integer scale; divide them by 32768", state)
    return wave


def _peak(wave: np.ndarray) -> float:
    """Greatest magnitude of a waveform; not finite where a sample is not."""
    return max(float(wave.max()), -float(wave.min()))


def _deviation(wave: np.ndarray) -> float:
    """Standard deviation; from the power where the mean is so small that this loses nothing."""
    mean, power = float(wave.mean()), float(np.dot(wave, wave)) / len(wave)
    return math.sqrt(power - mean**2) if mean**2 < 0.1 * power else float(wave.std())


@lru_cache(maxsize=1 << 16)
def exact_length(path: str) -> int | None:
    """Samples of a whole file of which `decode` gives any stretch as it lies in the whole; None where it may not.

    These are files at 16 kHz that libsndfile reads from any sample on as from the first: PCM, floats and FLAC. MP3 and
    Opus are decoded otherwise where a stretch begins, and a stretch is resampled to slightly other numbers.

    Raises:
        AudioError: as of `probe`.
    """
    with _opened(path, header=True) as file:
        if not isinstance(file, soundfile.SoundFile) or not file.subtype.startswith(EXACT):
            return None
        if file.samplerate != SAMPLE_RATE or file.frames < 1:
            return None
        try:  # whether the file is as long as its header says
            file.seek(file.frames - 1)
            is_whole = len(file.read(2, always_2d=True)) == 1
        except (soundfile.LibsndfileError, RuntimeError, OSError):
            return None
        return file.frames if is_whole else None


def remark_on(wave: np.ndarray, samples: np.ndarray) -> str:
    """Remark on a waveform in which speech is unlikely, in a few words that follow `samples`; "" where there is none.

    Args:
        wave: (samples,) one channel, or the mean of all.
        samples: (samples, channels) the channels.
    """
    peak, deviation = _peak(wave), _deviation(wave)
    if samples.shape[1] > 1 and samples.std() > 1e-4 and deviation < 0.05 * float(samples.std()):
        return "hold channels that cancel each other"
    if deviation < 1e-5:
        return "are digital silence"
    if abs(float(wave.mean())) > 3 * deviation:
        return "are mostly a constant offset"
    if peak < RESOLVED:
        return ""
    if float((np.abs(wave) >= 0.999 * peak).mean()) > CLIPPED_SHARE or _is_flattened(wave, deviation):
        return f"{CLIPPED} in more than 2 % of their samples"
    return ""


def _is_flattened(wave: np.ndarray, deviation: float) -> bool:
    """Whether a waveform was clipped at some level before a coder, a resampler or a change of level.

    The magnitudes of speech are the rarer the greater they are. Those that were clipped gather around a level, which
    coders and resamplers blur to a band about it, with some beyond: far more than in the band below, and than beyond.
    The sides are looked at one by one, since an amplifier may clip one of them, and a filter moves both.
    """
    every = math.ceil(len(wave) / LOOKED_AT)
    some, mean = wave[::every], float(wave.mean())
    least = max(CLIPPED_SHARE * len(some), FEWEST / every)
    for side in (some - mean, mean - some):
        loud = side[side > LOWEST * deviation]
        steps = (np.log(loud / (LOWEST * deviation)) / STEP).astype(np.int64)
        below = np.concatenate([[0], np.cumsum(np.bincount(steps)), np.full(BAND, len(loud))])
        within = below[2 * BAND :] - below[BAND:-BAND]
        before, beyond = below[BAND:-BAND] - below[: -2 * BAND], len(loud) - below[2 * BAND :]
        if ((within > least) & (within >= beyond) & (within > FLATTENED * before)).any():
            return True
    return False


class _Sequential(soundfile.SoundFile):
    """A sound file that is read block by block to its real end.

    Where soundfile may seek, it trusts the length in the header, and fails at the end of a FLAC file whose header is
    wrong.
    """

    def __init__(self, file: bytes | BinaryIO | Memory) -> None:
        """
        Args:
            file: path of a file, an open one, or one in memory, which is released with it.
        """
        self._memory = file if isinstance(file, Memory) else None
        try:
            super().__init__(file if self._memory is None else self._memory.descriptor, closefd=False)
        except BaseException:
            self._release()
            raise
        if self.format == "OGG" and self.subtype == "OPUS":
            # Where times begin late, as after a cut, what the coder puts before the audio is left out by this alone.
            super().seek(0)

    def close(self) -> None:
        super().close()
        self._release()

    def _release(self) -> None:
        memory, self._memory = self._memory, None
        if memory is not None:
            memory.release()

    def seekable(self) -> bool:
        return False

    def seek(self, frames: int, whence: int = soundfile.SEEK_SET) -> int:
        """Go to a frame of a file of which nothing was read; to the end, where the frame lies beyond it."""
        frames = min(frames, self.frames)
        if not super().seekable():  # GSM 6.10, G.721 and other codings with a memory
            left = frames
            while left > 0 and (count := len(self.read(min(left, BLOCK), dtype="float32", always_2d=True))):
                left -= count
            return frames - left
        if not self.subtype.startswith("MPEG"):
            return super().seek(frames, whence)
        # Small frames of MP3 lean on more frames before them than libsndfile reads.
        before = super().seek(max(frames - round(WARM_UP * self.samplerate), 0))
        self.read(frames - before)
        return frames


class _Joined:
    """Sound files read one after the other as one, with soundfile's interface.

    Attributes:
        frames: number of frames of all.
    Raises:
        ValueError: their sampling rates or numbers of channels differ.
    """

    def __init__(self, contents: list[bytes]) -> None:
        self._files = [_Sequential(io.BytesIO(content)) for content in contents]
        self.samplerate, self.channels = self._files[0].samplerate, self._files[0].channels
        if any((f.samplerate, f.channels) != (self.samplerate, self.channels) for f in self._files):
            raise ValueError("its sampling rate or number of channels changes within the file; convert it first")
        self.frames = sum(file.frames for file in self._files)

    def __enter__(self) -> _Joined:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()

    def seek(self, frame: int) -> None:
        """Go forwards to a frame; to the end, where the frame lies beyond it."""
        while len(self._files) > 1 and frame >= self._files[0].frames:
            frame -= self._files[0].frames
            self._files.pop(0).close()
        self._files[0].seek(frame)

    def read(self, frames: int, dtype: str = "float32", always_2d: bool = True) -> np.ndarray:
        """Read the next frames: (frames, channels), fewer at the end."""
        blocks, left = [np.empty((0, self.channels), np.float32)], frames
        while left > 0 and self._files:
            blocks.append(self._files[0].read(left, dtype="float32", always_2d=True))
            left -= len(blocks[-1])
            if left and len(self._files) > 1:
                self._files.pop(0).close()
            elif left:
                break
        return np.concatenate(blocks)


def _opened(path: str, header: bool = False) -> soundfile.SoundFile | FFmpegFile | _Joined:
    """Open a sound file.

    Args:
        header: whether little more than its header is needed, so that it is not read from its container as a whole.
    Raises:
        AudioError: missing, unreadable, or not a regular file, since reading a fifo or a device may never end.
    """
    holder = file_of(path)
    if not is_elsewhere(holder):
        if is_irregular(holder):
            raise AudioError(path, "not a regular file")
        if not os.path.isfile(holder):
            raise AudioError(path, "no such file")
    try:
        if takes(path):
            return FFmpegFile(path)
        file = _Sequential(_readable(path, header))
        if (file.format, file.subtype) == ("OGG", "OPUS") and opus_jumps(path, state_of_audio(path)):
            file.close()
            return FFmpegFile(path, "ogg")
        if (contents := content_to_read(path, file.format, file.frames)) is None:
            return file
        file.close()
        return _Joined(contents)
    except (soundfile.LibsndfileError, RuntimeError, OSError, ValueError, TypeError) as error:
        raise _unreadable(path, error) from error


def _readable(path: str, header: bool) -> bytes | BinaryIO | Memory:
    """What soundfile opens: the path of a file; for audio in a container, a file in memory, or one of its range."""
    if (address := parse(path)) is None:
        return os.fsencode(path)
    if (file := piecewise(address, header)) is not None:
        return file
    memory = in_memory(data := read(address))
    return io.BytesIO(data) if memory is None else memory


def _read(file: soundfile.SoundFile | FFmpegFile | _Joined, frames: int | None) -> np.ndarray:
    """Read frames, as many as the file really has.

    Args:
        frames: most frames to read; None reads all.
    Returns:
        (frames, channels), float32.
    """
    blocks, left = [], math.inf if frames is None else frames
    while left > 0:
        block = file.read(int(min(left, BLOCK)), dtype="float32", always_2d=True)
        blocks.append(block)
        left -= len(block)
        if len(block) < min(left + len(block), BLOCK):
            break
    return np.concatenate(blocks) if len(blocks) != 1 else blocks[0]


def _is_estimate(file: soundfile.SoundFile | FFmpegFile | _Joined) -> bool:
    """Whether libsndfile finds the number of frames by the rate of bytes: MP3 in WAV."""
    return isinstance(file, soundfile.SoundFile) and file.format != "MP3" and file.subtype.startswith("MPEG")


def _count(file: soundfile.SoundFile | FFmpegFile | _Joined) -> int:
    """Number of frames that can be decoded."""
    total = 0
    while count := len(file.read(BLOCK, dtype="float32", always_2d=True)):
        total += count
    return total


def resample(wave: np.ndarray, source: int, target: int) -> np.ndarray:
    """Resample a waveform by a windowed sinc, which is band-limited.

    A table holds one filter for each phase. Rates without a large common factor would need too large a table; for
    these, the same filters are computed when they are needed.

    Args:
        wave: (samples,), float32.
        source: sampling rate of the waveform (Hz).
        target: sampling rate of the result (Hz).
    Returns:
        (ceil(samples * target / source),), float32.
    """
    if source == target:
        return wave
    common = math.gcd(source, target)
    if source // common * (target // common) > LARGEST_KERNEL:
        return _resample_directly(wave, source // common, target // common)
    source, target = source // common, target // common
    filters, reach = _filters(source, target)
    padded = torch.nn.functional.pad(torch.from_numpy(np.ascontiguousarray(wave))[None], (reach, reach + source))
    phases = torch.nn.functional.conv1d(padded[:, None], filters, stride=source)
    return phases.transpose(1, 2).reshape(-1)[: math.ceil(target * len(wave) / source)].numpy()


@lru_cache(maxsize=64)
def _filters(source: int, target: int) -> tuple[torch.Tensor, int]:
    """Filters of a resampling, one for each phase.

    They are those of torchaudio.functional.resample (sinc_interp_hann), in the same precision, so that the result is
    equal to the bit.

    Args:
        source: sampling rate of the waveform, divided by the common factor of both rates.
        target: sampling rate of the result, divided by the common factor of both rates.
    Returns:
        (target, 1, taps) the filters, and the number of samples that each reaches back.
    """
    cutoff = min(source, target) * ROLLOFF
    reach = math.ceil(ZEROS * source / cutoff)
    taps = torch.arange(-reach, reach + source, dtype=torch.float32)[None, None] / source
    time = torch.arange(0, -target, -1, dtype=torch.float32)[:, None, None] / target + taps
    time = (time * cutoff).clamp(-ZEROS, ZEROS)
    window = torch.cos(time * math.pi / ZEROS / 2) ** 2
    time = time * math.pi
    return torch.where(time == 0, torch.tensor(1.0), time.sin() / time) * (window * (cutoff / source)), reach


def _resample_directly(wave: np.ndarray, source: int, target: int) -> np.ndarray:
    """`resample` without a table of filters.

    Output sample n is sum_k x_k h(k / source - n / target), with h the sinc at the cut-off frequency under a Hann
    window of 2 * ZEROS zero crossings (torchaudio.functional.resample, sinc_interp_hann).
    """
    cutoff = min(source, target) * ROLLOFF
    reach = math.ceil(ZEROS * source / cutoff)
    count, taps = math.ceil(target * len(wave) / source), np.arange(-reach, reach + 2)
    padded = np.concatenate([np.zeros(reach, np.float64), wave, np.zeros(reach + 2, np.float64)])
    out = np.empty(count, np.float32)
    for first in range(0, count, BLOCK // 16):
        n = np.arange(first, min(first + BLOCK // 16, count))
        centre = n * source // target
        # Time of each tap in zero crossings; the exact remainder keeps the phase of long files.
        t = (taps[None, :] - (n * source % target / target)[:, None]) * (cutoff / source)
        t = t.clip(-ZEROS, ZEROS)
        filters = np.sinc(t) * np.cos(np.pi * t / ZEROS / 2) ** 2 * (cutoff / source)
        index = (centre[:, None] + taps[None, :] + reach).clip(0, len(padded) - 1)
        out[n] = (padded[index] * filters).sum(1)
    return out


def change_speed(wave: np.ndarray, speed: float) -> np.ndarray:
    """Make a waveform faster, so that pitch and tempo change together, as sox's `speed` does.

    Args:
        wave: (samples,), float32.
        speed: factor, rounded to 0.01.
    Returns:
        (samples / speed,), float32.
    """
    if speed == 1.0:
        return wave
    ratio = Fraction(round(speed * 100), 100)
    return resample(wave, ratio.numerator, ratio.denominator)


def _unreadable(path: str, error: Exception) -> AudioError:
    try:
        if size_of(path) == 0:
            return AudioError(path, "empty file")
    except (OSError, ValueError):  # then the error is that of reading it
        pass
    if str(error) == MISSING:
        return AudioError(path, MISSING)
    # soundfile shows bytes as Python does, with a path that is named already.
    reason = re.sub(r"^Error opening b(['\"]).*\1: ", "", " ".join(str(error).split()))
    return AudioError(path, f"cannot be decoded ({reason})")
