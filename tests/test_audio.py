from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.signal
import soundfile

from spkd.audio import AudioError, change_speed, decode, probe, resample


def tone(hertz: float, rate: int, seconds: float = 0.5) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def test_decoding_is_exact_for_16_bit_files(tmp_path: Path) -> None:
    samples = np.random.RandomState(0).randint(-(2**15), 2**15, 8000).astype(np.int16)
    for suffix in ("wav", "flac"):
        soundfile.write(tmp_path / f"a.{suffix}", samples, 16_000)
        assert np.array_equal(decode(str(tmp_path / f"a.{suffix}")).wave, samples / np.float32(2**15))
        part = decode(str(tmp_path / f"a.{suffix}"), 0.1, 0.2).wave
        assert np.array_equal(part, samples[1600:4800] / np.float32(2**15))


@pytest.mark.parametrize("rate", [8000, 22_050, 44_100, 48_000])
def test_other_rates_are_resampled(tmp_path: Path, rate: int) -> None:
    soundfile.write(tmp_path / "a.wav", tone(440, rate), rate, subtype="FLOAT")
    decoded = decode(str(tmp_path / "a.wav"))
    assert decoded.rate == rate
    inner = slice(800, 7200)  # away from the edges
    assert np.abs(decoded.wave[inner] - tone(440, 16_000)[inner]).max() < 2e-3


def test_resampling_agrees_with_scipy() -> None:
    wave = np.random.RandomState(0).randn(4800).astype(np.float32)
    wave = scipy.signal.sosfilt(scipy.signal.butter(8, 0.25, output="sos"), wave).astype(np.float32)
    ours, theirs = resample(wave, 48_000, 16_000), scipy.signal.resample_poly(wave, 1, 3)
    assert len(ours) == len(theirs)
    assert np.abs(ours - theirs)[50:-50].max() < 0.02 * np.abs(theirs).max()


def test_channels_are_averaged(tmp_path: Path) -> None:
    left, right = tone(200, 16_000), tone(300, 16_000)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], 1), 16_000, subtype="FLOAT")
    decoded = decode(str(tmp_path / "a.wav"))
    assert decoded.channels == 2
    assert np.allclose(decoded.wave, (left + right) / 2, atol=1e-6)


def test_speed_shifts_pitch_and_length() -> None:
    faster = change_speed(tone(440, 16_000, 1.0).astype(np.float32), 1.1)
    assert abs(len(faster) - 16_000 / 1.1) < 2
    peak = np.argmax(np.abs(np.fft.rfft(faster))) * 16_000 / len(faster)
    assert abs(peak - 440 * 1.1) < 2
    wave = np.ones(10, np.float32)
    assert change_speed(wave, 1.0) is wave


def test_bad_files_say_why(tmp_path: Path) -> None:
    empty, text, nan, nothing = (tmp_path / f"{n}.wav" for n in ("empty", "text", "nan", "nothing"))
    empty.touch()
    text.write_text("not audio")
    soundfile.write(nan, np.array([0.0, np.nan, 0.1]), 16_000, subtype="FLOAT")
    soundfile.write(nothing, np.zeros(0), 16_000)
    for path, reason in (
        (tmp_path / "none.wav", "no such file"),
        (empty, "empty file"),
        (text, "cannot be decoded"),
        (nan, "not finite"),
        (nothing, "no samples"),
    ):
        with pytest.raises(AudioError, match=reason):
            decode(str(path))
    for path, reason in ((empty, "empty file"), (text, "cannot be decoded"), (nothing, "no samples")):
        with pytest.raises(AudioError, match=reason):
            probe(str(path))
