"""Formants move by the factor, and the pitch does not."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import solve_toeplitz
from scipy.signal import lfilter, resample_poly

from spkd.corpus.formants import FORMULAS, shift_formants

RATE = 16_000


def vowel(pitch: float, formants: tuple[float, ...], seconds: float = 1.0, glide: float = 0.1) -> np.ndarray:
    """Pulses through resonators of 80 Hz bandwidth; the pitch (Hz) glides up and down twice a second."""
    time = np.arange(round(RATE * seconds)) / RATE
    phase = np.cumsum(pitch * (1 + glide * np.sin(4 * np.pi * time))) / RATE
    wave = np.diff(np.floor(phase), prepend=-1.0)
    for frequency in formants:
        radius = np.exp(-np.pi * 80 / RATE)
        wave = lfilter([1.0], [1.0, -2 * radius * np.cos(2 * np.pi * frequency / RATE), radius**2], wave)
    return (wave / np.abs(wave).max()).astype(np.float32)


def pitch_of(wave: np.ndarray) -> float:
    """From the greatest autocorrelation at 60 to 400 Hz."""
    middle = wave[4000:12_000].astype(np.float64)
    found = np.correlate(middle, middle, "full")[len(middle) - 1 :]
    low, high = RATE // 400, RATE // 60
    return RATE / (low + int(np.argmax(found[low:high])))


def vowel_formants(wave: np.ndarray, ceiling: float) -> np.ndarray:
    """F1 to F3 (Hz) below a ceiling: median over frames of the poles of linear prediction (autocorrelation method)."""
    wave = resample_poly(wave.astype(np.float64), round(2 * ceiling), RATE)
    size, found = round(0.05 * 2 * ceiling), []
    for start in range(0, len(wave) - size, size // 2):
        frame = wave[start : start + size] * np.hanning(size)
        correlation = np.correlate(frame, frame, "full")[size - 1 : size + 10]
        poles = np.roots(np.append(1.0, -solve_toeplitz(correlation[:-1], correlation[1:])))
        frequency = np.sort(np.angle(poles[poles.imag > 0])) * ceiling / np.pi
        found.append(frequency[frequency > 150][:3])
    return np.median([few for few in found if len(few) == 3], axis=0)


@pytest.mark.parametrize("factor", [0.85, 0.92, 1.1, 1.2])
@pytest.mark.parametrize("pitch", [90.0, 120.0, 210.0])
def test_formants_move_by_the_factor_and_the_pitch_stays(pitch: float, factor: float) -> None:
    """As in the vowel that has the moved formants from the start, in low and high voices."""
    formants = np.array([650.0, 1350.0, 2500.0, 3500.0, 4400.0])
    wave, expected = vowel(pitch, tuple(formants)), vowel(pitch, tuple(factor * formants))
    moved = shift_formants(wave, factor)
    steady = vowel(pitch, tuple(formants), glide=0.0)
    assert pitch_of(shift_formants(steady, factor)) == pytest.approx(pitch, rel=0.01)
    ceiling = 5000.0 * factor
    assert vowel_formants(expected, ceiling) == pytest.approx(factor * formants[:3], rel=0.04)  # of the measure
    assert vowel_formants(moved, ceiling) == pytest.approx(vowel_formants(expected, ceiling), rel=0.03)


@pytest.mark.parametrize(
    ("factor", "expected"),
    [
        (0.88, [0.04915, 0.12959, 0.26217, 0.1978, 0.06611, -0.17999, -0.28458, -0.05473]),
        (1.12, [-0.10718, 0.01759, 0.40351, -0.18794, -0.05117, 0.13613, -0.17093, -0.05996]),
    ],
)
def test_version_2_stays_what_it_was(factor: float, expected: list[float]) -> None:
    """Samples that it gave before there was version 3 (spkd at d901d69)."""
    wave = vowel(120.0, (650.0, 1350.0, 2500.0), 0.25)
    assert shift_formants(wave, factor, 2)[500:3700:400].tolist() == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize("samples", [1, 255, 256, 257, 5000])
def test_what_is_not_filtered_comes_out_as_it_was(samples: int) -> None:
    """White noise of short duration has an envelope; a factor that moves nothing must not change a sample."""
    wave = np.random.RandomState(0).standard_normal(samples).astype(np.float32)
    assert shift_formants(wave, 1.0 + 1e-9) == pytest.approx(wave, abs=1e-5)


@pytest.mark.parametrize("version", FORMULAS)
def test_length_power_and_type_stay(version: int) -> None:
    wave = vowel(150.0, (500.0, 1500.0), 0.777)
    for factor in (0.8, 1.25):
        moved = shift_formants(wave, factor, version)
        assert moved.shape == wave.shape
        assert moved.dtype == np.float32
        assert np.mean(moved**2) == pytest.approx(np.mean(wave**2), rel=1e-3)
    assert shift_formants(wave, 1.0) is wave


@pytest.mark.parametrize("version", FORMULAS)
@pytest.mark.parametrize("samples", [0, 1, 100, 511])
def test_short_and_silent_waveforms(samples: int, version: int) -> None:
    for wave in (np.zeros(samples, np.float32), np.full(samples, 0.1, np.float32)):
        moved = shift_formants(wave, 1.1, version)
        assert moved.shape == wave.shape
        assert np.isfinite(moved).all()
