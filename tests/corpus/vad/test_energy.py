"""The energy-based detector against Kaldi's features, and against its decision frame by frame."""

from __future__ import annotations

import math

import numpy as np
import pytest

from spkd.corpus.vad.energy import Energy, log_energies, voiced


def noise(samples: int, level: float, seed: int = 0) -> np.ndarray:
    return (level * np.random.RandomState(seed).randn(samples)).astype(np.float32)


@pytest.mark.parametrize("samples", [80, 161, 399, 400, 4000, 12_345])
def test_energies_are_those_of_kaldi(samples: int) -> None:
    knf = pytest.importorskip("kaldi_native_fbank")
    wave = noise(samples, 0.05) + np.float32(0.01)  # with an offset, which Kaldi takes out
    options = knf.MfccOptions()  # its first coefficient is the log energy
    options.frame_opts.dither, options.frame_opts.snip_edges = 0.0, False
    mfcc = knf.OnlineMfcc(options)
    mfcc.accept_waveform(16_000, (wave * 32768).tolist())
    mfcc.input_finished()
    expected = [mfcc.get_frame(frame)[0] for frame in range(mfcc.num_frames_ready)]
    np.testing.assert_allclose(log_energies(wave), expected, rtol=1e-5)


def test_energies_of_digital_silence_are_at_the_floor() -> None:
    np.testing.assert_allclose(log_energies(np.zeros(800, np.float32)), [math.log(2.0**-23)] * 5)


def decided(energies: np.ndarray) -> list[bool]:
    """Decision of compute-vad, frame by frame (ivector/voice-activity-detection.cc)."""
    threshold = 5.5 + 0.5 * math.fsum(energies) / len(energies)
    result = []
    for t in range(len(energies)):
        near = [energies[u] > threshold for u in range(t - 2, t + 3) if 0 <= u < len(energies)]
        result.append(sum(near) >= len(near) * 0.12)
    return result


def test_frames_are_decided_as_by_kaldi() -> None:
    random = np.random.RandomState(1)
    for count in (1, 2, 3, 4, 50, 400):
        energies = np.where(random.rand(count) < 0.1, 20.0, 8.0) + random.randn(count)
        assert voiced(energies).tolist() == decided(energies)


def test_stretches_are_the_hops_of_the_frames_of_speech() -> None:
    wave = np.concatenate([noise(n, level, n) for n, level in ((8000, 1e-4), (9000, 0.1), (7000, 1e-4), (5070, 0.1))])
    stretches = Energy().detect(wave)
    inside = np.zeros(len(wave), bool)
    for first, last in stretches:
        assert not inside[first:last].any()
        inside[first:last] = True
    # Frames of 10 ms; the 110 samples after the last whole one are of the last frame.
    expected = decided(log_energies(wave))
    assert [bool(inside[t * 160]) for t in range(len(expected))] == expected
    assert inside[:29_070].sum() == sum(expected[:-1]) * 160 + 29_070 - (len(expected) - 1) * 160
    (first, end), (second, last) = stretches
    assert (abs(first - 8000) < 500, abs(end - 17_000) < 500, abs(second - 24_000) < 500, last) == (*[True] * 3, 29_070)


def test_silence_and_nothing_have_no_speech() -> None:
    for samples in (0, 79, 80, 16_000):
        assert Energy().detect(np.zeros(samples, np.float32)) == []


def test_a_long_waveform_is_computed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    wave = noise(50_000, 0.1)
    whole = log_energies(wave)
    monkeypatch.setattr("spkd.corpus.vad.energy.AT_ONCE", 7)
    np.testing.assert_array_equal(log_energies(wave), whole)
