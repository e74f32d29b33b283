"""Input features of students: log-mel filter banks equal to Kaldi's (`compute-fbank-feats --dither=0`), or samples.

They are computed in batches, on any device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Concatenate, ParamSpec

import torch
from torch import Tensor
from torch.nn.functional import pad

from spkd.corpus.audio import SAMPLE_RATE
from spkd.outputs.target import Target

MELS = 80
WINDOW = 400  # samples: 25 ms
HOP = 160  # samples: 10 ms
FFT = 512
CPU = torch.device("cpu")
LOW_HZ, HIGH_HZ = 20.0, SAMPLE_RATE / 2
SHERPA_HIGH_HZ = SAMPLE_RATE / 2 - 400  # end of the last filter in sherpa-onnx
PREEMPHASIS = 0.97
AT_ONCE = 12_000  # frames computed at once: 2 minutes
INT16 = 32768.0  # Kaldi computes on 16-bit integers

FBANK = Target("fbank", MELS, HOP, WINDOW)
# Toolkits differ in window, edges, filters and the scale of the samples. Weights need the kind they were trained on.
FBANKS = {
    "kaldi": FBANK,
    "wespeaker": Target("fbank.wespeaker", MELS, HOP, WINDOW),  # Hamming window, 16-bit scale
    "3d-speaker": Target("fbank.3d-speaker", MELS, HOP, WINDOW),  # Povey window, samples in [-1, 1]
    # Windows of 25 ms around the middle of each 10 ms, mirrored at the edges. A last piece of 5 ms or more has a frame.
    "sherpa": Target("fbank.sherpa", MELS, HOP, HOP // 2, centre=HOP // 2),
}
WAVE = Target("wave", HOP, HOP, HOP)  # the samples, HOP in a row: a crop at whole hops has exactly its own samples
FEATURES = {target.name: target for target in (*FBANKS.values(), WAVE)}


Given = ParamSpec("Given")


def in_float32(compute: Callable[Concatenate[Tensor, Given], Tensor]) -> Callable[Concatenate[Tensor, Given], Tensor]:
    """Keep features out of autocast: powers of 16-bit samples reach 10^12, and half precision ends at 65,504."""

    @wraps(compute)
    def outside(waves: Tensor, *args: Given.args, **kwargs: Given.kwargs) -> Tensor:
        if not torch.is_autocast_enabled(waves.device.type):
            return compute(waves, *args, **kwargs)
        with torch.autocast(waves.device.type, enabled=False):
            return compute(waves, *args, **kwargs)

    return outside


def input_features(kind: Target, waves: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Input features of waveforms.

    Samples that do not fill the last frame are dropped. A waveform shorter than one window gives one frame, with zeros
    after its end.

    Args:
        kind: one of FEATURES.
        waves: (B, samples), float, in [-1, 1], at 16 kHz.
        lengths: (B,) samples of each waveform, where shorter ones are padded; None where all have the full length. The
            frames of a padded waveform are those that it has alone; frames of the padding are undefined.
    Returns:
        (B, frames, dim), float32.
    """
    if is_fbank(kind):
        toolkit = next(name for name, target in FBANKS.items() if target.name == kind.name)
        return fbank_of(toolkit, waves, lengths=lengths)
    frames = kind.num_frames(waves.shape[1])
    waves = without_padding(waves, lengths)
    return pad(waves, (0, max(frames * HOP - waves.shape[1], 0)))[:, : frames * HOP].unflatten(1, (frames, HOP))


def fbank_of(toolkit: str, waves: Tensor, mels: int = MELS, lengths: Tensor | None = None) -> Tensor:
    """Log-mel energies as a toolkit computes them.

    Args:
        toolkit: a name in FBANKS.
        waves: as of `input_features`.
        lengths: as of `input_features`.
    Returns:
        (B, frames, mels), float32.
    """
    if toolkit == "sherpa":
        # As sherpa-onnx computes them on the phone: kaldi-native-fbank without snip-edges, filters from 20 to 7600 Hz.
        return fbank(mirrored(waves, lengths), povey(waves.device), INT16, mels, SHERPA_HIGH_HZ)
    window = hamming if toolkit == "wespeaker" else povey
    waves = without_padding(waves, lengths)
    waves = pad(waves, (0, max(WINDOW - waves.shape[-1], 0)))
    return fbank(waves, window(waves.device), 1.0 if toolkit == "3d-speaker" else INT16, mels)


def without_padding(waves: Tensor, lengths: Tensor | None) -> Tensor:
    """Waveforms (B, samples) with zeros after the end of each, since the last window of a shorter one reaches there."""
    if lengths is None:
        return waves
    return torch.where(torch.arange(waves.shape[1], device=waves.device) < lengths[:, None], waves, 0.0)


