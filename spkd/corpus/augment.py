"""Augmentation by noise, reverberation and transmission, as pure functions of (waveform, seed): views can be repeated.

Random numbers come from numpy's RandomState, whose stream never changes (NEP 19). So the augmentation of a cache can be
repeated under any later numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spkd.cores import usable
from spkd.corpus.audio import AUDIO_SUFFIXES, SAMPLE_RATE, AudioError, decode, exact_length, probe
from spkd.corpus.channel import transmit
from spkd.corpus.settings import AugmentationConfig
from spkd.errors import SpkdError, UsageError
from spkd.files import digest
from spkd.files.atomic import find_files
from spkd.progress import track

SYNTHETIC = "synthetic"
# Versions of the formulas of noise and reverberation, on the cards of caches. Version 1 transforms whole waveforms in
# float64, whatever their length; where that has a large prime factor, it takes 30 times as long. It averages the
# channels of a response, whose direct paths come at different times; version 2 takes the first channel.
VERSIONS = (1, 2)
VERSION = VERSIONS[-1]
BLOCK = 2048  # samples that are convolved at once
# What an impulse response of a room may be: reverberation of the largest halls lasts for 15 s.
LONGEST_RESPONSE, LATEST_DIRECT = 30.0, 1.0  # s
MOST_BEFORE = 0.2  # share of the energy that comes more than SPREAD samples (50 ms) before the largest sample
SPREAD = 800
KEPT_SECONDS = 3600.0  # s: a folder with less audio stays in memory, 64 KB a second


@dataclass(frozen=True)
class AugmentationCard:
    """Description of an augmentation on the card of a cache.

    Attributes:
        noise: digest of the folder of noise; None where no noise is added.
        snr: lowest and highest signal-to-noise ratio (dB).
        rir: digest of the folder of room impulse responses; None where no view is reverberated.
        version: version of the formulas of noise and reverberation; 1 where the views have neither.
    """

    noise: str | None
    noise_prob: float = field(metadata={"low": 0, "high": 1})
    snr: tuple[float, ...]
    rir: str | None
    rir_prob: float = field(metadata={"low": 0, "high": 1})
    coders: tuple[str, ...] = ()
    coder_prob: float = field(default=0.0, metadata={"low": 0, "high": 1})
    version: int = field(default=1, metadata={"low": 1, "high": 1000})

    @property
    def has_versions(self) -> bool:
        """Whether the views have noise or reverberation, whose formulas have versions."""
        return self.noise is not None or self.rir is not None

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON; coders only where some are used, and the version from the second on."""
        tree = asdict(self)
        if not self.coders:
            del tree["coders"], tree["coder_prob"]
        if self.version == 1:
            del tree["version"]
        return tree

    def changes(self, seed: int) -> bool:
        """Whether the view of a seed has reverberation, noise or a coder; `Augmentation` draws the same."""
        reverberate, add, transmit = np.random.RandomState(seed).random_sample(3)
        if (self.rir and reverberate < self.rir_prob) or (self.noise and add < self.noise_prob):
            return True
        return bool(self.coders) and transmit < self.coder_prob


