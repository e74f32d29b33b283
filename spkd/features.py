"""What students take as input: log-mel filter banks, equal to Kaldi's (`compute-fbank-feats --dither=0`), or samples.

Batched, and on any device.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from spkd.audio import SAMPLE_RATE
from spkd.target import Target

MELS = 80
WINDOW = 400  # samples: 25 ms
HOP = 160  # samples: 10 ms
FFT = 512
LOW_HZ, HIGH_HZ = 20.0, SAMPLE_RATE / 2
PREEMPHASIS = 0.97
INT16 = 32768.0  # Kaldi computes on 16-bit integers

FBANK = Target("fbank", MELS, HOP, WINDOW)
WAVE = Target("wave", HOP, HOP, HOP)  # the samples themselves, HOP in a row: a crop at whole hops takes exactly its own
FEATURES = {target.name: target for target in (FBANK, WAVE)}


def input_features(kind: Target, waves: Tensor) -> Tensor:
    """One of FEATURES of waveforms (B, samples): (B, frames, dim). Samples that do not fill the last frame are
    dropped."""
    if kind.name == FBANK.name:
        return fbank(waves)
    frames = kind.num_frames(waves.shape[1])
    return pad(waves, (0, max(frames * HOP - waves.shape[1], 0)))[:, : frames * HOP].unflatten(1, (frames, HOP))


def fbank(waves: Tensor) -> Tensor:
    """80 log-mel energies per 10 ms, not mean-normalised.

    Kaldi's order: frames that fit whole (snip-edges), minus their mean, pre-emphasis 0.97, Povey window,
    power spectrum of 512 points, triangular filters even on the mel scale, natural log.

    Args:
        waves: (B, samples), float, in [-1, 1], at 16 kHz, at least 400 samples.
    Returns:
        (B, 1 + (samples - 400) // 160, 80), float32.
    """
    frames = (waves.float() * INT16).unfold(-1, WINDOW, HOP)
    frames = frames - frames.mean(-1, keepdim=True)
    # Kaldi pre-emphasises the first sample of a frame with itself.
    previous = torch.cat([frames[..., :1], frames[..., :-1]], -1)
    frames = (frames - PREEMPHASIS * previous) * _povey(waves.device)
    power = torch.fft.rfft(frames, FFT).abs().square()
    energies = power @ _filters(waves.device)
    return energies.clamp_min(torch.finfo(torch.float32).eps).log()


@lru_cache
def _povey(device: torch.device) -> Tensor:
    return torch.hann_window(WINDOW, periodic=False, dtype=torch.float64).pow(0.85).float().to(device)


@lru_cache
def _filters(device: torch.device) -> Tensor:
    """(257, 80) triangular filters, even on mel = 1127 ln(1 + f / 700) (Kaldi's mel-computations.cc)."""

    def mel(hz: Tensor) -> Tensor:
        return 1127.0 * torch.log1p(hz / 700.0)

    low, high = mel(torch.tensor([LOW_HZ, HIGH_HZ], dtype=torch.float64))
    edges = low + (high - low) / (MELS + 1) * torch.arange(MELS + 2, dtype=torch.float64)
    bins = mel(torch.arange(FFT // 2, dtype=torch.float64) * SAMPLE_RATE / FFT)[:, None]
    rise = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    weights = torch.minimum(rise, fall).clamp_min(0.0)
    # Kaldi leaves the Nyquist bin out.
    return torch.cat([weights, torch.zeros(1, MELS, dtype=torch.float64)]).float().to(device)
