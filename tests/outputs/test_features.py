from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from spkd.outputs.features import FBANKS, FEATURES, fbank, input_features
from spkd.outputs.target import Target
from spkd.teachers.dvector import linear_mel
from spkd.teachers.onnx import nemo_fbank
from spkd.teachers.sherpa import nemo_bank
from spkd.teachers.speechbrain_features import Fbank
from spkd.teachers.speechbrain_features import fbank as speechbrain_fbank

from ..conftest import torchaudio


def kaldi_fbank(wave: Tensor, window: str, mels: int = 80) -> Tensor:
    """Kaldi's compute-fbank-feats of (1, samples) without dither, written out in float64; torchaudio's where it imports
    is compared with it."""
    samples = wave[0].double().numpy()
    count = 1 + (len(samples) - 400) // 160
    frames = np.stack([samples[160 * i : 160 * i + 400] for i in range(count)])
    frames -= frames.mean(1, keepdims=True)
    frames -= 0.97 * np.concatenate([frames[:, :1], frames[:, :-1]], 1)
    n = np.arange(400)
    shape = {
        "povey": (0.5 - 0.5 * np.cos(2 * math.pi * n / 399)) ** 0.85,
        "hamming": 0.54 - 0.46 * np.cos(2 * math.pi * n / 399),
    }[window]
    power = np.abs(np.fft.rfft(frames * shape, 512)) ** 2
    points = np.linspace(1127 * math.log(1 + 20 / 700), 1127 * math.log(1 + 8000 / 700), mels + 2)
    bins = 1127 * np.log(1 + np.arange(257) * 16_000 / 512 / 700)
    banks = [
        np.clip(np.minimum((bins - a) / (b - a), (c - bins) / (c - b)), 0, None)
        for a, b, c in zip(points, points[1:], points[2:], strict=False)
    ]
    found = torch.from_numpy(np.log(np.maximum(power[:, :256] @ np.array(banks).T[:256], np.finfo(np.float32).eps)))
    if torchaudio is not None:
        from torchaudio.compliance.kaldi import fbank as torchaudios

        theirs = torchaudios(wave, num_mel_bins=mels, dither=0.0, energy_floor=0.0, window_type=window)
        assert torch.allclose(found.float(), theirs, atol=2e-3)
    return found.float()


