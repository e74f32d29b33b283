"""Audio in: decode with soundfile, average the channels, resample to 16 kHz. All waveforms are float32 in [-1, 1].

torchaudio is imported here and, for its networks, in models/ssl.py, and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import soundfile
import torch

SAMPLE_RATE = 16_000  # Hz
SLACK = 0.1  # s by which a file may be shorter than its manifest says (rounding, resampling)


class AudioError(Exception):
    """One file that cannot be used; listed as a rejection, never the end of a run."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.reason = reason


@dataclass(frozen=True)
class Decoded:
    """A mono 16 kHz waveform (samples,), and how the file itself was."""

    wave: np.ndarray
    rate: int
    channels: int


def probe(path: str) -> float:
    """Duration of a file (s), from its header.

    Raises:
        AudioError: missing, unreadable or empty.
    """
    try:
        info = soundfile.info(path)
    except (soundfile.LibsndfileError, RuntimeError, OSError) as error:
        raise _unreadable(path, error) from error
    if info.frames <= 0:
        raise AudioError(path, "holds no samples")
    return info.frames / info.samplerate


def decode(path: str, start: float = 0.0, duration: float | None = None) -> Decoded:
    """`duration` seconds (None: all) from `start` seconds of a file, mono at 16 kHz.

    Raises:
        AudioError: missing, unreadable, empty, or with samples that are not finite.
    """
    try:
        with soundfile.SoundFile(path) as file:
            rate, channels = file.samplerate, file.channels
            if start:
                file.seek(min(round(start * rate), file.frames))
            count = -1 if duration is None else round(duration * rate)
            samples = file.read(count, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError, OSError) as error:
        raise _unreadable(path, error) from error
    if len(samples) == 0:
        raise AudioError(path, "holds no samples")
    wave = samples[:, 0] if channels == 1 else samples.mean(axis=1)
    if not np.isfinite(wave).all():
        raise AudioError(path, "holds samples that are not finite (NaN or infinite)")
    return Decoded(resample(wave, rate, SAMPLE_RATE), rate, channels)


def resample(wave: np.ndarray, source: int, target: int) -> np.ndarray:
    """Band-limited (windowed-sinc) resampling of a waveform (samples,) from one rate (Hz) to another."""
    if source == target:
        return wave
    from torchaudio.functional import resample as band_limited

    return band_limited(torch.from_numpy(np.ascontiguousarray(wave)), source, target).numpy()


def change_speed(wave: np.ndarray, speed: float) -> np.ndarray:
    """Play `speed` times faster: pitch and tempo change together, as sox's `speed` does. Factors of 0.01."""
    if speed == 1.0:
        return wave
    ratio = Fraction(round(speed * 100), 100)
    return resample(wave, ratio.numerator, ratio.denominator)


def _unreadable(path: str, error: Exception) -> AudioError:
    if not Path(path).exists():
        return AudioError(path, "no such file")
    if Path(path).stat().st_size == 0:
        return AudioError(path, "empty file")
    return AudioError(path, f"cannot be decoded ({' '.join(str(error).split())})")
