from __future__ import annotations

import numpy as np
import torch

from spkd.demo.synthesis import speaker, utterance
from spkd.outputs.features import fbank


def test_an_utterance_is_decided_by_voice_and_seed() -> None:
    assert np.array_equal(utterance(speaker(1), 5, 1.0), utterance(speaker(1), 5, 1.0))
    assert not np.array_equal(utterance(speaker(1), 5, 1.0), utterance(speaker(1), 6, 1.0))
    wave = utterance(speaker(1), 5, 1.25)
    assert wave.shape == (20_000,)
    assert wave.dtype == np.float32
    assert 0.05 < np.abs(wave).max() < 0.9


def test_pitch_is_the_speakers() -> None:
    for seed in range(8):
        instance = speaker(seed)
        wave = utterance(instance, 1, 4.0).astype(np.float64)
        frames = np.lib.stride_tricks.sliding_window_view(wave, 1024)[::256] * np.hanning(1024)
        correlation = np.fft.irfft(np.abs(np.fft.rfft(frames, 2048)) ** 2)[:, 40:260]
        strong = correlation.max(1) > np.quantile(correlation.max(1), 0.6)
        measured = 16_000 / (40 + np.median(correlation[strong].argmax(1)))
        octaves = np.log2(measured / instance.pitch)
        assert abs(octaves - round(octaves)) < 0.25  # octave errors are the autocorrelation's


def test_speakers_differ_more_than_their_utterances() -> None:
    means = np.stack(
        [
            [fbank(torch.from_numpy(utterance(speaker(s), 10 * s + u, 2.0))[None])[0].mean(0).numpy() for u in range(3)]
            for s in range(8)
        ]
    )
    means = means - means.mean(2, keepdims=True)
    within = means.std(1).mean()
    between = means.mean(1).std(0).mean()
    assert between > 1.5 * within
