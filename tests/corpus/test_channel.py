"""What goes through a coder comes out as speech of the same length, in its band."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from spkd.corpus.augment import Augmentation
from spkd.corpus.channel import CODERS, NARROW, transmit
from spkd.corpus.manifest import Manifest
from spkd.corpus.settings import CODER_NAMES
from spkd.errors import SpkdError


@pytest.fixture
def speech(manifest: Manifest) -> np.ndarray:
    return soundfile.read(manifest[0].path, dtype="float32")[0]


def band(wave: np.ndarray, low: float, high: float) -> float:
    power = np.abs(np.fft.rfft(wave)) ** 2
    frequency = np.fft.rfftfreq(len(wave), 1 / 16_000)
    return float(power[(frequency >= low) & (frequency < high)].sum())


@pytest.mark.parametrize("coder", CODERS)
def test_length_stays_and_speech_is_recognisable(coder: str, speech: np.ndarray) -> None:
    for wave in (speech, speech[:1234], 3.0 * speech):
        sent = transmit(wave, coder)
        assert sent.shape == wave.shape
        assert sent.dtype == np.float32
        assert not np.array_equal(sent, wave)
    sent = transmit(speech, coder)
    assert np.array_equal(sent, transmit(speech, coder))
    ratio = band(sent, 400, 3000) / band(speech, 400, 3000)
    assert 0.25 < ratio < 2.0


@pytest.mark.parametrize("coder", NARROW)
def test_a_telephone_has_its_band(coder: str) -> None:
    noise = np.random.RandomState(0).randn(32_000).astype(np.float32) * 0.1
    sent = transmit(noise, coder)
    inside = band(sent, 500, 3000) / 2500
    assert band(sent, 4200, 8000) / 3800 < 0.02 * inside
    assert band(sent, 20, 120) / 100 < 0.2 * inside


def test_the_settings_name_every_coder() -> None:
    assert tuple(CODERS) == CODER_NAMES


def test_a_missing_coder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CODERS, "opus", ("OGG", "NO_SUCH", None))
    with pytest.raises(SpkdError, match="opus"):
        transmit(np.zeros(1000, np.float32), "opus")


def test_augmentation_draws_by_the_seed_and_leaves_older_draws_alone(speech: np.ndarray, tmp_path: Path) -> None:
    plain = Augmentation(noise="synthetic", noise_prob=0.5)
    coded = Augmentation(noise="synthetic", noise_prob=0.5, coders=("g711", "opus"), coder_prob=0.5)
    changed = 0
    for seed in range(12):
        before, after = plain(speech, seed), coded(speech, seed)
        assert np.array_equal(after, coded(speech, seed))
        same = np.array_equal(before, after)
        changed += not same
        assert same or any(np.array_equal(after, transmit(before, c)) for c in ("g711", "opus"))
    assert 2 < changed < 11
