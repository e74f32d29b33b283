"""Decoding of audio with soundfile or PyAV, averaging of channels, and resampling to 16 kHz.

All waveforms are float32 in [-1, 1].
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile
import torch

from spkd.corpus.ffmpeg import FORMATS, MISSING, FFmpegFile, takes

AUDIO_SUFFIXES = {".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".au", ".sph", *FORMATS}
SAMPLE_RATE = 16_000  # Hz
SLACK = 0.1  # s by which a file may be shorter than its manifest says (rounding, resampling)
MAX_SECONDS = 100_000.0  # s of one utterance (28 h); a larger number is a duration in another unit
BLOCK = 1 << 20  # frames decoded at once, since a header may claim more than fits into memory
FULL_SCALE = 16.0  # peak above which float samples are at the scale of integers
PLAUSIBLE = 200  # most frames per byte of a compressed file; if a header claims more, the frames are counted
LARGEST_KERNEL = 1 << 24  # most numbers in the table of filters; rates without a common factor would need 10^9
ZEROS, ROLLOFF = 6, 0.99  # zero crossings of the sinc on each side, cut-off of the low rate


class AudioError(Exception):
    """A file that cannot be used. It is listed as a rejection, and does not end a run.

    Args:
        path: the file.
        reason: the reason, to follow the name of the file.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.reason = reason


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
    remark: str = ""


def probe(path: str) -> float:
    """Duration of a file (s), from its header; or by decoding, where the header cannot be true.

    Raises:
        AudioError: missing, not a regular file, unreadable or empty.
    """
    with _opened(path) as file:
        frames, rate = file.frames, file.samplerate
        if frames <= 0 or frames > PLAUSIBLE * os.stat(path).st_size:
            try:
                frames = _count(file)
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
    with _opened(path) as file:
        return int(file.samplerate)


def decode(path: str, start: float = 0.0, duration: float | None = None, channel: int | None = None) -> Decoded:
    """Decode a stretch of a file to a mono waveform at 16 kHz.

    Args:
        path: the file.
        start: start of the stretch (s).
        duration: length of the stretch (s); None takes everything up to the end.
        channel: the channel to take, counted from 0; None averages all channels.
    Raises:
        AudioError: missing, not a regular file, unreadable, empty, without that channel, or with samples that are not
            finite or far beyond full scale.
    """
    # Read the stretch: (frames, channels).
    with _opened(path) as file:
        rate, channels = file.samplerate, file.channels
        if channel is not None and channel >= channels:
            raise AudioError(path, f"has {channels} channels; channel {channel} was asked for (counted from 0)")
        try:
            if start:
                file.seek(round(start * rate))
            samples = _read(file, None if duration is None else round(duration * rate))
        except (soundfile.LibsndfileError, RuntimeError, OSError, ValueError, OverflowError) as error:
            raise _unreadable(path, error) from error
        except MemoryError as error:
            raise AudioError(path, "does not fit into memory; cut it into shorter utterances") from error
    # Take a channel or the mean of all, and check the samples.
    if len(samples) == 0:
        raise AudioError(path, "holds no samples")
    wave = samples[:, channel or 0] if channels == 1 or channel is not None else samples.mean(axis=1)
    if not np.isfinite(wave).all():
        raise AudioError(path, "holds samples that are not finite (NaN or infinite)")
    if (peak := float(np.abs(wave).max())) > FULL_SCALE:
        raise AudioError(path, f"holds float samples up to {peak:.6g}: at integer scale; divide them by 32768")
    wave = np.ascontiguousarray(wave)
    return Decoded(resample(wave, rate, SAMPLE_RATE), rate, channels, remark_on(wave, samples))


def remark_on(wave: np.ndarray, samples: np.ndarray) -> str:
    """Remark on a waveform in which speech is unlikely, in a few words that follow `samples`; "" where there is none.

    Args:
        wave: (samples,) one channel, or the mean of all.
        samples: (samples, channels) the channels.
    """
    peak, deviation = float(np.abs(wave).max()), float(wave.std())
    if samples.shape[1] > 1 and samples.std() > 1e-4 and deviation < 0.05 * float(samples.std()):
        return "hold channels that cancel each other"
    if deviation < 1e-5:
        return "are digital silence"
    if abs(float(wave.mean())) > 3 * deviation:
        return "are mostly a constant offset"
    if peak >= 0.99 and float((np.abs(wave) >= 0.999 * peak).mean()) > 0.02:
        return "are clipped in more than 2 % of their samples"
    return ""


class _Sequential(soundfile.SoundFile):
    """A sound file that is read block by block to its real end.

    Where soundfile may seek, it trusts the length in the header, and fails at the end of a FLAC file whose header is
    wrong.
    """

    def seekable(self) -> bool:
        return False

    def seek(self, frames: int, whence: int = soundfile.SEEK_SET) -> int:
        """Go to a frame; to the end of the file, where the frame lies beyond it."""
        return super().seek(min(frames, self.frames), whence)


def _opened(path: str) -> soundfile.SoundFile | FFmpegFile:
    """Open a sound file.

    Raises:
        AudioError: missing, unreadable, or not a regular file, since reading a fifo or a device may never end.
    """
    if not Path(path).exists():
        raise AudioError(path, "no such file")
    if not Path(path).is_file():
        raise AudioError(path, "not a regular file")
    try:
        return FFmpegFile(path) if takes(path) else _Sequential(os.fsencode(path))
    except (soundfile.LibsndfileError, RuntimeError, OSError, ValueError, TypeError) as error:
        raise _unreadable(path, error) from error


def _read(file: soundfile.SoundFile | FFmpegFile, frames: int | None) -> np.ndarray:
    """Read frames, as many as the file really has.

    Args:
        file: the open file.
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


def _count(file: soundfile.SoundFile | FFmpegFile) -> int:
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
    if Path(path).stat().st_size == 0:
        return AudioError(path, "empty file")
    if str(error) == MISSING:
        return AudioError(path, MISSING)
    return AudioError(path, f"cannot be decoded ({' '.join(str(error).split())})")