def mirrored(waves: Tensor, lengths: Tensor | None) -> Tensor:
    """Waveforms extended at both ends by their mirror images, as in Kaldi (feature-window.cc, ExtractWindow).

    The result has room for (samples + 80) // 160 windows around the middle of every 10 ms, and for at least one. A
    waveform that is too short for that is mirrored several times.

    Args:
        waves: (B, samples).
        lengths: (B,) samples of each waveform; None where all have the full length.
    Returns:
        (B, samples of all windows).
    """
    count = waves.shape[1]
    before = WINDOW // 2 - HOP // 2
    # An exported graph does not know the length, so that nothing is compared with it.
    after = (count + HOP // 2) // HOP * HOP + WINDOW - HOP if count >= HOP // 2 else WINDOW
    steps = torch.arange(-before, after - before, device=waves.device)[None]
    last = torch.full((1, 1), count, device=waves.device) if lengths is None else lengths[:, None]
    steps = torch.maximum(steps, -1 - steps)  # mirrored at 0; runtimes differ in remainders of negative numbers
    steps = steps.remainder(2 * last)
    steps = torch.minimum(steps, 2 * last - 1 - steps)
    return waves.gather(1, steps.expand(waves.shape[0], -1))


def is_fbank(kind: Target) -> bool:
    """Whether features are log-mel energies, of any toolkit."""
    return kind.name in [target.name for target in FBANKS.values()]


@in_float32
def fbank(
    waves: Tensor,
    window: Tensor | None = None,
    scale: float = INT16,
    mels: int = MELS,
    high: float = HIGH_HZ,
) -> Tensor:
    """Log-mel energies per 10 ms, not mean-normalised.

    The steps are Kaldi's: frames that fit whole (snip-edges), minus their mean, pre-emphasis 0.97, Povey window, power
    spectrum of 512 points, triangular filters equally spaced on the mel scale, natural logarithm.

    Args:
        waves: (B, samples), float, in [-1, 1], at 16 kHz, at least 400 samples.
        window: (400,); None takes Povey's.
        scale: factor of the samples; Kaldi computes on 16-bit integers.
        high: end of the last filter (Hz).
    Returns:
        (B, 1 + (samples - 400) // 160, mels), float32.
    """
    count = 1 + (waves.shape[-1] - WINDOW) // HOP
    if count > AT_ONCE:
        # In pieces, since an hour at once would take gigabytes; frames do not depend on one another.
        starts = range(0, count, AT_ONCE)
        return torch.cat(
            [fbank(waves[..., s * HOP : (s + AT_ONCE - 1) * HOP + WINDOW], window, scale, mels, high) for s in starts],
            -2,
        )
    frames = (waves.float() * scale).unfold(-1, WINDOW, HOP)
    frames = _windowed(frames, povey(waves.device) if window is None else window)
    power = torch.fft.rfft(frames, FFT).abs().square()
    energies = power @ _filters(waves.device, mels, high)
    return energies.clamp_min(torch.finfo(torch.float32).eps).log()


def mel_filters(toolkit: str, mels: int = MELS) -> Tensor:
    """(257, mels): triangular filters of a toolkit, a name in FBANKS."""
    return _filters(CPU, mels, SHERPA_HIGH_HZ if toolkit == "sherpa" else HIGH_HZ)


def scaled_window(toolkit: str) -> Tensor:
    """(400,): the window of a toolkit, a name in FBANKS, times its scale of the samples."""
    window = (hamming if toolkit == "wespeaker" else povey)(CPU)
    return window * (1.0 if toolkit == "3d-speaker" else INT16)


def _windowed(frames: Tensor, window: Tensor) -> Tensor:
    """Frames (..., 400) minus their mean, with pre-emphasis, times the window."""
    frames = frames - frames.mean(-1, keepdim=True)
    # Kaldi pre-emphasises the first sample of a frame with itself.
    previous = torch.cat([frames[..., :1], frames[..., :-1]], -1)
    return (frames - PREEMPHASIS * previous) * window


@lru_cache
def hamming(device: torch.device) -> Tensor:
    """(400,): Hamming window of torchaudio's kaldi.fbank(window_type="hamming"), which WeSpeaker calls."""
    return torch.hamming_window(WINDOW, periodic=False, alpha=0.54, beta=0.46, dtype=torch.float64).float().to(device)


@lru_cache
def povey(device: torch.device) -> Tensor:
    """(400,): Povey's window, which Kaldi uses."""
    return torch.hann_window(WINDOW, periodic=False, dtype=torch.float64).pow(0.85).float().to(device)


@lru_cache
def _filters(device: torch.device, mels: int, high_hz: float) -> Tensor:
    """(257, mels): triangular filters, equally spaced on mel = 1127 ln(1 + f / 700) (Kaldi's mel-computations.cc)."""

    def mel(hz: Tensor) -> Tensor:
        return 1127.0 * torch.log1p(hz / 700.0)

    low, high = mel(torch.tensor([LOW_HZ, high_hz], dtype=torch.float64))
    edges = low + (high - low) / (mels + 1) * torch.arange(mels + 2, dtype=torch.float64)
    bins = mel(torch.arange(FFT // 2, dtype=torch.float64) * SAMPLE_RATE / FFT)[:, None]
    rise = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    weights = torch.minimum(rise, fall).clamp_min(0.0)
    # Kaldi leaves the Nyquist bin out.
    return torch.cat([weights, torch.zeros(1, mels, dtype=torch.float64)]).float().to(device)


@lru_cache
def slaney_filters(mels: int, fft: int, high: float = HIGH_HZ, device: torch.device = CPU) -> Tensor:
    """Triangular filters of area 1, equally spaced on Slaney's mel scale (linear to 1 kHz, then logarithmic).

    Args:
        fft: points of the Fourier transform.
        high: end of the last filter (Hz).
    Returns:
        (mels, fft // 2 + 1).
    """
    linear_step, knee_hz = 200.0 / 3, 1000.0
    knee_mel, log_step = knee_hz / linear_step, torch.log(torch.tensor(6.4, dtype=torch.float64)) / 27.0
    top = knee_mel + torch.log(torch.tensor(high / knee_hz, dtype=torch.float64)) / log_step
    points = torch.linspace(0, float(top), mels + 2, dtype=torch.float64)
    edges = torch.where(points < knee_mel, points * linear_step, knee_hz * torch.exp(log_step * (points - knee_mel)))
    bins = torch.linspace(0, SAMPLE_RATE / 2, fft // 2 + 1, dtype=torch.float64)
    rise = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    fall = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    area = 2.0 / (edges[2:] - edges[:-2])
    return (torch.minimum(rise, fall).clamp_min(0.0) * area[:, None]).float().to(device)
