"""Augmentation by noise, reverberation and transmission, as pure functions of (waveform, seed): views can be repeated.

Random numbers come from numpy's RandomState, whose stream never changes (NEP 19). So the augmentation of a cache can be
repeated under any later numpy.
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
    """Description of an augmentation on the card of a cache.

    Attributes:
        noise: digest of the folder of noise; None where no noise is added.
        noise_prob: probability of noise.
        snr: lowest and highest signal-to-noise ratio (dB).
        rir: digest of the folder of room impulse responses; None where no view is reverberated.
        rir_prob: probability of reverberation.
        coders: names of the coders.
        coder_prob: probability of transmission.
    """

    noise: str | None
    noise_prob: float = field(metadata={"low": 0, "high": 1})
    snr: tuple[float, ...]
    rir: str | None
    rir_prob: float = field(metadata={"low": 0, "high": 1})
    coders: tuple[str, ...] = ()
    coder_prob: float = field(default=0.0, metadata={"low": 0, "high": 1})

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON; coders only where some are used."""
        tree = asdict(self)
        if not self.coders:
            del tree["coders"], tree["coder_prob"]
        return tree


@dataclass(frozen=True)
class Augmentation:
    """Random augmentation of a view.

    Attributes:
        noise: folder of noise, or "synthetic"; None adds no noise.
        noise_prob: probability of noise.
        snr: lowest and highest signal-to-noise ratio (dB).
        rir: folder of room impulse responses; None reverberates no view.
        rir_prob: probability of reverberation.
        coders: names of coders, of which one is drawn; none transmits no view.
        coder_prob: probability of transmission.
    """

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
        """Description for a card: the settings, with digests of the folders instead of their paths."""
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
        """Reverberate, then add noise, then encode and decode a waveform, each with its probability.

        Args:
            wave: (samples,), float32, 16 kHz.
            seed: seed of all random decisions.
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
    """Add noise to a waveform.

    Args:
        wave: (samples,), float32.
        noise: (samples,), scaled to the signal-to-noise ratio.
        snr: signal-to-noise ratio (dB), of mean powers.
    Returns:
        (samples,), float32.
    """
    signal_power, noise_power = float(np.mean(wave**2)), float(np.mean(noise**2))
    if noise_power == 0.0 or signal_power == 0.0:
        return wave
    gain = np.sqrt(signal_power / noise_power * 10.0 ** (-snr / 10.0))
    return (wave + gain * noise).astype(np.float32)


def convolve(wave: np.ndarray, response: np.ndarray) -> np.ndarray:
    """Reverberate a waveform. The direct path keeps its time, and the waveform its power.

    Args:
        wave: (samples,), float32.
        response: (taps,) room impulse response.
    Returns:
        (samples,), float32.
    """
    size = len(wave) + len(response) - 1
    wet = np.fft.irfft(np.fft.rfft(wave, size) * np.fft.rfft(response, size), size)
    direct = int(np.argmax(np.abs(response)))
    wet = wet[direct : direct + len(wave)]
    power = float(np.mean(wet**2))
    gain = np.sqrt(float(np.mean(wave**2)) / power) if power > 0.0 else 0.0
    return (gain * wet).astype(np.float32)


def coloured_noise(random: np.random.RandomState, samples: int) -> np.ndarray:
    """(samples,): Gaussian noise of unit power with spectrum 1/f^a, where a is uniform in [0, 2] (white to brown)."""
    slope = random.uniform(0.0, 2.0)
    spectrum = np.fft.rfft(random.standard_normal(samples))
    spectrum /= np.maximum(np.arange(len(spectrum)), 1.0) ** (slope / 2.0)
    spectrum[0] = 0.0
    noise = np.fft.irfft(spectrum, samples)
    return noise / max(float(np.sqrt(np.mean(noise**2))), 1e-12)


@dataclass(frozen=True)
class Bank:
    """Audio files of a folder, in a fixed order; or the generator of synthetic noise.

    Attributes:
        folder: the folder, or "synthetic".
        files: paths of the files; none for synthetic noise.
    """

    folder: str
    files: tuple[str, ...]

    @cached_property
    def digest(self) -> str:
        """Digest of names and content of all files. Every file is read once in a process (MUSAN: 11 GB).

        Raises:
            SpkdError: a file cannot be read.
        """
        if not self.files:
            return SYNTHETIC
        lines = []
        with track(f"reading {self.folder} for its digest", len(self.files), "files") as bar:
            with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
                for path, content in zip(self.files, pool.map(_content, self.files), strict=True):
                    lines.append(f"{Path(path).relative_to(self.folder)} {content}\n")
                    bar.advance(1)
        return digest.of_bytes("".join(lines).encode())

    def pick(self, random: np.random.RandomState) -> np.ndarray:
        """(samples,): a random file, float32, 16 kHz."""
        return _load(self.files[random.randint(len(self.files))])

    def stretch(self, random: np.random.RandomState, samples: int) -> np.ndarray:
        """(samples,): a stretch from a random place of a random file, repeated where the file is shorter."""
        if not self.files:
            return coloured_noise(random, samples)
        noise = self.pick(random)
        start = random.randint(len(noise))
        return np.take(noise, np.arange(start, start + samples), mode="wrap")


@lru_cache
def bank(folder: str) -> Bank:
    """The bank of a folder, or of "synthetic".

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
    """Digest of a file's content.

    Raises:
        SpkdError: it cannot be read.
    """
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
