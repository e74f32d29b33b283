"""A small source-filter synthesiser of speech (after Fant, "Acoustic theory of speech production", 1960).

The source is a pulse train with the speaker's pitch, jitter, spectral tilt and breath. The filter has the formants of a
phone, scaled by the speaker's vocal-tract length, and a fixed spectral colour of the speaker. It is applied frame by
frame in the short-time spectrum. Speakers differ in all of these; utterances differ in phones, tempo, melody and noise.

The result is similar enough to speech that speakers can be told apart. Error rates on it say nothing about accuracy on
human speech.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spkd.corpus.audio import SAMPLE_RATE
from spkd.corpus.augment import coloured_noise, mix

FFT, HOP = 512, 128  # samples: 32 ms, 8 ms
BINS_HZ = np.fft.rfftfreq(FFT, 1 / SAMPLE_RATE)

# First to fourth formant (Hz) of vowels and nasals for an average adult (Peterson and Barney 1952, rounded).
VOICED = np.array(
    [
        [730, 1090, 2440, 3400],
        [270, 2290, 3010, 3700],
        [300, 870, 2240, 3300],
        [530, 1840, 2480, 3500],
        [570, 840, 2410, 3300],
        [440, 1020, 2240, 3300],
        [660, 1720, 2410, 3500],
        [490, 1350, 1690, 3200],
        [280, 1100, 2300, 3200],
        [250, 1500, 2500, 3400],
    ],
    float,
)
# Centre and width (Hz) of the noise of fricatives.
UNVOICED = np.array([[5500, 2200], [3300, 1500], [4300, 4000], [1800, 1200]], float)


@dataclass(frozen=True)
class Speaker:
    """Constant properties of a speaker.

    Attributes:
        pitch: median pitch (Hz).
        melody: standard deviation of the pitch (semitones).
        tract: length of the vocal tract relative to the average, by which formants are divided.
        tilt: fall of the source's spectrum above 100 Hz (dB per octave).
        breath: level of the noise in voiced sounds.
        jitter: relative jitter of the pitch.
        width: factor of the bandwidths of formants.
        colour: (bins,) gain of the spectrum (dB).
    """

    pitch: float
    melody: float
    tract: float
    tilt: float
    breath: float
    jitter: float
    width: float
    colour: np.ndarray


def speaker(seed: int) -> Speaker:
    """A random speaker."""
    random = np.random.RandomState(seed)
    colour = np.zeros(len(BINS_HZ))
    for _ in range(4):
        centre, width = random.uniform(300, 7000), random.uniform(200, 1200)
        colour += random.normal(0, 5.0) * np.exp(-0.5 * ((BINS_HZ - centre) / width) ** 2)
    return Speaker(
        pitch=float(np.exp(random.uniform(np.log(85), np.log(250)))),
        melody=random.uniform(0.8, 3.0),
        tract=random.uniform(0.84, 1.16),
        tilt=random.uniform(-3.0, 6.0),
        breath=10 ** random.uniform(-2.0, -0.7),
        jitter=random.uniform(0.002, 0.02),
        width=random.uniform(0.7, 1.5),
        colour=colour,
    )


def utterance(voice: Speaker, seed: int, seconds: float) -> np.ndarray:
    """A random sequence of phones, with random tempo, melody, noise and level. Returns (samples,), float32, 16 kHz."""
    random = np.random.RandomState(seed)
    samples = round(seconds * SAMPLE_RATE)
    frames = samples // HOP + FFT // HOP
    envelope, voicing, loudness = _phones(voice, random, frames)
    source = _source(voice, random, frames * HOP, voicing)
    window = np.hanning(FFT)
    # Overlapping windows of the source, each filtered by its frame's envelope.
    padded = np.concatenate([np.zeros(FFT // 2), source, np.zeros(FFT)])
    index = np.arange(frames)[:, None] * HOP + np.arange(FFT)
    spoken = np.fft.irfft(np.fft.rfft(padded[index] * window) * envelope * loudness[:, None], FFT) * window
    wave = np.zeros(frames * HOP + FFT)
    np.add.at(wave, index, spoken)
    wave = wave[FFT : FFT + samples]
    wave = (wave / max(float(np.abs(wave).max()), 1e-9)).astype(np.float32)
    noisy = mix(wave, coloured_noise(random, samples).astype(np.float32), random.uniform(12.0, 30.0))
    return (noisy * random.uniform(0.1, 0.5)).astype(np.float32)


def _phones(voice: Speaker, random: np.random.RandomState, frames: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Filter of a random sequence of phones.

    Returns:
        (frames, bins) magnitude of the filter, (frames,) voicing from 0 to 1, and (frames,) loudness.
    """
    # Draw phone after phone: a voiced one, a fricative or silence.
    tempo = random.uniform(0.75, 1.35)
    formants, noise_band = np.empty((frames, 4)), np.empty((frames, 2))
    voicing, loudness = np.empty(frames), np.empty(frames)
    first = 0
    current = VOICED[0]
    while first < frames:
        kind = random.random_sample()
        length = max(2, int(random.uniform(0.05, 0.16) / tempo * SAMPLE_RATE / HOP))
        phone = slice(first, min(first + length, frames))
        if kind < 0.68:
            current = VOICED[random.randint(len(VOICED))] * random.normal(1.0, 0.03, 4)
            voicing[phone], loudness[phone] = 1.0, random.uniform(0.6, 1.0)
        elif kind < 0.9:
            voicing[phone], loudness[phone] = 0.0, random.uniform(0.15, 0.35)
        else:
            voicing[phone], loudness[phone] = 0.5, 0.01
        formants[phone], noise_band[phone] = current, UNVOICED[random.randint(len(UNVOICED))]
        first += length
    # Smooth the transitions, and compute the spectrum of voiced and unvoiced sound.
    formants = _smooth(formants, 5) / voice.tract
    voicing, loudness = _smooth(voicing[:, None], 3)[:, 0], _smooth(loudness[:, None], 3)[:, 0]
    widths = voice.width * (50.0 + 0.04 * formants)
    resonance = 1.0 / (1.0 + ((BINS_HZ[None, None] - formants[..., None]) / widths[..., None]) ** 2)
    spoken = resonance.sum(1) + 0.01
    octaves = np.log2(np.maximum(BINS_HZ, 100.0) / 100.0)
    spoken *= 10 ** (-voice.tilt * octaves / 20.0)
    centre, width = noise_band[:, :1] / voice.tract**0.5, noise_band[:, 1:]
    hiss = np.exp(-0.5 * ((BINS_HZ - centre) / width) ** 2)
    envelope = voicing[:, None] * spoken + (1.0 - voicing[:, None]) * hiss
    return envelope * 10 ** (voice.colour / 20.0), voicing, loudness


