"""Audio in: decode with soundfile or PyAV, average the channels, resample to 16 kHz. All waveforms are float32 in
[-1, 1]."""

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
MAX_SECONDS = 100_000.0  # of one utterance: 28 h; more is a duration in another unit
BLOCK = 1 << 20  # frames decoded at once: a header may promise more than there is memory for
FULL_SCALE = 16.0  # peak above which float samples are at the scale of integers
PLAUSIBLE = 200  # frames that one byte of a compressed file may stand for; a header with more is counted again
LARGEST_KERNEL = 1 << 24  # numbers in the table of filters; rates without a common factor would need 10^9
ZEROS, ROLLOFF = 6, 0.99  # zero crossings of the sinc on each side, cut-off of the low rate


class AudioError(Exception):
    """One file that cannot be used; listed as a rejection, never the end of a run."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.reason = reason


@dataclass(frozen=True)
class Decoded:
    """A mono 16 kHz waveform.

    Attributes:
        wave: (samples,).
        rate: of the file (Hz).
        channels: of the file.
        doubt: why it may be unusable although it can be decoded, in a few words; "" where nothing is odd.
    """

    wave: np.ndarray
    rate: int
    channels: int
    doubt: str = ""


def probe(path: str) -> float:
    """Duration of a file (s): from its header, or by decoding where the header cannot be true.

    Raises:
        AudioError: missing, no regular file, unreadable or empty.
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
        AudioError: missing, no regular file, unreadable or empty.
    """
    with _opened(path) as file:
        return int(file.samplerate)


def decode(path: str, start: float = 0.0, duration: float | None = None, channel: int | None = None) -> Decoded:
    """`duration` seconds (None: all) from `start` seconds of a file, mono at 16 kHz.

    Args:
        channel: the only one to take, counted from 0; None averages all.
    Raises:
        AudioError: missing, no regular file, unreadable, empty, without that channel, or with samples that are not
            finite or far beyond full scale.
    """
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
    if len(samples) == 0:
        raise AudioError(path, "holds no samples")
    wave = samples[:, channel or 0] if channels == 1 or channel is not None else samples.mean(axis=1)
    if not np.isfinite(wave).all():
        raise AudioError(path, "holds samples that are not finite (NaN or infinite)")
    if (peak := float(np.abs(wave).max())) > FULL_SCALE:
        raise AudioError(path, f"holds float samples up to {peak:.6g}: at integer scale; divide them by 32768")
    wave = np.ascontiguousarray(wave)
    return Decoded(resample(wave, rate, SAMPLE_RATE), rate, channels, doubt_of(wave, samples))


def doubt_of(wave: np.ndarray, samples: np.ndarray) -> str:
    """What makes speech unlikely in a waveform (samples,), the mean of (samples, channels)."""
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
    """A sound file that is read block by block to its real end. Where soundfile may seek it trusts the header's length,
    and fails at the end of a FLAC file whose header is wrong."""

    def seekable(self) -> bool:
        return False

    def seek(self, frames: int, whence: int = soundfile.SEEK_SET) -> int:
        """Beyond the end is at the end."""
        return super().seek(min(frames, self.frames), whence)


def _opened(path: str) -> soundfile.SoundFile | FFmpegFile:
    """An open sound file. A fifo or a device is refused: reading one may never end."""
    if not Path(path).exists():
        raise AudioError(path, "no such file")
    if not Path(path).is_file():
        raise AudioError(path, "not a regular file")
    try:
        return FFmpegFile(path) if takes(path) else _Sequential(os.fsencode(path))
    except (soundfile.LibsndfileError, RuntimeError, OSError, ValueError, TypeError) as error:
        raise _unreadable(path, error) from error


def _read(file: soundfile.SoundFile | FFmpegFile, frames: int | None) -> np.ndarray:
    """(frames, channels), float32: as many as there are, whatever the header says."""
    blocks, left = [], math.inf if frames is None else frames
    while left > 0:
        block = file.read(int(min(left, BLOCK)), dtype="float32", always_2d=True)
        blocks.append(block)
        left -= len(block)
        if len(block) < min(left + len(block), BLOCK):
            break
    return np.concatenate(blocks) if len(blocks) != 1 else blocks[0]


def _count(file: soundfile.SoundFile | FFmpegFile) -> int:
    """Frames that can be decoded."""
    total = 0
    while count := len(file.read(BLOCK, dtype="float32", always_2d=True)):
        total += count
    return total


def resample(wave: np.ndarray, source: int, target: int) -> np.ndarray:
    """Band-limited (windowed-sinc) resampling of a waveform (samples,) from one rate (Hz) to another.

    One filter is tabulated for each phase, which rates without a large common factor make impossible; there the same
    filters are computed as they are needed.
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
    """A filter for each of `target` phases, (target, 1, taps), and how many samples each reaches back.

    torchaudio.functional.resample's own (sinc_interp_hann), in its precision: views stay the same to the bit.
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
    """The same, each output sample from its own filter: sum_k x_k h(k / source - n / target), h the sinc at `cutoff`
    under a Hann window of 2 * ZEROS zero crossings (torchaudio.functional.resample, sinc_interp_hann)."""
    cutoff = min(source, target) * ROLLOFF
    reach = math.ceil(ZEROS * source / cutoff)
    count, taps = math.ceil(target * len(wave) / source), np.arange(-reach, reach + 2)
    padded = np.concatenate([np.zeros(reach, np.float64), wave, np.zeros(reach + 2, np.float64)])
    out = np.empty(count, np.float32)
    for first in range(0, count, BLOCK // 16):
        n = np.arange(first, min(first + BLOCK // 16, count))
        centre = n * source // target
        # In units of the zero crossings; the exact remainder keeps the phase of long files.
        t = (taps[None, :] - (n * source % target / target)[:, None]) * (cutoff / source)
        t = t.clip(-ZEROS, ZEROS)
        filters = np.sinc(t) * np.cos(np.pi * t / ZEROS / 2) ** 2 * (cutoff / source)
        at = (centre[:, None] + taps[None, :] + reach).clip(0, len(padded) - 1)
        out[n] = (padded[at] * filters).sum(1)
    return out


def change_speed(wave: np.ndarray, speed: float) -> np.ndarray:
    """Make a waveform `speed` times faster: pitch and tempo change together, as sox's `speed` does. Factors of 0.01."""
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
