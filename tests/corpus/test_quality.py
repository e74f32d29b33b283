"""Speech is found where a voice is, and not in noise, hum and tones."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.signal

from spkd.corpus.quality import remarks_on, voicing_of
from spkd.demo.synthesis import speaker, utterance

TIME = np.arange(32_000) / 16_000


def by_the_formula(wave: np.ndarray) -> tuple[int, int, float]:
    """Windows that are not faint, voiced ones, and the variation of their level, sample by sample."""
    slow = [sum(map(float, wave[i : i + 4])) / 4 for i in range(0, len(wave) - 3, 4)]
    levels, voiced = [], 0
    for start in range(0, len(slow) - 226 + 1, 80):
        x = slow[start : start + 226]
        mean = sum(x) / 226
        x = [value - mean for value in x]
        power = math.fsum(v * v for v in x[:160])
        if power <= 0 or 10 * math.log10(power / 160) <= -65:
            continue
        levels.append(10 * math.log10(power / 160))
        r = {
            lag: math.fsum(x[i] * x[i + lag] for i in range(160))
            / math.sqrt(power * math.fsum(x[i + lag] ** 2 for i in range(160)))
            for lag in range(9, 67)
        }
        voiced += any(r[lag] > 0.7 and r[lag - 1] < r[lag] >= r[lag + 1] for lag in range(10, 66))
    return len(levels), voiced, float(np.std(levels)) if levels else 0.0


def test_voicing_is_the_formula() -> None:
    random = np.random.RandomState(0)
    waves = [
        utterance(speaker(2), 200, 0.6),
        0.1 * random.randn(8_000),
        0.1 * np.sin(800 * TIME[:8_000]),
        np.zeros(8_000),
    ]
    for wave in (each.astype(np.float32) for each in waves):
        found, expected = voicing_of(wave), by_the_formula(wave)
        assert (found.windows, found.voiced) == expected[:2]
        assert found.variation == pytest.approx(expected[2], abs=1e-9)
    assert voicing_of(np.zeros(0, np.float32)).windows == 0
    assert not voicing_of(np.zeros(100, np.float32)).is_speech


def test_a_pulse_train_is_voiced_where_it_is() -> None:
    """Pulses at 62 to 400 Hz in the first half, and noise of the same level in the second."""
    noise = 0.05 * np.random.RandomState(1).randn(16_000)
    for pitch in (80, 120, 200, 330):
        pulses = scipy.signal.lfilter([1], [1, -0.9], (np.arange(16_000) % (16_000 // pitch) == 0).astype(float))
        found = voicing_of(np.concatenate([0.3 * pulses, noise]).astype(np.float32))
        assert found.windows == 98  # of 56.5 ms, every 20 ms of 2 s
        assert 45 <= found.voiced <= 52, pitch


@pytest.mark.parametrize("level", [-50.0, -20.0])
def test_sound_without_speech_gets_no_decision(level: float) -> None:
    random = np.random.RandomState(2)
    white = random.randn(32_000)
    waves = {
        "white": white,
        "brown": scipy.signal.lfilter([1], [1, -0.98], white),
        "of a band": scipy.signal.sosfilt(scipy.signal.butter(4, [300, 3400], "band", fs=16_000, output="sos"), white),
        "mains hum": np.sin(2 * np.pi * 50 * TIME) + 0.3 * np.sin(2 * np.pi * 150 * TIME),
        "tone": np.sin(2 * np.pi * 140 * TIME),
        "motor": scipy.signal.sawtooth(2 * np.pi * 120 * TIME) + 0.1 * white,
        "noise in beats": white * (1 + 0.9 * np.sin(2 * np.pi * 4 * TIME)),
    }
    for name, wave in waves.items():
        scaled = (wave / wave.std() * 10 ** (level / 20)).astype(np.float32)
        (remark,) = remarks_on(scaled, "")
        assert (remark.text.startswith("no speech found ("), remark.is_minor) == (True, False), name
        assert remarks_on(scaled, "", has_speech=True) == []


def test_speech_is_found_at_any_level_and_offset_and_within_silence() -> None:
    wave = utterance(speaker(3), 300, 2.0).astype(np.float32)
    for gain in (10.0 ** (-46 / 20) / wave.std(), 1.0):
        assert remarks_on((gain * wave).astype(np.float32), "") == []
    assert remarks_on((wave + 0.2).astype(np.float32), "") == []
    for share, room, found in ((0.05, 0.0, 0), (0.2, 0.0, 1), (0.7, 1e-3, 0), (0.9, 1e-3, 1)):
        count = round(len(wave) * share / (1 - share)) // 2
        noise = room * np.random.RandomState(0).randn(count)
        remarks = remarks_on(np.concatenate([noise, wave, noise]).astype(np.float32), "")
        assert [remark.is_minor for remark in remarks] == [True] * found, (share, room)
