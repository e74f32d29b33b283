"""The GE2E d-vector against its definition written out, with random weights; real weights where ../shared is."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from spkd.errors import SpkdError, UsageError
from spkd.eval.metrics import curve, eer
from spkd.eval.trials import read
from spkd.teachers.dvector import DVector, linear_mel, raise_loudness

from ..conftest import SHARED

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    lstm, linear = torch.nn.LSTM(40, 256, 3), torch.nn.Linear(256, 256)
    tensors = {f"lstm.{k}": v for k, v in lstm.state_dict().items()} | {
        f"linear.{k}": v for k, v in linear.state_dict().items()
    }
    path = tmp_path_factory.mktemp("w") / "ge2e.safetensors"
    save_file({k: v.contiguous() for k, v in tensors.items()}, path)
    return path


def slaney_mel(hz: float) -> float:
    return hz * 3 / 200 if hz < 1000 else 15 + 27 * math.log(hz / 1000) / math.log(6.4)


def test_mel_bands_are_slaneys_written_out() -> None:
    wave = torch.randn(1, 1600, generator=torch.Generator().manual_seed(0))
    padded = np.pad(wave[0].double().numpy(), 200, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    frames = np.stack([padded[i * 160 : i * 160 + 400] * window for i in range(11)])
    power = np.abs(np.fft.rfft(frames)) ** 2
    points = np.linspace(0, slaney_mel(8000), 42)
    hz = np.array([m * 200 / 3 if m < 15 else 1000 * math.exp((m - 15) * math.log(6.4) / 27) for m in points])
    bins = np.arange(201) * 40.0
    filters = np.zeros((40, 201))
    for i in range(40):
        for k, f in enumerate(bins):
            rise, fall = (f - hz[i]) / (hz[i + 1] - hz[i]), (hz[i + 2] - f) / (hz[i + 2] - hz[i + 1])
            filters[i, k] = max(0.0, min(rise, fall)) * 2 / (hz[i + 2] - hz[i])
    assert np.allclose(linear_mel(wave)[0], power @ filters.T, rtol=1e-4, atol=1e-6)


def test_quiet_views_are_raised_to_minus_30_dbfs_and_loud_ones_kept() -> None:
    waves = torch.stack([torch.full((100,), 1e-3), torch.full((100,), 0.5)])
    raised = raise_loudness(waves)
    assert abs(20 * math.log10(raised[0].square().mean().sqrt().item()) + 30) < 1e-3
    assert torch.equal(raised[1], waves[1])


def test_every_target_is_what_the_network_says(weights: Path) -> None:
    teacher = DVector(str(weights), CPU)
    samples = 3 * 16_000 + 123
    waves = 0.2 * torch.randn(2, samples, generator=torch.Generator().manual_seed(0))
    outputs = teacher.extract(waves, list(teacher.targets))
    mel = linear_mel(waves)
    lstm = teacher._lstm
    starts = range(0, mel.shape[1] - 160 + 1, 80)
    with torch.no_grad():
        windows = [torch.relu(teacher._linear(lstm(mel[:, s : s + 160])[0][:, -1])) for s in starts]
        windows = [w / w.norm(dim=-1, keepdim=True) for w in windows]
        mean = torch.stack(windows).mean(0)
        frames = lstm(mel)[0]
    assert np.allclose(outputs["windows"], torch.stack(windows, 1), atol=1e-5)
    assert np.allclose(outputs["embedding"], mean / mean.norm(dim=-1, keepdim=True), atol=1e-5)
    assert np.allclose(outputs["frames.layer3"], frames, atol=1e-5)
    moments = torch.cat([frames.mean(1), frames.std(1, correction=0).clamp_min(1e-3)], -1)
    assert np.allclose(outputs["stats"], moments, atol=1e-5)


@pytest.mark.parametrize("samples", [500, 25_439, 25_440, 38_239, 38_240, 60_001])
def test_the_declared_number_of_rows_is_given(weights: Path, samples: int) -> None:
    teacher = DVector(str(weights), CPU)
    outputs = teacher.extract(torch.randn(1, samples), list(teacher.targets))
    for name, target in teacher.targets.items():
        shape = outputs[name].shape[1:]
        assert shape == ((target.dim,) if target.hop is None else (int(target.num_frames(samples)), target.dim)), name


def test_bad_weights(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        DVector(str(tmp_path / "none.pt"), CPU)
    (tmp_path / "bad.pt").write_bytes(b"nothing")
    with pytest.raises(SpkdError, match="cannot be read as weights"):
        DVector(str(tmp_path / "bad.pt"), CPU)
    save_file({"lstm.weight_ih_l0": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(SpkdError, match="not the weights of the GE2E d-vector"):
        DVector(str(tmp_path / "other.safetensors"), CPU)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    import pickle

    class Bomb:
        def __reduce__(self):  # type: ignore[no-untyped-def]
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "bomb.pt").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(SpkdError, match="cannot be read as weights"):
        DVector(str(tmp_path / "bomb.pt"), CPU)
    assert not (tmp_path / "ran").exists()


REAL = SHARED / "teachers" / "ge2e-dvector.safetensors"


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_file(), reason="the pretrained weights are not here")
def test_the_pretrained_teacher_scores_real_speech_as_published(spkd) -> None:  # type: ignore[no-untyped-def]
    data = SHARED / "data" / "librispeech-mini"
    spkd(
        "eval",
        data / "trials-test-short.txt",
        "model=dvector",
        f"model.weights={REAL}",
        f"manifest={data / 'test-short.csv'}",
    ).ok()
    scores = np.array([float(line.split()[2]) for line in Path("eval/scores.txt").read_text().splitlines()])
    label = read(data / "trials-test-short.txt").label
    assert label is not None
    assert abs(100 * eer(curve(scores, label))[0] - 1.75) < 0.15
