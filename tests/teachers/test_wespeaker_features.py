from __future__ import annotations

import numpy as np
import pytest
import torch

from spkd.teachers.wespeaker_features import whisper_front_end

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
