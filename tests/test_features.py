from __future__ import annotations

import pytest
import torch
from torchaudio.compliance.kaldi import fbank as kaldi_fbank

from spkd.features import FBANKS, fbank, input_features


@pytest.mark.parametrize("samples", [400, 559, 560, 16_000])
def test_equal_to_kaldi_for_any_length_and_batch(samples: int) -> None:
    waves = 0.1 * torch.randn(3, samples, generator=torch.Generator().manual_seed(0))
    expected = torch.stack(
        [
            kaldi_fbank(w[None] * 32768, num_mel_bins=80, dither=0.0, energy_floor=0.0, window_type="povey")
            for w in waves
        ]
    )
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
    expected = torch.stack(
        [kaldi_fbank(w[None] * scale, num_mel_bins=80, dither=0.0, window_type=window, use_energy=False) for w in waves]
    )
    ours = input_features(FBANKS[toolkit], waves)
    assert torch.allclose(ours, expected, atol=2e-3)
    if toolkit != "kaldi":
        assert not torch.allclose(ours, fbank(waves), atol=2e-3)


def test_a_long_waveform_has_the_frames_of_its_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    wave = torch.randn(2, 16_000, generator=torch.Generator().manual_seed(2))
    whole = fbank(wave)
    monkeypatch.setattr("spkd.features.AT_ONCE", 7)
    assert torch.allclose(fbank(wave), whole, atol=1e-5)
