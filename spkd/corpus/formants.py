"""Shift of formants without a change of pitch, as by another vocal tract with the same glottal source."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from spkd.corpus.audio import SAMPLE_RATE

VERSION = 2  # version of the formula, on the cards of caches; raised with every change of its output
FRAME, HOP = 512, 128  # samples at 16 kHz: 32 and 8 ms
ORDER = 0.65  # cepstral coefficients of the envelope, in periods of the pitch
ROUNDS = 3  # iterations of the envelope's estimation
LARGEST_GAIN = 3.0  # nepers (26 dB)
FLOOR = 1e-5  # least magnitude, where full scale is about 100
PITCHES = (70.0, 450.0)  # Hz: range in which the pitch is searched
USUAL_PITCH = 200.0  # Hz: pitch that is assumed where no frame is voiced
PITCH_HOP = 4  # frames between two in which the pitch is searched
VOICED = 0.5  # least height of the peak of a voiced frame's autocorrelation
AUDIBLE = 0.03  # least power of a voiced frame, as a share of the power of the loudest frames
LAG_COST = 8e-4  # reduction of the autocorrelation for each sample of lag, so that one period wins over two


def shift_formants(wave: np.ndarray, factor: float) -> np.ndarray:
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

    Args:
        wave: (samples,), float32, 16 kHz.
        factor: factor of the formants; above 1 gives a shorter vocal tract.
    Returns:
        (samples,), float32, with the power of the input.
    """
    if factor == 1.0 or len(wave) == 0:
        return wave
    # Short-time spectrum, and the number of coefficients by its pitch.
    signal = torch.from_numpy(np.ascontiguousarray(wave, np.float32))
    window = torch.hann_window(FRAME)
    padded = torch.nn.functional.pad(signal, (FRAME, FRAME + HOP))
    spectrum = torch.stft(padded, FRAME, HOP, window=window, return_complex=True).T  # (frames, bins)
    magnitude = spectrum.abs()
    order = round(ORDER * SAMPLE_RATE / _pitch(magnitude[::PITCH_HOP] ** 2, window))
    analysis, synthesis = _cosines(order)
    # Cepstrum of the envelope (frames, order): each round raises the smooth spectrum to the spectrum where it is lower.
    level = magnitude.clamp_min(FLOOR).log()
    cepstrum = level @ analysis
    for _ in range(ROUNDS):
        cepstrum = torch.maximum(level, cepstrum @ synthesis) @ analysis
    # Filter, return to samples, and restore the power.
    gain = (cepstrum @ _move(order, factor)).clamp(-LARGEST_GAIN, LARGEST_GAIN)
    filtered = torch.istft((spectrum * gain.exp()).T, FRAME, HOP, window=window, length=len(padded))
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


@lru_cache(maxsize=64)
def _cosines(order: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrices from an even spectrum to the first coefficients of its cepstrum (bins, order), and back."""
    analysis = _cosine(torch.arange(FRAME // 2 + 1), order) * 2 / FRAME
    analysis[[0, -1]] /= 2  # the other bins stand for two
    return analysis.float(), (_cosine(torch.arange(FRAME // 2 + 1), order) * _twice(order)).T.float().contiguous()


@lru_cache(maxsize=64)
def _move(order: int, factor: float) -> torch.Tensor:
    """Matrix (order, bins) from the cepstrum of an envelope E to E(f / factor) - E(f)."""
    bins = torch.arange(FRAME // 2 + 1, dtype=torch.float64)
    source = (bins / factor).clamp_max(FRAME // 2)  # the highest would lie beyond half the sampling rate
    return ((_cosine(source, order) - _cosine(bins, order)) * _twice(order)).T.float().contiguous()


def _cosine(bins: torch.Tensor, order: int) -> torch.Tensor:
    """(bins, order), float64: cosines of the first cepstral coefficients at these bins."""
    return torch.cos(2 * torch.pi / FRAME * bins.double()[:, None] * torch.arange(order))


def _twice(order: int) -> torch.Tensor:
    """(order,): number of times that each coefficient of an even cepstrum occurs: 1 for the first, 2 for the others."""
    return torch.where(torch.arange(order) == 0, 1.0, 2.0)
