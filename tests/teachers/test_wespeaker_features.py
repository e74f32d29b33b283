from __future__ import annotations

import numpy as np
import pytest
import torch

from spkd.teachers.wespeaker_features import TFMel, tfmel_front_end, whisper_front_end

from .fixed import fixed_wave

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("mels", [80, 128])
def test_energies_of_whisper_are_those_of_transformers(mels: int) -> None:
    extractor = transformers.WhisperFeatureExtractor(feature_size=mels, chunk_length=1)
    wave = fixed_wave()[:16_000]
    wave[4_000:9_000] = 0.0  # the floor is eight decades below the largest value
    expected = extractor(wave, sampling_rate=16_000, return_tensors="np")["input_features"][0].T
    front_end = whisper_front_end(mels)
    found = front_end.compute(torch.from_numpy(wave)[None], None)[0].numpy()
    assert found.shape == (front_end.frames.num_frames(16_000), mels)
    assert np.abs(found - expected).max() < 2e-5
    assert np.ptp(expected) == pytest.approx(2.0)


def test_the_floor_of_a_padded_view_is_its_own() -> None:
    compute = whisper_front_end(80).compute
    quiet, loud = torch.from_numpy(1e-4 * fixed_wave()[:12_000])[None], torch.from_numpy(fixed_wave())[None]
    both = torch.cat([loud, torch.nn.functional.pad(quiet, (0, loud.shape[1] - 12_000), value=0.5)])
    together = compute(both, torch.tensor([loud.shape[1], 12_000]))
    assert torch.allclose(together[1, :75], compute(quiet, None)[0], atol=1e-5)
    assert torch.allclose(together[0], compute(loud, None)[0], atol=1e-5)


def tfmel_by_formula(wave: np.ndarray, settings: TFMel) -> np.ndarray:
    """Log-mel energies (frames, mels), in float64, by sums over samples and bins."""
    x = wave.astype(np.float64)
    if settings.norm_signal:
        x = (x - x.mean()) / (x.std() + settings.eps)
    if settings.do_preemph:
        x = x - 0.97 * np.concatenate([x[1:2], x[:-1]])
    x = np.pad(x, 80)
    size = settings.win_length
    window = 0.54 - 0.46 * np.cos(2 * np.pi * np.arange(size) / (size - 1))
    frames = np.stack([x[i : i + size] * window for i in range(0, len(x) - size + 1, 160)])
    bins = np.arange(settings.n_fft // 2)
    spectra = frames @ np.exp(-2j * np.pi * np.arange(size)[:, None] * bins / settings.n_fft)
    power = np.clip(np.abs(spectra) ** 2, settings.eps, 1 / settings.eps)
    mel = 2595 * np.log10(1 + np.linspace(0, 8000, len(bins)) / 700)  # the last bin stands at 8 kHz
    edges = np.linspace(*(2595 * np.log10(1 + f / 700) for f in (settings.f_min, settings.f_max)), settings.n_mels + 2)
    filters = np.stack([np.interp(mel, edges[i : i + 3], [0.0, 1.0, 0.0]) for i in range(settings.n_mels)], 1)
    filters[0] = 0.0
    logarithms = np.log(np.clip(power @ filters, settings.eps, 1 / settings.eps) + settings.eps)
    return logarithms - logarithms.mean(0)


SETTINGS = [TFMel(), TFMel(n_mels=72, norm_signal=True), TFMel(do_preemph=False, eps=1e-4),
            TFMel(n_mels=40, n_fft=1024, win_length=640, f_min=100, f_max=6000)]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_energies_of_tfmel_follow_its_formula(settings: TFMel) -> None:
    wave = fixed_wave()
    wave[4_000:9_000] = 0.0
    front_end = tfmel_front_end(settings)
    found = front_end.compute(torch.from_numpy(wave)[None], None)[0].numpy()
    expected = tfmel_by_formula(wave, settings)
    assert found.shape == (front_end.frames.num_frames(len(wave)), settings.n_mels) == expected.shape
    assert np.abs(found - expected).max() < 2e-3 * np.ptp(expected)
    assert front_end.frames.middle == settings.win_length / 2 - 80


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_padding_changes_nothing_on_tfmel(settings: TFMel) -> None:
    front_end = tfmel_front_end(settings)
    long = torch.from_numpy(fixed_wave())[None]
    short = long[:, 3_000:12_047]
    both = torch.cat([long, torch.nn.functional.pad(short, (0, long.shape[1] - short.shape[1]), value=0.4)])
    together = front_end.compute(both, torch.tensor([long.shape[1], short.shape[1]]))
    alone = front_end.compute(short, None)[0]
    assert torch.allclose(together[1, : len(alone)], alone, atol=1e-3)
    assert torch.allclose(together[0], front_end.compute(long, None)[0], atol=1e-3)
