"""Front ends of WeSpeaker other than fbank: the log-mel energies of Whisper, and those of `tfmel`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import log10

import torch
from torch import Tensor
from torch.nn.functional import pad

from spkd.corpus.audio import SAMPLE_RATE
from spkd.networks import padding
from spkd.outputs.features import HOP, WINDOW, in_float32, slaney_filters, without_padding
from spkd.outputs.target import Target
from spkd.teachers.redimnet_features import prepared
from spkd.teachers.toolkit import FrontEnd


@in_float32
def whisper_mel(waves: Tensor, lengths: Tensor | None, mels: int) -> Tensor:
    """Log-mel energies of openai/whisper (`log_mel_spectrogram`): (B, samples) -> (B, samples // 160, mels).

    Hann windows of 25 ms around every 10 ms, mirrored at the edges; Slaney's filters; logarithms at most 8 decades
    below the largest of the view.

    Args:
        waves: (B, samples), at 16 kHz.
        lengths: (B,) samples of each waveform, where shorter ones are padded; None where all have the full length.
    """
    waves = padding.reflect(waves.float()[:, None], WINDOW // 2, lengths)[:, 0]
    window = torch.hann_window(WINDOW, device=waves.device)
    spectra = torch.stft(waves, WINDOW, HOP, window=window, center=False, return_complex=True)[..., :-1]
    energies = slaney_filters(mels, WINDOW, device=waves.device) @ spectra.abs().square()
    logarithms = energies.clamp_min(1e-10).log10()
    counts = None if lengths is None else lengths // HOP
    inside = logarithms if counts is None else logarithms.masked_fill(~padding.valid(logarithms, counts), -torch.inf)
    logarithms = logarithms.maximum(inside.amax((1, 2), keepdim=True) - 8)
    return ((logarithms + 4) / 4).transpose(1, 2)


def whisper_front_end(mels: int) -> FrontEnd:
    """Front end of Whisper; frame i is centred on sample 160 i."""
    frames = Target("fbank.whisper", mels, HOP, HOP, centre=0)
    words = f"{mels}-mel log energies of Whisper, 25/10 ms"
    return FrontEnd(frames, lambda waves, lengths: whisper_mel(waves, lengths, mels), words)


@dataclass(frozen=True)
class TFMel:
    """Settings of `tfmel`, under WeSpeaker's names.

    Attributes:
        n_mels: number of bands.
        n_fft: points of the Fourier transform.
        win_length: samples of a window.
        f_min: begin of the first filter (Hz).
        f_max: end of the last filter (Hz).
        norm_signal: whether the waveform is normalised to zero mean and unit variance.
        do_preemph: whether it is pre-emphasised.
        eps: least energy, also added to deviations.
    """

    n_mels: int = 80
    n_fft: int = 512
    win_length: int = 400
    f_min: float = 20
    f_max: float = 7600
    norm_signal: bool = False
    do_preemph: bool = True
    eps: float = 1e-8


@in_float32
def tfmel(waves: Tensor, lengths: Tensor | None, settings: TFMel) -> Tensor:
    """Log-mel energies of WeSpeaker's `tfmel`: (B, samples) -> (B, frames, mels), mean-normalised per view.

    Frames are half a hop of zeros before and after the view. The Fourier transform leaves out its last bin, and the
    filters lie as if the remaining ones reached 8 kHz.

    Args:
        waves: (B, samples), at 16 kHz.
        lengths: (B,) samples of each waveform, where shorter ones are padded; None where all have the full length.
    """
    waves = prepared(waves, lengths, settings.norm_signal, settings.do_preemph, settings.eps)
    edge = HOP // 2
    frames = pad(without_padding(waves, lengths), (edge, edge)).unfold(1, settings.win_length, HOP)
    window = torch.hamming_window(settings.win_length, periodic=False, device=waves.device)
    spectra = torch.fft.rfft(frames * window, settings.n_fft)[..., :-1]
    low, high = settings.eps, 1 / settings.eps
    power = (spectra.real.square() + spectra.imag.square()).clamp(low, high)
    filters = tfmel_filters(settings.n_mels, settings.n_fft, settings.f_min, settings.f_max, waves.device)
    logarithms = ((power @ filters).clamp(low, high) + settings.eps).log().transpose(1, 2)
    counts = None if lengths is None else (lengths + 2 * edge - settings.win_length) // HOP + 1
    return (logarithms - padding.mean(logarithms, counts)).transpose(1, 2)


@lru_cache
def tfmel_filters(mels: int, fft: int, low: float, high: float, device: torch.device) -> Tensor:
    """(fft / 2, mels): triangular filters equally spaced on mel = 2595 log10(1 + f / 700), without the bin at 0 Hz."""

    first, last = (2595 * log10(1 + hz / 700) for hz in (low, high))
    edges = torch.linspace(first, last, mels + 2, dtype=torch.float64)
    hertz = torch.linspace(0, SAMPLE_RATE // 2, fft // 2, dtype=torch.float64)[:, None]
    bins = 2595 * (1 + hertz / 700).log10()
    rise = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    weights = torch.minimum(rise, fall).clamp_min(0.0)
    weights[0] = 0.0
    return weights.float().to(device)


def tfmel_front_end(settings: TFMel) -> FrontEnd:
    """Front end of WeSpeaker's `tfmel`."""
    frames = Target("fbank.tfmel", settings.n_mels, HOP, settings.win_length - 2 * (HOP // 2))
    words = f"{settings.n_mels}-mel log energies of tfmel ({settings}), mean-normalised per view"
    return FrontEnd(frames, lambda waves, lengths: tfmel(waves, lengths, settings), words)
