"""Noise, reverberation and transmission as functions of (waveform, seed) alone, so that a view can be repeated exactly.

Random numbers come from numpy's RandomState, whose stream is frozen for good (NEP 19): a cache written today
is reproduced with the same augmentation under any later numpy.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from spkd.corpus.audio import AUDIO_SUFFIXES, AudioError, decode
from spkd.corpus.channel import transmit
from spkd.errors import SpkdError, UsageError
from spkd.files import digest
from spkd.files.atomic import find_files
from spkd.progress import track

SYNTHETIC = "synthetic"


@dataclass(frozen=True)
class AugmentationCard:
    """An augmentation as a cache's card describes it; `noise` and `rir` are digests of their folders' content."""

    noise: str | None
    noise_prob: float = field(metadata={"low": 0, "high": 1})
    snr: tuple[float, ...]
    rir: str | None
    rir_prob: float = field(metadata={"low": 0, "high": 1})
    coders: tuple[str, ...] = ()
    coder_prob: float = field(default=0.0, metadata={"low": 0, "high": 1})

    def to_json(self) -> dict[str, Any]:
        """Without what is not used and came later: cards that are older keep their fingerprint."""
        tree = asdict(self)
        if not self.coders:
            del tree["coders"], tree["coder_prob"]
        return tree


@dataclass(frozen=True)
class Augmentation:
    """What may be done to a view. `noise` and `rir` are folders; noise may also be "synthetic"."""

    noise: str | None = None
    noise_prob: float = 0.6
    snr: Sequence[float] = (5.0, 20.0)
    rir: str | None = None
    rir_prob: float = 0.3
    coders: Sequence[str] = ()
    coder_prob: float = 0.5

    def __post_init__(self) -> None:
        for name in ("noise_prob", "rir_prob", "coder_prob"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise UsageError(f"view.{name}={value}: a probability must be between 0 and 1")
        if len(self.snr) != 2 or self.snr[0] > self.snr[1]:
            raise UsageError(f"view.snr={list(self.snr)}: give the lowest and the highest ratio in dB, e.g. [5,20]")

    def card(self) -> AugmentationCard:
        """What a colleague needs to reproduce it: settings, and digests of the folders instead of their paths."""
        return AugmentationCard(
            noise=bank(self.noise).digest if self.noise else None,
            noise_prob=self.noise_prob if self.noise else 0.0,
            snr=tuple(float(ratio) for ratio in self.snr),
            rir=bank(self.rir).digest if self.rir else None,
            rir_prob=self.rir_prob if self.rir else 0.0,
            coders=tuple(self.coders),
            coder_prob=self.coder_prob if self.coders else 0.0,
        )

    def __call__(self, wave: np.ndarray, seed: int) -> np.ndarray:
        """Reverberate, then add noise, then send through a coder, each with its probability, as `seed` decides.

        Args:
            wave: (samples,), float32, 16 kHz.
        Returns:
            (samples,), float32.
        """
        if self.noise is None and self.rir is None and not self.coders:
            return wave
        random = np.random.RandomState(seed)
        reverberate, add = random.random_sample(2)
        if self.rir is not None and reverberate < self.rir_prob:
            wave = convolve(wave, bank(self.rir).pick(random))
        if self.noise is not None and add < self.noise_prob:
            decibel = random.uniform(self.snr[0], self.snr[1])
            noise = bank(self.noise).stretch(random, len(wave))
            wave = mix(wave, noise, decibel)
        if self.coders and random.random_sample() < self.coder_prob:
            wave = transmit(wave, self.coders[random.randint(len(self.coders))])
        return wave


def mix(wave: np.ndarray, noise: np.ndarray, snr: float) -> np.ndarray:
    """wave + noise scaled to a signal-to-noise ratio of `snr` dB (of mean powers); both (samples,)."""
    signal_power, noise_power = float(np.mean(wave**2)), float(np.mean(noise**2))
    if noise_power == 0.0 or signal_power == 0.0:
        return wave
    gain = np.sqrt(signal_power / noise_power * 10.0 ** (-snr / 10.0))
    return (wave + gain * noise).astype(np.float32)


def convolve(wave: np.ndarray, response: np.ndarray) -> np.ndarray:
    """Reverberate (samples,) by a room impulse response (taps,), direct path in place, power kept."""
    size = len(wave) + len(response) - 1
    wet = np.fft.irfft(np.fft.rfft(wave, size) * np.fft.rfft(response, size), size)
    direct = int(np.argmax(np.abs(response)))
    wet = wet[direct : direct + len(wave)]
    power = float(np.mean(wet**2))
    gain = np.sqrt(float(np.mean(wave**2)) / power) if power > 0.0 else 0.0
    return (gain * wet).astype(np.float32)


def coloured_noise(random: np.random.RandomState, samples: int) -> np.ndarray:
    """Gaussian noise with spectrum 1/f^a, a uniform in [0, 2] (white to brown): (samples,), unit power."""
    slope = random.uniform(0.0, 2.0)
    spectrum = np.fft.rfft(random.standard_normal(samples))
    spectrum /= np.maximum(np.arange(len(spectrum)), 1.0) ** (slope / 2.0)
    spectrum[0] = 0.0
    noise = np.fft.irfft(spectrum, samples)
    return noise / max(float(np.sqrt(np.mean(noise**2))), 1e-12)


@dataclass(frozen=True)
class Bank:
    """The audio files of one folder, in a fixed order, or the generator of synthetic noise."""

    folder: str
    files: tuple[str, ...]

    @cached_property
    def digest(self) -> str:
        """Over the names and the content of all files; every file is read once in a process (MUSAN: 11 GB).

        Raises:
            SpkdError: a file that cannot be read.
        """
        if not self.files:
            return SYNTHETIC
        found = []
        with track(f"reading {self.folder} for its digest", len(self.files), "files") as bar:
            with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
                for path, content in zip(self.files, pool.map(_content, self.files), strict=True):
                    found.append(f"{Path(path).relative_to(self.folder)} {content}\n")
                    bar.advance(1)
        return digest.of_bytes("".join(found).encode())

    def pick(self, random: np.random.RandomState) -> np.ndarray:
        return _load(self.files[random.randint(len(self.files))])

    def stretch(self, random: np.random.RandomState, samples: int) -> np.ndarray:
        """`samples` samples from a random place of a random file, repeated where the file is shorter."""
        if not self.files:
            return coloured_noise(random, samples)
        noise = self.pick(random)
        start = random.randint(len(noise))
        return np.take(noise, np.arange(start, start + samples), mode="wrap")


@lru_cache
def bank(folder: str) -> Bank:
    """The audio of a folder (or "synthetic").

    Raises:
        SpkdError: the folder holds no audio.
    """
    if folder == SYNTHETIC:
        return Bank(folder, ())
    files, _ = find_files(Path(folder), AUDIO_SUFFIXES)
    if not files:
        raise SpkdError(f"{folder}: no audio files for augmentation")
    return Bank(folder, tuple(map(str, files)))


def _content(path: str) -> str:
    """The digest of a file's content."""
    try:
        return digest.of_file(Path(path))
    except OSError as error:
        raise SpkdError(f"augmentation: {path}: {error.strerror or error}") from error


@lru_cache(maxsize=256)
def _load(path: str) -> np.ndarray:
    try:
        return decode(path).wave
    except AudioError as error:
        raise SpkdError(f"augmentation: {error}") from error
