"""Formants moved without the pitch: another vocal tract in front of the same source."""

from __future__ import annotations

import numpy as np
import torch

FRAME, HOP = 512, 128  # samples at 16 kHz: 32 and 8 ms
QUEFRENCY = 26  # cepstral coefficients of the envelope (1.6 ms): below the period of a voice of 600 Hz
ROUNDS = 3  # of the envelope's iteration
LARGEST_GAIN = 3.0  # nepers (26 dB)
FLOOR = 1e-5  # least magnitude: full scale is about 100


def shift_formants(wave: np.ndarray, factor: float) -> np.ndarray:
    """Move the spectral envelope of a waveform along the frequency axis: formants at f come to lie at factor * f.

    Each frame is filtered by E(f / factor) / E(f), E its envelope, in the short-time Fourier transform: harmonics and
    noise keep their places and phases, so that there is no vocoder to hear. With a change of speed by s, which moves
    both by s, pitch and formants move independently: pitch by s, formants by s * factor. E is the true envelope
    (Röbel and Rodet, "Efficient spectral envelope estimation", DAFx 2005): the cepstrum of the log spectrum's upper
    edge, smoothed below the period of any voice, by a few rounds of its iteration.

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
    spectrum = torch.stft(padded, FRAME, HOP, window=window, return_complex=True)  # (bins, frames)
    envelope = _envelope(spectrum.abs().clamp_min(FLOOR).log())
    # Where in the envelope each bin takes its value; the highest would take it beyond half the sampling rate.
    place = (torch.arange(FRAME // 2 + 1, dtype=torch.float32) / factor).clamp_max(FRAME // 2)
    lower, upper = envelope[place.floor().long()], envelope[place.ceil().long()]
    gain = (lower + (place % 1.0)[:, None] * (upper - lower) - envelope).clamp(-LARGEST_GAIN, LARGEST_GAIN)
    filtered = torch.istft(spectrum * gain.exp(), FRAME, HOP, window=window, length=len(padded))
    shifted = filtered[FRAME : FRAME + len(wave)].numpy()
    power, before = float(np.mean(shifted**2)), float(np.mean(wave**2))
    return (shifted * np.sqrt(before / power)).astype(np.float32) if power > 0 else wave


def _envelope(log_spectrum: torch.Tensor) -> torch.Tensor:
    """(bins, frames) -> (bins, frames): the smooth upper edge."""
    smooth = _smoothed(log_spectrum)
    for _ in range(ROUNDS):
        smooth = _smoothed(torch.maximum(log_spectrum, smooth))
    return smooth


def _smoothed(log_spectrum: torch.Tensor) -> torch.Tensor:
    cepstrum = torch.fft.irfft(log_spectrum, FRAME, dim=0)
    cepstrum[QUEFRENCY : FRAME - QUEFRENCY + 1] = 0.0
    return torch.fft.rfft(cepstrum, dim=0).real