@pytest.mark.parametrize("samples", [400, 559, 560, 16_000])
def test_equal_to_kaldi_for_any_length_and_batch(samples: int) -> None:
    waves = 0.1 * torch.randn(3, samples, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([kaldi_fbank(w[None] * 32768, "povey") for w in waves])
    ours = fbank(waves)
    assert ours.shape == expected.shape == (3, 1 + (samples - 400) // 160, 80)
    assert torch.allclose(ours, expected, atol=2e-3)


def test_silence_is_finite() -> None:
    assert torch.isfinite(fbank(torch.zeros(1, 800))).all()


def test_a_crop_at_whole_hops_has_the_frames_of_the_whole() -> None:
    wave = torch.randn(1, 8000, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(fbank(wave)[:, 7:20], fbank(wave[:, 7 * 160 : 7 * 160 + 400 + 12 * 160]), atol=1e-4)


@pytest.mark.parametrize(
    ("toolkit", "window", "scale"),
    [("kaldi", "povey", 32768), ("wespeaker", "hamming", 32768), ("3d-speaker", "povey", 1)],
)
def test_the_fbank_of_each_toolkit_is_that_of_its_own_call(toolkit: str, window: str, scale: int) -> None:
    """WeSpeaker and 3D-Speaker both call torchaudio's kaldi.fbank, with these arguments."""
    waves = 0.1 * torch.randn(2, 16_000, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([kaldi_fbank(w[None] * scale, window) for w in waves])
    ours = input_features(FBANKS[toolkit], waves)
    assert torch.allclose(ours, expected, atol=2e-3)
    if toolkit != "kaldi":
        assert not torch.allclose(ours, fbank(waves), atol=2e-3)


def test_a_long_waveform_has_the_frames_of_its_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    wave = torch.randn(2, 16_000, generator=torch.Generator().manual_seed(2))
    whole = fbank(wave)
    monkeypatch.setattr("spkd.outputs.features.AT_ONCE", 7)
    assert torch.allclose(fbank(wave), whole, atol=1e-5)


EDGES = [1, 79, 80, 81, 119, 120, 121, 160, 239, 240, 399, 400, 401, 559, 560, 561, 719, 720, 1600, 8081]


@pytest.mark.parametrize("kind", FEATURES.values(), ids=FEATURES)
def test_padding_changes_no_frame_of_any_length(kind: Target) -> None:
    """Whatever lies behind a waveform in its batch, its frames are those it has alone."""
    lengths = torch.tensor(EDGES)
    batch = torch.randn(len(EDGES), max(EDGES), generator=torch.Generator().manual_seed(3))
    found = input_features(kind, batch, lengths)
    for row, length in enumerate(EDGES):
        alone = input_features(kind, batch[row : row + 1, :length])[0]
        assert len(alone) == kind.num_frames(length)
        assert (found[row, : len(alone)] - alone).abs().max() < 1e-5, length


@pytest.mark.parametrize("toolkit", ["kaldi", "wespeaker", "3d-speaker"])
def test_a_waveform_shorter_than_a_window_is_one_frame_with_zeros_behind_it(toolkit: str) -> None:
    wave = 0.1 * torch.randn(1, 300, generator=torch.Generator().manual_seed(4))
    scale, window = (1 if toolkit == "3d-speaker" else 32768), ("hamming" if toolkit == "wespeaker" else "povey")
    expected = kaldi_fbank(torch.cat([wave, torch.zeros(1, 100)], 1) * scale, window)
    assert torch.allclose(input_features(FBANKS[toolkit], wave)[0], expected, atol=2e-3)


@pytest.mark.parametrize("samples", [80, 100, 119, 121, 239, 399, 400, 16_000, 16_079, 16_080, 31_999])
def test_sherpas_features_are_those_of_kaldi_native_fbank(samples: int) -> None:
    """With the options that sherpa-onnx sets: no snip-edges, filters to 7,600 Hz, no dither."""
    knf = pytest.importorskip("kaldi_native_fbank")
    options = knf.FbankOptions()
    options.frame_opts.dither, options.frame_opts.snip_edges, options.mel_opts.num_bins = 0.0, False, 80
    options.mel_opts.low_freq, options.mel_opts.high_freq = 20.0, -400.0
    wave = 0.1 * torch.randn(1, samples, generator=torch.Generator().manual_seed(samples))
    theirs = knf.OnlineFbank(options)
    theirs.accept_waveform(16_000, (wave[0] * 32768).tolist())
    theirs.input_finished()
    expected = torch.stack([torch.tensor(theirs.get_frame(i)) for i in range(theirs.num_frames_ready)])
    found = input_features(FBANKS["sherpa"], wave)[0]
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 2e-3


@pytest.mark.parametrize("toolkit", FBANKS)
def test_the_time_of_a_frame_is_where_an_impulse_moves_it(toolkit: str) -> None:
    """The mean place of an impulse, weighted by the energy of a frame, is the time for which the frame stands."""
    kind, number = FBANKS[toolkit], 10
    places = torch.arange(1200, 2400)
    waves = torch.zeros(len(places), 4000)
    waves[torch.arange(len(places)), places] = 0.5
    # The floor of the logarithm, and what the frame's mean spreads over it, are taken off.
    energy = input_features(kind, waves)[:, number].double().exp().sum(1)
    energy = (energy - energy.median()).clamp_min(0)
    centre = float((energy * places).sum() / energy.sum())
    assert centre == pytest.approx(kind.middle + number * 160, abs=3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_features_are_computed_outside_of_autocast(dtype: torch.dtype) -> None:
    waves = torch.randn(1, 4000, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    features: dict[str, Callable[[], Tensor]] = {
        **{name: partial(input_features, kind, waves) for name, kind in FEATURES.items()},
        "dvector": partial(linear_mel, waves),
        "nemo": partial(nemo_fbank, waves, 80),
        "sherpa-nemo": partial(nemo_bank, waves, 400, 160, "hann", 80),
        "speechbrain": partial(speechbrain_fbank, waves, Fbank(deltas=True)),
    }
    for name, compute in features.items():
        with torch.autocast("cpu", dtype):
            found = compute()
        assert found.dtype == torch.float32, name
        assert torch.equal(found, compute()), name
