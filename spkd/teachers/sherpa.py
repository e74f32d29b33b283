"""Features that sherpa-onnx computes for a speaker model, from the metadata of its ONNX file.

The keys and their meaning are those of sherpa-onnx/csrc/speaker-embedding-extractor-*.{h,cc}; the features are those of
kaldi-native-fbank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import pi

import torch
from torch import Tensor

from spkd.corpus.audio import SAMPLE_RATE
from spkd.errors import UsageError
from spkd.networks import padding
from spkd.outputs.features import (
    FBANKS,
    INT16,
    MELS,
    PREEMPHASIS,
    SHERPA_HIGH_HZ,
    fbank_of,
    in_float32,
    slaney_filters,
)
from spkd.outputs.target import Target
from spkd.teachers.toolkit import FrontEnd

NEMO = "nemo"
KALDI = ("wespeaker", "3d-speaker")  # toolkits for whose models sherpa-onnx computes Kaldi's fbank
LEAST_VARIANCE = 1e-5  # least variance of a band, and the number added to its deviation (per_feature)
MOST_MILLISECONDS = 1000  # longest window (ms)
WINDOWS = ("povey", "hann", "hanning", "hamming", "sine", "rectangular", "blackman")


def sherpa_front_end(source: str, described: dict[str, str]) -> FrontEnd | None:
    """Front end with the features that sherpa-onnx computes for a file.

    Returns:
        The front end; None where the metadata are not those of sherpa-onnx (the framework alone does not determine the
        features).
    Raises:
        UsageError: a value that sherpa-onnx does not accept, or a missing key that it needs.
    """
    keys = _Metadata(source, described)
    framework = described.get("framework")
    if framework == NEMO and any(
        key in described for key in ("window_size_ms", "window_stride_ms", "window_type", "feature_normalize_type")
    ):
        return _of_nemo(keys)
    if framework in KALDI and ("normalize_samples" in described or "feature_normalize_type" in described):
        return _of_kaldi(keys)
    return None


@dataclass(frozen=True)
class _Metadata:
    """Metadata of a file, with checked access."""

    source: str
    values: dict[str, str]

    def number(self, key: str, low: int, high: int) -> int:
        """Integer value within a range. Raises UsageError where it is missing or not such a number."""
        text = self.values.get(key)
        if text is None:
            raise UsageError(f"{self.source}: no {key} in its metadata, which sherpa-onnx needs")
        if not text.strip().isdecimal() or not low <= int(text) <= high:
            raise UsageError(f"{self.source}: {key}={text[:40]!r} in its metadata; expected {low} to {high}")
        return int(text)

    def choice(self, key: str, default: str, choices: tuple[str, ...]) -> str:
        """Value with a choice of words. Raises UsageError for others."""
        text = self.values.get(key, default)
        if text not in choices:
            names = ", ".join(repr(choice) for choice in choices)
            raise UsageError(f"{self.source}: {key}={text[:40]!r} in its metadata; sherpa-onnx has {names}")
        return text


def _of_kaldi(keys: _Metadata) -> FrontEnd:
    """Front end with Kaldi's fbank, for models of WeSpeaker and 3D-Speaker."""
    small = keys.number("normalize_samples", 0, 1) == 1
    centred = keys.choice("feature_normalize_type", "", ("", "global-mean")) == "global-mean"

    def compute(waves: Tensor, lengths: Tensor | None) -> Tensor:
        bank = fbank_of("sherpa", waves / INT16 if small else waves, lengths=lengths)
        counts = None if lengths is None else FBANKS["sherpa"].num_frames(lengths)
        return bank - padding.mean(bank.transpose(1, 2), counts).transpose(1, 2) if centred else bank

    words = (
        f"{MELS}-mel fbank of sherpa-onnx (centred frames, 20 to 7600 Hz) of samples in "
        f"{'[-1, 1]' if small else '16 bits'}, 25/10 ms, {'mean-normalised per view' if centred else 'not normalised'}"
    )
    return FrontEnd(FBANKS["sherpa"], compute, words)


def _of_nemo(keys: _Metadata) -> FrontEnd:
    """Front end with fbank of librosa's filters, for models of NeMo."""
    mels = keys.number("feat_dim", 3, 256)
    size, stride = (keys.number(key, 1, MOST_MILLISECONDS) for key in ("window_size_ms", "window_stride_ms"))
    window_type = keys.choice("window_type", "povey", WINDOWS)
    normalised = keys.choice("feature_normalize_type", "", ("", "per_feature")) == "per_feature"
    window, hop = size * SAMPLE_RATE // 1000, stride * SAMPLE_RATE // 1000
    points = 1 << (window - 1).bit_length()
    if not bool((slaney_filters(mels, points, SHERPA_HIGH_HZ).amax(1) > 0).all()):
        raise UsageError(f"{keys.source}: {mels} bands of windows of {size} ms are too many: some filters are empty")

    def compute(waves: Tensor, _: Tensor | None) -> Tensor:
        bank = nemo_bank(waves, window, hop, window_type, mels)
        return per_feature(bank) if normalised else bank

    words = (
        f"{mels}-mel fbank of sherpa-onnx for NeMo ({window_type} window, 0 to 7600 Hz), {size}/{stride} ms, "
        f"{'normalised per band and view' if normalised else 'not normalised'}"
    )
    return FrontEnd(Target("fbank.sherpa-nemo", mels, hop, window), compute, words, not normalised)


@in_float32
def nemo_bank(waves: Tensor, window: int, hop: int, window_type: str, mels: int) -> Tensor:
    """Log-mel energies of kaldi-native-fbank with is_librosa and snip_edges, without removal of the mean.

    Args:
        waves: (B, samples) in [-1, 1], at least one window.
        window: length of the window (samples).
        hop: hop (samples).
    Returns:
        (B, 1 + (samples - window) // hop, mels).
    """
    frames = waves.float().unfold(-1, window, hop)
    # Kaldi pre-emphasises the first sample of a frame with itself.
    previous = torch.cat([frames[..., :1], frames[..., :-1]], -1)
    frames = (frames - PREEMPHASIS * previous) * _window(window_type, window, waves.device)
    points = 1 << (window - 1).bit_length()
    power = torch.fft.rfft(frames, points).abs().square()
    energies = power @ slaney_filters(mels, points, SHERPA_HIGH_HZ, waves.device).T
    return energies.clamp_min(torch.finfo(torch.float32).eps).log()


def per_feature(bank: Tensor) -> Tensor:
    """Features (B, T, F) with every band normalised to zero mean and unit deviation over time."""
    variance, mean = padding.var_mean(bank.transpose(1, 2), None)
    variance, mean = variance.transpose(1, 2), mean.transpose(1, 2)
    return (bank - mean) / (variance.clamp_min(LEAST_VARIANCE).sqrt() + LEAST_VARIANCE)


@lru_cache
def _window(window_type: str, size: int, device: torch.device) -> Tensor:
    """Window (size,) of kaldi-native-fbank (feature-window.cc)."""
    # Only "hann" is periodic.
    phase = 2 * pi * torch.arange(size, dtype=torch.float64) / (size if window_type == "hann" else max(size - 1, 1))
    raised = 0.5 - 0.5 * phase.cos()
    values = {
        "povey": raised.pow(0.85),
        "hann": raised,
        "hanning": raised,
        "hamming": 0.54 - 0.46 * phase.cos(),
        "sine": (0.5 * phase).sin(),
        "rectangular": torch.ones_like(phase),
        "blackman": 0.42 - 0.5 * phase.cos() + 0.08 * (2 * phase).cos(),
    }
    return values[window_type].float().to(device)
