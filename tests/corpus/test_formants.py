"""Formants move by the factor, and the pitch does not."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.signal import lfilter

from spkd.corpus.formants import shift_formants

RATE = 16_000


def vowel(pitch: float, formants: tuple[float, ...], seconds: float = 1.0) -> np.ndarray:
    """Pulses through resonators of 80 Hz bandwidth."""
    wave = np.zeros(round(RATE * seconds))
    wave[(np.arange(0, seconds * pitch) / pitch * RATE).astype(int)] = 1.0
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


def peak_of(wave: np.ndarray, low: float, high: float) -> float:
    """Centre of gravity of the power between two frequencies."""
    power = np.abs(np.fft.rfft(wave)) ** 2
    frequency = np.fft.rfftfreq(len(wave), 1 / RATE)
    inside = (frequency > low) & (frequency < high)
    return float((power[inside] * frequency[inside]).sum() / power[inside].sum())


@pytest.mark.parametrize("factor", [0.84, 0.92, 1.1, 1.19])
@pytest.mark.parametrize("pitch", [110.0, 210.0])
def test_a_formant_moves_and_the_pitch_stays(factor: float, pitch: float) -> None:
    wave = vowel(pitch, (700.0, 1800.0))
    moved = shift_formants(wave, factor)
    assert pitch_of(moved) == pytest.approx(pitch_of(wave), rel=0.01)
    before, after = peak_of(wave, 1300, 2400), peak_of(moved, 1300 * factor, 2400 * factor)
    assert after / before == pytest.approx(factor, abs=0.04)  # the smooth envelope blurs a formant


def test_length_power_and_type_stay() -> None:
    wave = vowel(150.0, (500.0, 1500.0), 0.777)
    for factor in (0.8, 1.25):
        moved = shift_formants(wave, factor)
        assert moved.shape == wave.shape
        assert moved.dtype == np.float32
        assert np.mean(moved**2) == pytest.approx(np.mean(wave**2), rel=1e-3)
    assert shift_formants(wave, 1.0) is wave


@pytest.mark.parametrize("samples", [0, 1, 100, 511])
def test_short_and_silent_waveforms(samples: int) -> None:
    for wave in (np.zeros(samples, np.float32), np.full(samples, 0.1, np.float32)):
        moved = shift_formants(wave, 1.1)
        assert moved.shape == wave.shape
        assert np.isfinite(moved).all()
