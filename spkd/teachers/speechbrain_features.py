"""SpeechBrain's features (speechbrain.lobes.features.Fbank and speechbrain.processing.features.InputNormalization)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import conv1d, pad

from spkd.corpus.audio import SAMPLE_RATE
from spkd.errors import UsageError
from spkd.networks import padding
from spkd.outputs.features import HOP, in_float32
from spkd.outputs.target import Target
from spkd.teachers.hyperpyyaml import Hyperparams, Section
from spkd.teachers.toolkit import FrontEnd

TOP_DB = 80.0  # dynamic range of a view (dB): values further below the loudest are raised to this limit
LEAST = 1e-10  # least power of a band
SHAPES = ("triangular", "rectangular", "gaussian")
FBANK = "speechbrain.lobes.features.Fbank"
NORMALISATION = "speechbrain.processing.features.InputNormalization"
# Settings without effect on an embedding: they concern training, padding, or statistics of many views.
INERT_FBANK = ("param_change_factor", "param_rand_factor")
INERT_NORMALISATION = ("update_until_epoch", "avoid_padding_norm", "device", "requires_grad")


@dataclass(frozen=True)
class Fbank:
    """Settings of SpeechBrain's Fbank, with its defaults.

    Attributes:
        low: lower end of the first filter (Hz).
        high: upper end of the last filter (Hz).
        window: length of the window (samples).
        deltas: whether first and second derivatives are added to the bands.
        left: number of preceding frames that are joined to each frame.
        right: number of following frames that are joined to each frame.
    """

    mels: int = 40
    low: float = 0.0
    high: float = SAMPLE_RATE / 2
    points: int = 400
    window: int = 400
    shape: str = "triangular"
    deltas: bool = False
    left: int = 0
    right: int = 0

    @property
    def dim(self) -> int:
        """Number of features in a frame."""
        return self.mels * (3 if self.deltas else 1) * (self.left + self.right + 1)

    @property
    def words(self) -> str:
        """Differences from the recipes for speakers, in words, for the card."""
        changed = [
            *([f"{self.low:g} to {self.high:g} Hz"] if (self.low, self.high) != (0, SAMPLE_RATE / 2) else []),
            *([f"{self.points} points"] if self.points != Fbank.points else []),
            *([f"{self.shape} filters"] if self.shape != Fbank.shape else []),
            *(["with deltas"] if self.deltas else []),
            *([f"{self.left} + {self.right} frames of context"] if self.left + self.right else []),
        ]
        return "".join(f", {text}" for text in changed)


def front_end_of(file: Hyperparams) -> FrontEnd:
    """Front end with the features of a model. Raises UsageError: settings that spkd does not support."""
    bank, section = _fbank_of(file.section("compute_features")), file.section("mean_var_norm")
    section.check(
        [NORMALISATION],
        ["mean_norm", "std_norm", "norm_type", "avg_factor", "length_dim", "epsilon", *INERT_NORMALISATION],
    )
    section.only("norm_type", "global", "sentence")
    section.only("mean_norm", True, True)
    section.only("avg_factor", None, None)
    section.only("length_dim", 1, 1)
    scaled, least = section.flag("std_norm", True), section.number("epsilon", 1e-10, 0.0, 1e3)

    def compute(waves: Tensor, lengths: Tensor | None) -> Tensor:
        features = fbank(waves, bank, lengths)
        return unit_deviation(features, least) if scaled else features

    size = bank.window * 1000 / SAMPLE_RATE
    words = (
        f"{bank.mels}-mel fbank of SpeechBrain (dB, 80 dB below the loudest), {size:g}/10 ms{bank.words}, "
        f"{'mean and deviation' if scaled else 'mean'}-normalised per view"
    )
    return FrontEnd(
        Target("fbank", bank.dim, HOP, 0), compute, words, not (scaled or bank.deltas or bank.left + bank.right)
    )


def _fbank_of(section: Section) -> Fbank:
    section.check(
        [FBANK],
        [
            *("deltas", "context", "requires_grad", "sample_rate", "f_min", "f_max", "n_fft", "n_mels", "filter_shape"),
            *("left_frames", "right_frames", "win_length", "hop_length", *INERT_FBANK),
        ],
    )
    section.only("requires_grad", False, False)  # trained filters would be in a further file
    section.only("sample_rate", SAMPLE_RATE, SAMPLE_RATE)
    section.only("hop_length", 10, 10)
    joined = section.flag("context", False)
    left, right = (section.whole(f"{side}_frames", 5, 0, 100) for side in ("left", "right"))
    high = section.number("f_max", None, 1, SAMPLE_RATE)
    bank = Fbank(
        section.whole("n_mels", 40, 1, 1000),
        section.number("f_min", 0, 0, SAMPLE_RATE),
        SAMPLE_RATE // 2 if high is None else high,
        section.get("n_fft", 400, lambda n: n in range(2, 1 << 16, 2), "even numbers to 65,534"),
        round(SAMPLE_RATE / 1000 * section.number("win_length", 25, 0.1, 4000)),
        section.choice("filter_shape", "triangular", SHAPES),
        section.flag("deltas", False),
        left if joined else 0,
        right if joined else 0,
    )
    if bank.low >= bank.high or bank.window > bank.points:
        raise UsageError(
            f"{section.file.path}: compute_features: f_min {bank.low:g} to f_max {bank.high:g} Hz, windows of "
            f"{bank.window} samples with n_fft {bank.points}: SpeechBrain cannot compute these"
        )
    return bank


@in_float32
def fbank(waves: Tensor, bank: Fbank, lengths: Tensor | None = None) -> Tensor:
    """SpeechBrain's fbank (dB), with derivatives and context.

    Hamming windows every 10 ms are centred, with zeros at the edges. The power in each filter is converted by 10 log10,
    and raised to at least 80 dB below the loudest value of the view. Then derivatives and context are added.

    Args:
        waves: (B, samples).
        lengths: (B,) number of samples of each view, where shorter views are padded with zeros; None: all are valid.
            Frames of padding do not change the features of a view.
    Returns:
        (B, 1 + samples // 160, dim).
    """
    window = torch.hamming_window(bank.window, device=waves.device)
    spectrum = torch.stft(waves.float(), bank.points, HOP, bank.window, window, True, "constant", return_complex=True)
    power = spectrum.real.square() + spectrum.imag.square()
    decibels = 10 * (power.transpose(1, 2) @ _filters(bank, waves.device)).clamp_min(LEAST).log10()
    loudest = decibels.amax(2)
    if lengths is not None:
        loudest = loudest.masked_fill(~padding.valid(loudest, 1 + lengths // HOP), -torch.inf)
    features = decibels.maximum(loudest.amax(1)[:, None, None] - TOP_DB)
    if bank.deltas:
        first = _derivative(features)
        features = torch.cat([features, first, _derivative(first)], 2)
    return _joined(features, bank.left, bank.right)


def unit_deviation(features: Tensor, least: float) -> Tensor:
    """Features (B, T, F), each with zero mean and unit deviation over time; the divisor is at least `least`."""
    variance, mean = torch.var_mean(features, 1, correction=0, keepdim=True)
    return (features - mean) / variance.sqrt().clamp_min(least)


def _derivative(features: Tensor) -> Tensor:
    """Derivative of features (B, T, F) by regression over five frames, with repeated edges (SpeechBrain's Deltas)."""
    kernel = torch.arange(-2.0, 3.0, device=features.device).repeat(features.shape[2], 1, 1)
    frames = pad(features.transpose(1, 2), (2, 2), mode="replicate")
    return (conv1d(frames, kernel, groups=features.shape[2]) / 10).transpose(1, 2)


def _joined(features: Tensor, left: int, right: int) -> Tensor:
    """Features (B, T, F) joined with those of neighbouring frames, with zeros beyond the edges (ContextWindow).

    The values of one feature in all these frames are next to each other.
    """
    if left + right == 0:
        return features
    frames = pad(features, (0, 0, left, right)).unfold(1, left + right + 1, 1)
    return frames.flatten(2)


@lru_cache
def _filters(bank: Fbank, device: torch.device) -> Tensor:
    """Filters (points // 2 + 1, mels).

    Their centres are equally spaced on the scale mel = 2595 log10(1 + f / 700). The half width of a filter, on both
    sides, is the distance (Hz) to the next lower centre.
    """
    low, high = (2595 * math.log10(1 + hz / 700) for hz in (bank.low, bank.high))
    hz = 700 * (10 ** (torch.linspace(low, high, bank.mels + 2) / 2595) - 1)
    centre, width = hz[1:-1], hz[1:-1] - hz[:-2]
    frequency = torch.linspace(0, SAMPLE_RATE // 2, bank.points // 2 + 1)[:, None]
    if bank.shape == "rectangular":
        filters = ((frequency >= centre - width) & (frequency <= centre + width)).float()
    elif bank.shape == "gaussian":
        filters = (-0.5 * (2 * (frequency - centre) / width).square()).exp()
    else:
        filters = (1 - ((frequency - centre) / width).abs()).clamp_min(0.0)
    return filters.to(device)