@dataclass(frozen=True)
class Augmentation:
    """Random augmentation of a view.

    Attributes:
        noise: folder of noise, or "synthetic"; None adds no noise.
        snr: lowest and highest signal-to-noise ratio (dB).
        rir: folder of room impulse responses; None reverberates no view.
        coders: names of coders, of which one is drawn; none transmits no view.
        version: version of the formulas of noise and reverberation, one of VERSIONS.
    """

    noise: str | None = None
    noise_prob: float = 0.6
    snr: Sequence[float] = (5.0, 20.0)
    rir: str | None = None
    rir_prob: float = 0.3
    coders: Sequence[str] = ()
    coder_prob: float = 0.5
    version: int = VERSION

    def __post_init__(self) -> None:
        for name in ("noise_prob", "rir_prob", "coder_prob"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise UsageError(f"view.{name}={value}: a probability must be between 0 and 1")
        if len(self.snr) != 2 or self.snr[0] > self.snr[1]:
            raise UsageError(f"view.snr={list(self.snr)}: give the lowest and the highest ratio in dB, e.g. [5,20]")

    @classmethod
    def of(cls, config: AugmentationConfig) -> Augmentation:
        return cls(**{f.name: getattr(config, f.name) for f in fields(AugmentationConfig)})

    @property
    def is_used(self) -> bool:
        """Whether it may change a view."""
        return self.noise is not None or self.rir is not None or bool(self.coders)

    def card(self) -> AugmentationCard:
        """Description for a card: the settings, with digests of the folders instead of their paths."""
        has_versions = bool(self.noise or self.rir)
        return AugmentationCard(
            noise=bank(self.noise).digest if self.noise else None,
            noise_prob=self.noise_prob if self.noise else 0.0,
            snr=tuple(float(ratio) for ratio in self.snr),
            rir=bank(self.rir).digest if self.rir else None,
            rir_prob=self.rir_prob if self.rir else 0.0,
            coders=tuple(self.coders),
            coder_prob=self.coder_prob if self.coders else 0.0,
            version=self.version if has_versions else 1,
        )

    def check(self) -> None:
        """Check the impulse responses before they are drawn. Raises SpkdError: a file is none."""
        if self.rir is not None:
            bank(self.rir).check_responses(self._response_channel)

    @property
    def _response_channel(self) -> int | None:
        """Channel of a response; None averages all of them."""
        return None if self.version == 1 else 0

    def __call__(self, wave: np.ndarray, seed: int) -> np.ndarray:
        """Reverberate, then add noise, then encode and decode a waveform, each with its probability.

        Args:
            wave: (samples,), float32, 16 kHz.
        Returns:
            (samples,), float32.
        """
        if not self.is_used:
            return wave
        random = np.random.RandomState(seed)
        reverberate, add = random.random_sample(2)
        if self.rir is not None and reverberate < self.rir_prob:
            response = bank(self.rir).response(random, self._response_channel)
            wave = convolve_at_once(wave, response) if self.version == 1 else convolve(wave, response)
        if self.noise is not None and add < self.noise_prob:
            decibel = random.uniform(self.snr[0], self.snr[1])
            synthesise = coloured_noise if self.version == 1 else fast_coloured_noise
            noise = bank(self.noise).stretch(random, len(wave), synthesise)
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

    The convolution is partitioned uniformly (Stockham, AFIPS 1966, for both sides): the spectra of overlapping blocks
    of the waveform times those of blocks of the response, in float32.

    Args:
        wave: (samples,), float32.
        response: (taps,) room impulse response.
    Returns:
        (samples,), float32.
    """
    direct = int(np.argmax(np.abs(response)))
    # Spectra of the blocks of both, each with a block before it or zeros after it.
    parts, blocks = -(-len(response) // BLOCK), -(-(direct + len(wave)) // BLOCK)
    padded = torch.zeros((blocks + 1) * BLOCK)
    padded[BLOCK : BLOCK + len(wave)] = torch.from_numpy(wave)
    taps = torch.zeros(parts * BLOCK)
    taps[: len(response)] = torch.from_numpy(np.ascontiguousarray(response, np.float32))
    source = torch.fft.rfft(padded.unfold(0, 2 * BLOCK, BLOCK))  # (blocks, bins)
    filters = torch.fft.rfft(taps.view(parts, BLOCK), 2 * BLOCK)
    # A part reaches the blocks that are as much later as it lies in the response.
    spectrum = source * filters[0]
    for part in range(1, min(parts, blocks)):
        spectrum[part:].addcmul_(source[:-part], filters[part])
    wet = torch.fft.irfft(spectrum, 2 * BLOCK)[:, BLOCK:].reshape(-1).numpy()
    return _with_power_of(wave, wet[direct : direct + len(wave)])


def convolve_at_once(wave: np.ndarray, response: np.ndarray) -> np.ndarray:
    """`convolve` of version 1, by Fourier transforms of the whole waveform."""
    size = len(wave) + len(response) - 1
    wet = np.fft.irfft(np.fft.rfft(wave, size) * np.fft.rfft(response, size), size)
    direct = int(np.argmax(np.abs(response)))
    return _with_power_of(wave, wet[direct : direct + len(wave)])


def _with_power_of(wave: np.ndarray, wet: np.ndarray) -> np.ndarray:
    """(samples,), float32: a waveform with the power of another."""
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


def fast_coloured_noise(random: np.random.RandomState, samples: int) -> np.ndarray:
    """(samples,): `coloured_noise` of version 2: the beginning of noise of a length whose Fourier transform is fast."""
    from scipy.fft import next_fast_len  # here, because the import takes a while

    return coloured_noise(random, next_fast_len(max(samples, 1), real=True))[:samples]


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
            with ThreadPoolExecutor(min(usable(), 8)) as pool:
                for path, content in zip(self.files, pool.map(_content, self.files), strict=True):
                    lines.append(f"{Path(path).relative_to(self.folder)} {content}\n")
                    bar.advance(1)
        return digest.of_bytes("".join(lines).encode())

    def response(self, random: np.random.RandomState, channel: int | None) -> np.ndarray:
        """(samples,): a random file, float32, 16 kHz.

        Args:
            channel: the channel to take; None averages all channels.
        Raises:
            SpkdError: the file cannot be used, or is no impulse response.
        """
        return self._response(self.files[random.randint(len(self.files))], channel)

    def check_responses(self, channel: int | None) -> None:
        """Check all files, of which `response` finds a bad one only once it is drawn. Raises as it does."""
        with track(f"reading {self.folder}", len(self.files), "files") as bar:
            with ThreadPoolExecutor(min(usable(), 8)) as pool:
                for _ in pool.map(lambda path: self._response(path, channel), self.files):
                    bar.advance(1)

    def _response(self, path: str, channel: int | None) -> np.ndarray:
        response = self._whole(path, channel)
        if problem := _no_response(response):
            raise SpkdError(f"augmentation: {path}: no impulse response of a room ({problem})")
        return response

    def stretch(
        self,
        random: np.random.RandomState,
        samples: int,
        synthesise: Callable[[np.random.RandomState, int], np.ndarray],
    ) -> np.ndarray:
        """(samples,): a stretch from a random place of a random file, repeated where the file is shorter.

        Args:
            synthesise: function that gives so many samples of synthetic noise.
        """
        if not self.files:
            return synthesise(random, samples)
        path = self.files[random.randint(len(self.files))]
        length = None if self.is_kept else _exact_length(path)
        if length is None:
            noise = self._whole(path)
            start = random.randint(len(noise))
            first, beginning = noise[start : start + samples], noise
        else:
            start = random.randint(length)
            first = beginning = _decoded(path, start / SAMPLE_RATE, min(samples, length - start) / SAMPLE_RATE)
            if len(first) < samples:
                beginning = _decoded(path, 0.0, min(samples, length) / SAMPLE_RATE)
        missing = samples - len(first)
        return np.concatenate([first, np.resize(beginning, missing)]) if missing else first

    @cached_property
    def is_kept(self) -> bool:
        """Whether all files together are so short that they stay in memory once they are decoded."""
        left = KEPT_SECONDS
        for path in self.files:
            try:
                left -= probe(path)
            except AudioError:  # an error once it is drawn
                return False
            if left < 0:
                return False
        return True

    def _whole(self, path: str, channel: int | None = None) -> np.ndarray:
        """(samples,): a file, which is not to be changed."""
        return _kept(path, channel) if self.is_kept else _decoded(path, channel=channel)


_banks: dict[str, Bank] = {}  # of the process that started this one


def banks(augmentation: Augmentation) -> dict[str, Bank]:
    """The banks of an augmentation by their folders; for a process that is not forked from this one."""
    return {folder: bank(folder) for folder in (augmentation.noise, augmentation.rir) if folder is not None}


def use(banks: dict[str, Bank]) -> None:
    """Take these banks from now on, as the process has them that started this one, whatever the folders hold now."""
    _banks.update(banks)


@lru_cache
def bank(folder: str) -> Bank:
    """The bank of a folder, or of "synthetic". Raises UsageError: no such folder; SpkdError: it holds no audio."""
    if folder in _banks:
        return _banks[folder]
    if folder == SYNTHETIC:
        return Bank(folder, ())
    if not Path(folder).is_dir():
        what = "not a folder" if Path(folder).exists() else "no such folder"
        raise UsageError(f"{folder}: {what}; augmentation takes a folder of audio")
    files, _ = find_files(Path(folder), AUDIO_SUFFIXES)
    if not files:
        raise SpkdError(f"{folder}: no audio files for augmentation")
    return Bank(folder, tuple(map(str, files)))


def _no_response(response: np.ndarray) -> str:
    """Reason for which a waveform (samples,) is no impulse response; "" where it may be one.

    In a response, nothing but noise comes before the direct path, which is the largest sample.
    """
    direct, energy = int(np.argmax(np.abs(response))), float(np.square(response).sum())
    before = float(np.square(response[: max(direct - SPREAD, 0)]).sum())
    if energy == 0.0:
        return "digital silence"
    if len(response) > LONGEST_RESPONSE * SAMPLE_RATE:
        return f"{len(response) / SAMPLE_RATE:.0f} s, longer than {LONGEST_RESPONSE:g} s"
    if direct > LATEST_DIRECT * SAMPLE_RATE:
        return f"its largest sample is {direct / SAMPLE_RATE:.1f} s after its beginning"
    if before > MOST_BEFORE * energy:
        return f"{100 * before / energy:.0f} % of its energy comes before its largest sample"
    return ""


def _content(path: str) -> str:
    """Digest of a file's content."""
    try:
        return digest.of_file(Path(path))
    except OSError as error:
        raise SpkdError(f"augmentation: {path}: {error.strerror or error}") from error


@cache
def _kept(path: str, channel: int | None) -> np.ndarray:
    return _decoded(path, channel=channel)


def _decoded(path: str, start: float = 0.0, duration: float | None = None, channel: int | None = None) -> np.ndarray:
    """(samples,): a stretch of a file; arguments as of `decode`. Raises SpkdError: the file cannot be used."""
    try:
        return decode(path, start, duration, channel).wave
    except AudioError as error:
        raise SpkdError(f"augmentation: {error}") from error


def _exact_length(path: str) -> int | None:
    """`exact_length`; None where the file cannot be opened, which decoding then finds."""
    try:
        return exact_length(path)
    except AudioError:
        return None
