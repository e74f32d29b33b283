from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.signal
import soundfile

from spkd.corpus.augment import Augmentation, bank, coloured_noise, convolve, mix
from spkd.errors import SpkdError, UsageError


def random_wave(samples: int = 8000, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.RandomState(seed).randn(samples)).astype(np.float32)


@pytest.mark.parametrize("snr", [-5.0, 0.0, 12.5])
def test_noise_is_mixed_at_the_ratio_asked_for(snr: float) -> None:
    wave, noise = random_wave(), random_wave(seed=1)
    added = mix(wave, noise, snr).astype(np.float64) - wave
    assert abs(10 * np.log10(np.mean(wave.astype(np.float64) ** 2) / np.mean(added**2)) - snr) < 1e-3
    assert np.array_equal(mix(wave, np.zeros_like(wave), snr), wave)


def test_reverberation_is_convolution_with_the_direct_path_in_place() -> None:
    wave = random_wave()
    response = np.zeros(400)
    response[30], response[200] = 1.0, 0.5
    wet = convolve(wave, response).astype(np.float64)
    expected = scipy.signal.convolve(wave.astype(np.float64), response)[30 : 30 + len(wave)]
    expected *= np.sqrt(np.mean(wave.astype(np.float64) ** 2) / np.mean(expected**2))
    assert np.allclose(wet, expected, atol=1e-6)
    assert np.allclose(convolve(wave, np.array([0.0, 2.0])), wave, atol=1e-6)


def test_it_is_a_pure_function_of_waveform_and_seed() -> None:
    augment = Augmentation(noise="synthetic", noise_prob=1.0)
    wave = random_wave()
    assert np.array_equal(augment(wave, 5), augment(wave, 5))
    assert not np.array_equal(augment(wave, 5), augment(wave, 6))
    assert Augmentation()(wave, 5) is wave


def test_probabilities_are_kept() -> None:
    augment = Augmentation(noise="synthetic", noise_prob=0.3)
    wave = random_wave(400)
    touched = sum(not np.array_equal(augment(wave, seed), wave) for seed in range(400))
    assert 80 < touched < 160


def test_banks_are_identified_by_content_not_by_place(tmp_path: Path) -> None:
    for folder, count in (("a", 2), ("b", 2), ("c", 1)):
        (tmp_path / folder).mkdir()
        for i in range(count):
            soundfile.write(tmp_path / folder / f"{i}.wav", random_wave(300), 16_000)
    assert bank(str(tmp_path / "a")).digest == bank(str(tmp_path / "b")).digest
    assert bank(str(tmp_path / "a")).digest != bank(str(tmp_path / "c")).digest
    # Of the same names and sizes, but another content.
    shutil.copytree(tmp_path / "b", tmp_path / "d")
    soundfile.write(tmp_path / "d" / "1.wav", -random_wave(300), 16_000)
    noise, rir = (Augmentation(**{kind: str(tmp_path / "a")}) for kind in ("noise", "rir"))
    assert noise.card() != Augmentation(noise=str(tmp_path / "d")).card()
    assert rir.card() != Augmentation(rir=str(tmp_path / "d")).card()
    files = sorted((tmp_path / "a").iterdir())
    listing = "".join(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n" for file in files)
    assert noise.card().noise == hashlib.sha256(listing.encode()).hexdigest()
    noisy = Augmentation(noise=str(tmp_path / "a"), noise_prob=1.0)(random_wave(1000), 3)  # longer than the noise
    assert noisy.shape == (1000,)
    wet = Augmentation(rir=str(tmp_path / "a"), rir_prob=1.0)(random_wave(1000), 3)
    assert wet.shape == (1000,)
    assert not np.array_equal(wet, random_wave(1000))


def test_synthetic_noise_has_unit_power() -> None:
    for seed in range(5):
        assert abs(np.mean(coloured_noise(np.random.RandomState(seed), 4000) ** 2) - 1) < 1e-6


def test_bad_settings(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="probability"):
        Augmentation(noise_prob=1.5)
    with pytest.raises(UsageError, match="view.snr"):
        Augmentation(snr=(20.0, 5.0))
    with pytest.raises(SpkdError, match="no audio files"):
        bank(str(tmp_path))