def _source(voice: Speaker, random: np.random.RandomState, samples: int, voicing: np.ndarray) -> np.ndarray:
    """Source of the synthesis: glottal pulses in voiced frames, and breath in all.

    Args:
        voicing: (frames,) voicing from 0 to 1.
    Returns:
        (samples,).
    """
    knots = max(samples // 3200, 2)  # a new melody target every 0.2 s
    melody = np.interp(np.arange(samples), np.linspace(0, samples, knots), random.normal(0, voice.melody, knots))
    wobble = np.repeat(random.normal(0, voice.jitter, samples // 80 + 1), 80)[:samples]
    pitch = voice.pitch * 2 ** (melody / 12.0) * (1.0 + wobble)
    phase = np.cumsum(pitch / SAMPLE_RATE)
    pulses = np.diff(np.floor(phase), prepend=0.0) * np.sqrt(SAMPLE_RATE / pitch)
    voiced = np.repeat(voicing, HOP)[:samples]
    noise = random.standard_normal(samples)
    return voiced * pulses + (1.0 - voiced + voice.breath) * noise


def _smooth(track: np.ndarray, width: int) -> np.ndarray:
    """Moving average over frames.

    Args:
        track: (frames, n) the values.
        width: number of frames of the average, odd.
    Returns:
        (frames, n).
    """
    kernel = np.ones(width) / width
    padded = np.pad(track, ((width // 2, width // 2), (0, 0)), mode="edge")
    return np.stack([np.convolve(column, kernel, "valid") for column in padded.T], 1)
