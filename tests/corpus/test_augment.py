from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.signal
import soundfile

from spkd.corpus.audio import exact_length
from spkd.corpus.augment import Augmentation, Bank, bank, coloured_noise, convolve, convolve_at_once, mix
from spkd.errors import SpkdError, UsageError


def random_wave(samples: int = 8000, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.RandomState(seed).randn(samples)).astype(np.float32)


@pytest.mark.parametrize("snr", [-5.0, 0.0, 12.5])
def test_noise_is_mixed_at_the_ratio_asked_for(snr: float) -> None:
    wave, noise = random_wave(), random_wave(seed=1)
    added = mix(wave, noise, snr).astype(np.float64) - wave
    assert abs(10 * np.log10(np.mean(wave.astype(np.float64) ** 2) / np.mean(added**2)) - snr) < 1e-3
    assert np.array_equal(mix(wave, np.zeros_like(wave), snr), wave)


@pytest.mark.parametrize("reverberate", [convolve, convolve_at_once])
@pytest.mark.parametrize("taps", [1, 31, 400, 2048, 2049, 9601])
@pytest.mark.parametrize("samples", [1, 300, 2048, 8191])
def test_reverberation_is_convolution_with_the_direct_path_in_place(
    reverberate: Callable[[np.ndarray, np.ndarray], np.ndarray], taps: int, samples: int
) -> None:
    wave, response = random_wave(samples), np.zeros(taps)
    response[:] = 0.01 * np.random.RandomState(2).standard_normal(taps)
    direct = min(30, taps - 1)
    response[direct] = 1.0
    wet = reverberate(wave, response).astype(np.float64)
    expected = scipy.signal.fftconvolve(wave.astype(np.float64), response)[direct : direct + samples]
    expected *= np.sqrt(np.mean(wave.astype(np.float64) ** 2) / np.mean(expected**2))
    assert np.allclose(wet, expected, atol=1e-6)


def test_the_second_version_of_reverberation_and_noise_is_the_one_of_today() -> None:
    wave = random_wave(4001)  # a prime number
    before, now = Augmentation(noise="synthetic", noise_prob=1.0, version=1), Augmentation("synthetic", 1.0)
    random = np.random.RandomState(3)
    random.random_sample(2)
    decibel = random.uniform(5.0, 20.0)
    state = random.get_state()
    assert np.array_equal(before(wave, 3), mix(wave, coloured_noise(random, 4001), decibel))
    random.set_state(state)
    assert np.array_equal(now(wave, 3), mix(wave, coloured_noise(random, 4050)[:4001], decibel))  # 2 * 3^4 * 5^2
    assert [a.card().version for a in (before, now, Augmentation(), Augmentation(coders=["gsm"]))] == [1, 2, 1, 1]


@pytest.mark.parametrize(
    ("name", "rate", "channels"),
    [
        *(("a.wav", 16_000, 1), ("a.flac", 16_000, 2), ("a.wav", 44_100, 1), ("a.flac", 48_000, 1)),
        *(("a.wav", 8_000, 1), ("a.aiff", 22_050, 2), ("a.wav", 15_999, 1), ("a.ogg", 16_000, 1)),
    ],
)
def test_a_stretch_of_noise_is_that_of_the_whole_file(
    name: str, rate: int, channels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same samples, whether a file stays in memory or a stretch of it is decoded."""
    samples = 0.1 * np.random.RandomState(1).standard_normal((3 * rate // 2, channels))
    soundfile.write(tmp_path / name, samples, rate)
    whole = Bank(str(tmp_path), (str(tmp_path / name),))
    assert whole.is_kept
    monkeypatch.setattr("spkd.corpus.augment.KEPT_SECONDS", 0.0)
    pieces = Bank(str(tmp_path), (str(tmp_path / name),))
    assert not pieces.is_kept
    for seed in range(12):
        length = (1, 999, 8000, 30_000)[seed % 4]  # the last is longer than the file
        one, other = (b.stretch(np.random.RandomState(seed), length, coloured_noise) for b in (whole, pieces))
        assert len(one) == length
        assert np.array_equal(one, other)


def test_a_file_with_a_wrong_length_is_decoded_as_a_whole(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.flac", random_wave(16_000), 16_000)
    assert exact_length(str(tmp_path / "a.flac")) == 16_000
    data = bytearray((tmp_path / "a.flac").read_bytes())
    data[21:26] = (int.from_bytes(data[21:26], "big") + 4000).to_bytes(5, "big")  # samples in all: the lower 36 bits
    (tmp_path / "longer.flac").write_bytes(data)
    assert exact_length(str(tmp_path / "longer.flac")) is None
    noise = Augmentation(noise=str(tmp_path), noise_prob=1.0)
    assert np.isfinite(noise(random_wave(20_000), 1)).all()


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


def test_a_response_of_several_channels_is_its_first(tmp_path: Path) -> None:
    """Their mean would have the direct path of each microphone: an echo. Caches of version 1 have it."""
    response = np.zeros((800, 2), np.float32)
    response[100, 0], response[140, 1], response[200] = 1.0, 1.0, 0.25
    soundfile.write(tmp_path / "a.wav", response, 16_000, subtype="FLOAT")
    wave = random_wave(4000)
    for version, taps in ((2, response[:, 0]), (1, response.mean(1))):
        wet = Augmentation(rir=str(tmp_path), rir_prob=1.0, version=version)(wave, 3)
        expected = np.convolve(wave.astype(np.float64), taps)[100 : 100 + len(wave)]
        expected *= np.linalg.norm(wave) / np.linalg.norm(expected)
        assert np.abs(wet - expected).max() < 1e-5


def decaying(seconds: float, before: float) -> np.ndarray:
    """A simulated response (Polack, 1988): noise that decays by 60 dB in `seconds`, behind a floor at -50 dB."""
    random, rate = np.random.RandomState(round(100 * seconds)), 16_000
    times = np.arange(round(1.2 * seconds * rate)) / rate
    tail = random.standard_normal(len(times)) * 10 ** (-3 * times / seconds)
    tail[0] = 4.0
    floor = random.standard_normal(round(before * rate) + len(tail)) * 10**-2.5
    floor[-len(tail) :] += tail
    return floor / 5


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        *((decaying(seconds, before), "") for seconds, before in ((0.2, 0.0), (0.8, 0.05), (8.0, 0.3), (0.3, 0.9))),
        (decaying(26.0, 0.0), "31 s, longer than 30 s"),
        (decaying(0.5, 1.5), "its largest sample is 1.5 s after its beginning"),
        (np.zeros(400), "digital silence"),
        (np.random.RandomState(0).uniform(-0.5, 0.5, 16_000), "% of its energy comes before its largest sample"),
    ],
)
def test_what_is_no_response_is_refused(tmp_path: Path, response: np.ndarray, reason: str) -> None:
    soundfile.write(tmp_path / "a.wav", response, 16_000, subtype="FLOAT")
    reverberate = Augmentation(rir=str(tmp_path), rir_prob=1.0)
    if not reason:
        reverberate.check()
        assert reverberate(random_wave(400), 3).shape == (400,)
        return
    for refusing in (reverberate.check, lambda: reverberate(random_wave(400), 3)):
        with pytest.raises(SpkdError, match=rf"a.wav: no impulse response of a room \(.*{reason}"):
            refusing()


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
