"""The Python interface."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import spkd
from spkd.corpus.manifest import Manifest
from spkd.errors import SpkdError, UsageError
from spkd.files.vectors import read_vectors
from tests.eval.students import save_untrained

Run = Callable


@pytest.fixture
def student(tmp_path: Path, corpus: Path) -> str:
    return str(save_untrained(tmp_path / "student", corpus))


@pytest.fixture
def paths(corpus: Path) -> list[str]:
    return [utterance.path for utterance in Manifest.load(corpus / "manifest.csv")]


def test_embeddings_are_those_of_the_command(
    request: pytest.FixtureRequest, student: str, paths: list[str], corpus: Path
) -> None:
    run = request.getfixturevalue("spkd")
    assert run("embed", corpus / "manifest.csv", "model=student", "out=e.npy").code == 0
    expected = np.stack([vector for _, vector in read_vectors(Path("e.npy"))])
    model = spkd.load(student)
    found = model.embed(paths)
    assert found.shape == (18, model.dim) == (18, 8)
    assert np.abs(found - expected).max() < 1e-4
    assert np.abs(model.embed(paths[3]) - expected[3]).max() < 1e-4
    waves = [soundfile.read(path, dtype="float32")[0] for path in paths[:3]]
    assert np.abs(model.embed(waves) - expected[:3]).max() < 1e-4
    assert np.abs(model.embed(torch.from_numpy(waves[0])) - expected[0]).max() < 1e-4
    assert np.abs(model.embed(np.stack([waves[0], waves[0]])) - expected[0]).max() < 1e-4


def test_other_rates_are_resampled(student: str) -> None:
    model, random = spkd.load(student), np.random.RandomState(0)
    wave = np.convolve(0.1 * random.normal(size=48_000), np.ones(24) / 24, "same").astype(np.float32)  # below 2 kHz
    slow = wave[::3]
    assert np.corrcoef(model.embed(wave, sample_rate=48_000), model.embed(slow))[0, 1] > 0.98


def test_the_threshold_travels_with_the_model(
    request: pytest.FixtureRequest, student: str, paths: list[str], corpus: Path
) -> None:
    model = spkd.load(student)
    with pytest.raises(UsageError, match="has no calibration; make one with `spkd calibrate`"):
        model.verify(paths[0], paths[1])
    run = request.getfixturevalue("spkd")
    assert run("calibrate", corpus / "trials.txt", f"manifest={corpus / 'manifest.csv'}").code == 0
    model = spkd.load(Path(student))
    assert model.calibration is not None
    found = model.verify(paths[0], paths[4])
    assert found.score == pytest.approx(model.score(paths[0], paths[4]))
    assert found.ratio == pytest.approx(model.calibration.weights[0] * found.score + model.calibration.offset)
    assert found.threshold == model.calibration.thresholds["eer"]
    assert found.same == (found.ratio >= found.threshold)
    assert model.verify(paths[0], paths[0], threshold=-1e9).same
    assert not model.verify(paths[0], paths[0], threshold=1e9).same
    with pytest.raises(UsageError, match="threshold='err': .* has eer"):
        model.verify(paths[0], paths[1], threshold="err")


def test_what_cannot_be_used_is_an_error_that_says_why(student: str, paths: list[str], tmp_path: Path) -> None:
    model = spkd.load(student)
    with pytest.raises(SpkdError, match="no such file"):
        model.embed([paths[0], "none.wav"])
    with pytest.raises(SpkdError, match=r"0.01 s of audio; .* takes at least 0.025 s"):
        model.embed(np.zeros(100, np.float32))
    for wrong in (np.zeros((2, 3, 4)), np.array([np.nan] * 16_000)):
        with pytest.raises(SpkdError, match=r"expected a waveform \(samples,\)"):
            model.embed([wrong])
    with pytest.raises(UsageError, match="no student there"):
        spkd.load(tmp_path)
    with pytest.raises(UsageError, match="no student there"):
        spkd.load("nothing")
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        spkd.lode("x")
