"""Features within the checkpoints of ReDimNet and ReDimNet2: torchaudio's MelSpectrogram with pre-emphasis."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from spkd.corpus.audio import SAMPLE_RATE
from spkd.networks import padding
from spkd.outputs.features import CPU, HOP, PREEMPHASIS, in_float32
from spkd.outputs.target import Target
from spkd.teachers.toolkit import FrontEnd

LEAST = 1e-6  # added to an energy before its logarithm, and to the deviation of a waveform
LEAST_DEVIATION = 1e-8  # added to the deviation of a band


@dataclass(frozen=True)
class MelBanks:
    """Settings of the authors' MelBanks, under their names.

    Attributes:
        n_fft: points of the Fourier transform.
        win_length: samples of a window.
        f_min: begin of the first filter (Hz).
        f_max: end of the last filter (Hz).
        norm_signal: whether the waveform is normalised to zero mean and unit variance.
        do_preemph: whether it is pre-emphasised.
        spec_norm: "mn", or "mvn" where each band also has unit deviation over time.
    """

    n_fft: int = 512
    win_length: int = 400
    f_min: float = 20.0
    f_max: float = 7600.0
    norm_signal: bool = False
    do_preemph: bool = True
    spec_norm: str = "mn"


def prepared(waves: Tensor, lengths: Tensor | None, normal: bool, emphasis: bool, least: float) -> Tensor:
    """Waveforms (B, samples) as they are framed, float32.

    Args:
        lengths: (B,) samples of each waveform, where shorter ones are padded; None where all have the full length.
        normal: whether each has zero mean and unit variance.
        emphasis: whether it is pre-emphasised, its first sample by the second.
        least: number added to the deviation.
    """
    waves = waves.float()
    if normal:
        variance, mean = padding.var_mean(waves, lengths)
        waves = (waves - mean) / (variance.sqrt() + least)
    return waves - PREEMPHASIS * torch.cat([waves[:, 1:2], waves[:, :-1]], 1) if emphasis else waves


@in_float32
def mel_banks(waves: Tensor, lengths: Tensor | None, mels: int, settings: MelBanks) -> Tensor:
    """Log-mel energies: (B, samples) -> (B, 1 + samples // 160, mels), normalised over time.

    Windows are centred on every 160th sample, and the waveform is mirrored at its edges.

    Args:
        waves: (B, samples), at 16 kHz, more than n_fft / 2 of each view.
        lengths: (B,) samples of each waveform, where shorter ones are padded; None where all have the full length.
    """
    waves = prepared(waves, lengths, settings.norm_signal, settings.do_preemph, LEAST)
    window = torch.hamming_window(settings.win_length, device=waves.device)
    waves = padding.reflect(waves[:, None], settings.n_fft // 2, lengths)[:, 0]
    spectra = torch.stft(
        waves, settings.n_fft, HOP, settings.win_length, window, center=False, return_complex=True
    ).transpose(1, 2)
    power = spectra.real.square() + spectra.imag.square()
    filters = mel_filters(mels, settings.n_fft, settings.f_min, settings.f_max, waves.device)
    bands = ((power @ filters) + LEAST).log().transpose(1, 2)
    counts = None if lengths is None else 1 + lengths // HOP
    if settings.spec_norm == "mvn":
        variance, mean = padding.var_mean(bands, counts, correction=1)
        return ((bands - mean) / (variance.sqrt() + LEAST_DEVIATION)).transpose(1, 2)
    return (bands - padding.mean(bands, counts)).transpose(1, 2)


@lru_cache
def mel_filters(mels: int, fft: int, low: float, high: float, device: torch.device) -> Tensor:
    """Triangular filters with corners equally spaced on mel = 2595 log10(1 + f / 700), and sides linear in Hz.

    Returns:
        (fft // 2 + 1, mels).
    """
    first, last = (2595 * math.log10(1 + hz / 700) for hz in (low, high))
    corners = torch.linspace(first, last, mels + 2, dtype=torch.float64, device=CPU)
    hertz = 700 * (10 ** (corners / 2595) - 1)
    bins = torch.linspace(0, SAMPLE_RATE // 2, fft // 2 + 1, dtype=torch.float64, device=CPU)[:, None]
    rise = (bins - hertz[:-2]) / (hertz[1:-1] - hertz[:-2])
    fall = (hertz[2:] - bins) / (hertz[2:] - hertz[1:-1])
    return torch.minimum(rise, fall).clamp_min(0.0).float().to(device)


def mel_front_end(mels: int, settings: MelBanks) -> FrontEnd:
    """Front end of the authors' MelBanks; frame i is centred on sample 160 i."""
    size = settings.win_length * 1000 / SAMPLE_RATE
    normal = "mean" if settings.spec_norm == "mn" else "mean and deviation"
    words = (
        f"{mels}-mel log energies of ReDimNet ({settings.f_min:g} to {settings.f_max:g} Hz, {settings.n_fft} points"
        f"{', unit variance' if settings.norm_signal else ''}{'' if settings.do_preemph else ', no pre-emphasis'}), "
        f"{size:g}/10 ms, {normal}-normalised per view"
    )
    frames = Target("fbank.redimnet", mels, HOP, 0)
    return FrontEnd(frames, lambda waves, lengths: mel_banks(waves, lengths, mels, settings), words)
