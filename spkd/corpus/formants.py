"""Shift of formants without a change of pitch, as by another vocal tract with the same glottal source."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch

from spkd.corpus.audio import SAMPLE_RATE

VERSION = 3  # version of the formula, on the cards of caches; raised with every change of its output
FRAME, HOP = 512, 256  # samples at 16 kHz: 32 and 16 ms
HOP_2 = 128  # hop of version 2
BINS = FRAME // 2 + 1
ORDER = 0.65  # cepstral coefficients of the envelope, in periods of the pitch
ROUNDS, ROUNDS_2 = 2, 3  # iterations of the envelope's estimation, and those of version 2
LARGEST_GAIN = 3.0  # nepers (26 dB)
FLOOR = 1e-5  # least magnitude, where full scale is about 100
PITCHES = (70.0, 450.0)  # Hz: range in which the pitch is searched
USUAL_PITCH = 200.0  # Hz: pitch that is assumed where no frame is voiced
PITCH_HOP = 4  # frames between two in which version 2 searches the pitch; version 3 takes every fourth, too
VOICED = 0.5  # least height of the peak of a voiced frame's autocorrelation
AUDIBLE = 0.03  # least power of a voiced frame, as a share of the power of the loudest frames
LAG_COST = 8e-4  # reduction of the autocorrelation for each sample of lag, so that one period wins over two


def shift_formants(wave: np.ndarray, factor: float, version: int = VERSION) -> np.ndarray:
    """Move the spectral envelope of a waveform along the frequency axis: formants at f move to factor * f.

    Each frame is filtered by E(f / factor) / E(f) in the short-time Fourier transform, where E is its envelope.
    Harmonics and noise keep their frequencies and phases, so that there are no artefacts of a vocoder. A change of
    speed by s moves pitch and formants by s. Together with it, pitch moves by s and formants by s * factor,
    independently of each other.

    E is the true envelope (Röbel and Rodet, "Efficient spectral envelope estimation", DAFx 2005): a few iterations fit
    a cepstrum with a limited number of coefficients to the upper edge of the log spectrum. Harmonics sample the
    envelope, so that the number of coefficients must grow with the period of the pitch. With too few, the first formant
    of a low voice is smoothed away. With half a period, which is the paper's bound, the first formants of high voices
    do not move. With the number used here, Praat measures the factor in both (benchmarks/formants.py).

    Version 3 takes half as many frames as version 2, estimates the envelope in every second of them and at every second
    frequency, where it takes the greatest of three neighbours, and takes only maxima of the autocorrelation for
    pitches.

    Args:
        wave: (samples,), float32, 16 kHz.
        factor: factor of the formants; above 1 gives a shorter vocal tract.
        version: version of the formula, one of FORMULAS.
    Returns:
        (samples,), float32, with the power of the input.
    """
    if factor == 1.0 or len(wave) == 0:
        return wave
    return FORMULAS[version](np.ascontiguousarray(wave, np.float32), factor)


def _by_version_3(wave: np.ndarray, factor: float) -> np.ndarray:
    """`shift_formants` of version 3."""
    # Spectra of an even number of frames, of which every second gives an envelope.
    window, synthesis_window = _windows()
    frames = -(-len(wave) // HOP) + 1
    frames += frames % 2
    padded = torch.zeros((frames + 1) * HOP)
    padded[HOP : HOP + len(wave)] = torch.from_numpy(wave)
    spectrum = torch.fft.rfft(padded.unfold(0, FRAME, HOP) * window)  # (frames, bins)
    some = spectrum[::2].numpy()
    power = some.real**2 + some.imag**2
    order = min(round(ORDER * SAMPLE_RATE / _pitch_by_maxima(power[::2])), BINS // 2)
    # Cepstrum of the envelope (frames / 2, order), from every second bin, as high as the bins on both sides of it.
    coarse = np.maximum(power[:, ::2], FLOOR**2)
    np.maximum(coarse[:, 1:], power[:, 1::2], out=coarse[:, 1:])
    np.maximum(coarse[:, :-1], power[:, 1::2], out=coarse[:, :-1])
    level = torch.from_numpy(coarse).log_().mul_(0.5)
    analysis, synthesis = _cosines(order, BINS // 2 + 1)
    cepstrum = level @ analysis
    for _ in range(ROUNDS):
        cepstrum = torch.maximum(level, cepstrum @ synthesis) @ analysis
    # Filter: a frame between two with an envelope has the mean of their gains. Overlap and add; restore the power.
    gain = (cepstrum @ _move(order, factor)).clamp_(-LARGEST_GAIN, LARGEST_GAIN).exp_()
    pairs = spectrum.view(len(gain), 2, BINS)
    pairs[:, 0] *= gain
    pairs[:, 1] *= 0.5 * (gain + torch.cat([gain[1:], gain[-1:]]))
    filtered = torch.fft.irfft(spectrum, FRAME).mul_(synthesis_window)
    shifted = (filtered[:-1, HOP:] + filtered[1:, :HOP]).view(-1)[: len(wave)].numpy()
    power_then, power_now = float(np.dot(wave, wave)), float(np.dot(shifted, shifted))
    return shifted * np.float32(np.sqrt(power_then / power_now)) if power_now > 0 else wave


@lru_cache
def _windows() -> tuple[torch.Tensor, torch.Tensor]:
    """(FRAME,) windows of version 3 for analysis and synthesis; what is not filtered comes out as it was."""
    window = torch.hann_window(FRAME)
    return window, window / (window.square() + window.roll(HOP).square())


def _pitch_by_maxima(power: np.ndarray) -> float:
    """Median pitch (Hz) of the voiced frames; as `_pitch`, but from maxima of the autocorrelation alone.

    At the shortest lags, the autocorrelation of a low voice is high without a maximum.

    Args:
        power: (frames, bins) power spectrum.
    """
    least, most = (round(SAMPLE_RATE / pitch) for pitch in reversed(PITCHES))
    correlation = torch.fft.irfft(torch.from_numpy(power), FRAME).numpy()
    height, energy = correlation[:, least - 1 : most + 1] * _lag_weights(), correlation[:, 0]
    middle = height[:, 1:-1]
    middle = np.where((middle >= height[:, :-2]) & (middle >= height[:, 2:]), middle, np.float32(0.0))
    place, loud = middle.argmax(1), np.sort(energy)[int(0.95 * len(energy))]
    highest = middle[np.arange(len(middle)), place]
    voiced = np.sort(place[(highest > VOICED * np.maximum(energy, FLOOR**2)) & (energy > AUDIBLE * loud)])
    return SAMPLE_RATE / (least + int(voiced[len(voiced) // 2])) if len(voiced) else USUAL_PITCH


@lru_cache
def _lag_weights() -> np.ndarray:
    """Weights of the autocorrelation at the lags of PITCHES, with one more at both ends."""
    least, most = (round(SAMPLE_RATE / pitch) for pitch in reversed(PITCHES))
    of_window = torch.fft.irfft(torch.fft.rfft(_windows()[0]).abs() ** 2, FRAME)
    lag = torch.arange(least - 1, most + 1)
    return (of_window[0] / of_window[lag] * (1 - LAG_COST * lag)).numpy()


def _by_version_2(wave: np.ndarray, factor: float) -> np.ndarray:
    """`shift_formants` of version 2."""
    # Short-time spectrum, and the number of coefficients by its pitch.
    signal = torch.from_numpy(wave)
    window = torch.hann_window(FRAME)
    padded = torch.nn.functional.pad(signal, (FRAME, FRAME + HOP_2))
    spectrum = torch.stft(padded, FRAME, HOP_2, window=window, return_complex=True).T  # (frames, bins)
    magnitude = spectrum.abs()
    order = round(ORDER * SAMPLE_RATE / _pitch(magnitude[::PITCH_HOP] ** 2, window))
    analysis, synthesis = _cosines(order, BINS)
    # Cepstrum of the envelope (frames, order): each round raises the smooth spectrum to the spectrum where it is lower.
    level = magnitude.clamp_min(FLOOR).log()
    cepstrum = level @ analysis
    for _ in range(ROUNDS_2):
        cepstrum = torch.maximum(level, cepstrum @ synthesis) @ analysis
    # Filter, return to samples, and restore the power.
    gain = (cepstrum @ _move(order, factor)).clamp(-LARGEST_GAIN, LARGEST_GAIN)
    filtered = torch.istft((spectrum * gain.exp()).T, FRAME, HOP_2, window=window, length=len(padded))
    shifted = filtered[FRAME : FRAME + len(wave)].numpy()
    power, before = float(np.mean(shifted**2)), float(np.mean(wave**2))
    return (shifted * np.sqrt(before / power)).astype(np.float32) if power > 0 else wave


def _pitch(power: torch.Tensor, window: torch.Tensor) -> float:
    """Median pitch (Hz) of the voiced frames, from their autocorrelation.

    The autocorrelation is divided by that of the window (Boersma, IFA Proceedings 1993).

    Args:
        power: (frames, bins) power spectrum.
        window: (FRAME,) window of the spectrum.
    """
    least, most = (round(SAMPLE_RATE / pitch) for pitch in reversed(PITCHES))
    correlation = torch.fft.irfft(power, FRAME)
    of_window = torch.fft.irfft(torch.fft.rfft(window).abs() ** 2, FRAME)
    lag = torch.arange(least, most)
    height = correlation[:, lag] / correlation[:, :1].clamp_min(FLOOR**2) * of_window[0] / of_window[lag]
    height, place = (height * (1 - LAG_COST * lag)).max(1)
    energy = correlation[:, 0]
    voiced = (height > VOICED) & (energy > AUDIBLE * energy.quantile(0.95))
    return SAMPLE_RATE / float(lag[place[voiced]].float().median()) if voiced.any() else USUAL_PITCH


FORMULAS: dict[int, Callable[[np.ndarray, float], np.ndarray]] = {2: _by_version_2, 3: _by_version_3}


@lru_cache(maxsize=64)
def _cosines(order: int, bins: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrices from an even spectrum to the first coefficients of its cepstrum (bins, order), and back."""
    cosines = _cosine(torch.arange(bins), order, bins)
    analysis = cosines / (bins - 1)
    analysis[[0, -1]] /= 2  # the other bins stand for two
    return analysis.float(), (cosines * _twice(order)).T.float().contiguous()


@lru_cache(maxsize=256)
def _move(order: int, factor: float) -> torch.Tensor:
    """Matrix (order, bins) from the cepstrum of an envelope E to E(f / factor) - E(f)."""
    bins = torch.arange(BINS, dtype=torch.float64)
    source = (bins / factor).clamp_max(BINS - 1)  # the highest would lie beyond half the sampling rate
    return ((_cosine(source, order, BINS) - _cosine(bins, order, BINS)) * _twice(order)).T.float().contiguous()


def _cosine(at: torch.Tensor, order: int, bins: int) -> torch.Tensor:
    """(at, order), float64: cosines of the first cepstral coefficients at these of `bins` bins."""
    return torch.cos(torch.pi / (bins - 1) * at.double()[:, None] * torch.arange(order))


def _twice(order: int) -> torch.Tensor:
    """(order,): number of times that each coefficient of an even cepstrum occurs: 1 for the first, 2 for the others."""
    return torch.where(torch.arange(order) == 0, 1.0, 2.0)
