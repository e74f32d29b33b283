"""Formants moved without the pitch: another vocal tract in front of the same source."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from spkd.corpus.audio import SAMPLE_RATE

VERSION = 2  # of the formula, on the cards of caches: raised with every change of what it gives
FRAME, HOP = 512, 128  # samples at 16 kHz: 32 and 8 ms
ORDER = 0.65  # cepstral coefficients of the envelope, in periods of the voice
ROUNDS = 3  # of the envelope's iteration
LARGEST_GAIN = 3.0  # nepers (26 dB)
FLOOR = 1e-5  # least magnitude: full scale is about 100
PITCHES = (70.0, 450.0)  # Hz: between which the voice's is looked for
USUAL_PITCH = 200.0  # Hz: where there is no voice
PITCH_HOP = 4  # frames from one in which the pitch is looked for to the next
VOICED = 0.5  # least height of the peak of a voiced frame's autocorrelation
AUDIBLE = 0.03  # least power of such a frame, as a share of the loudest ones'
LAG_COST = 8e-4  # taken from the autocorrelation for each sample of lag, so that a period wins over two of them


def shift_formants(wave: np.ndarray, factor: float) -> np.ndarray:
    """Move the spectral envelope of a waveform along the frequency axis: formants at f come to lie at factor * f.

    Each frame is filtered by E(f / factor) / E(f), E its envelope, in the short-time Fourier transform: harmonics and
    noise keep their places and phases, so that there is no vocoder to hear. With a change of speed by s, which moves
    both by s, pitch and formants move independently: pitch by s, formants by s * factor.

    E is the true envelope (Röbel and Rodet, "Efficient spectral envelope estimation", DAFx 2005): the cepstrum of the
    log spectrum's upper edge, cut off at a number of coefficients, by a few rounds of its iteration. Harmonics sample
    the envelope, so that this number follows the voice's period: too few coefficients smooth the first formant of a
    low voice away. Half a period, which is the paper's bound, leaves the first formants of high voices behind; the
    number of periods taken here is where Praat finds the factor in both (benchmarks/formants.py).

    Args:
        wave: (samples,), float32, 16 kHz.
        factor: above 1 a shorter vocal tract.
    Returns:
        (samples,), float32, with the power of the input.
    """
    if factor == 1.0 or len(wave) == 0:
        return wave
    signal = torch.from_numpy(np.ascontiguousarray(wave, np.float32))
    window = torch.hann_window(FRAME)
    padded = torch.nn.functional.pad(signal, (FRAME, FRAME + HOP))
    spectrum = torch.stft(padded, FRAME, HOP, window=window, return_complex=True).T  # (frames, bins)
    magnitude = spectrum.abs()
    order = round(ORDER * SAMPLE_RATE / _pitch(magnitude[::PITCH_HOP] ** 2, window))
    analysis, synthesis = _cosines(order)
    # The envelope's cepstrum (frames, order): the smooth spectrum is raised to the spectrum wherever it lies below.
    level = magnitude.clamp_min(FLOOR).log()
    cepstrum = level @ analysis
    for _ in range(ROUNDS):
        cepstrum = torch.maximum(level, cepstrum @ synthesis) @ analysis
    gain = (cepstrum @ _move(order, factor)).clamp(-LARGEST_GAIN, LARGEST_GAIN)
    filtered = torch.istft((spectrum * gain.exp()).T, FRAME, HOP, window=window, length=len(padded))
    shifted = filtered[FRAME : FRAME + len(wave)].numpy()
    power, before = float(np.mean(shifted**2)), float(np.mean(wave**2))
    return (shifted * np.sqrt(before / power)).astype(np.float32) if power > 0 else wave


def _pitch(power: torch.Tensor, window: torch.Tensor) -> float:
    """Median pitch (Hz) of the voiced frames of a power spectrum (frames, bins).

    From the autocorrelation over that of the window (Boersma, IFA Proceedings 1993).
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
    """(bins, order), (order, bins): from a real even spectrum to its cepstrum and back, cut off at an order."""
    analysis = _cosine(torch.arange(FRAME // 2 + 1), order) * 2 / FRAME
    analysis[[0, -1]] /= 2  # the other bins stand for two
    return analysis.float(), (_cosine(torch.arange(FRAME // 2 + 1), order) * _twice(order)).T.float().contiguous()


@lru_cache(maxsize=64)
def _move(order: int, factor: float) -> torch.Tensor:
    """(order, bins): from the cepstrum of an envelope E to E(f / factor) - E(f)."""
    bins = torch.arange(FRAME // 2 + 1, dtype=torch.float64)
    source = (bins / factor).clamp_max(FRAME // 2)  # the highest would lie beyond half the sampling rate
    return ((_cosine(source, order) - _cosine(bins, order)) * _twice(order)).T.float().contiguous()


def _cosine(bins: torch.Tensor, order: int) -> torch.Tensor:
    """(bins, order), float64: cosines of the first cepstral coefficients at these bins."""
    return torch.cos(2 * torch.pi / FRAME * bins.double()[:, None] * torch.arange(order))


def _twice(order: int) -> torch.Tensor:
    """(order,): how often a coefficient of an even cepstrum is there."""
    return torch.where(torch.arange(order) == 0, 1.0, 2.0)
