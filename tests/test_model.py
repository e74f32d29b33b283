"""The Python interface."""

from __future__ import annotations

import inspect
import io
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


def test_every_form_of_a_waveform_gives_its_embedding(student: str) -> None:
    model, random = spkd.load(student), np.random.RandomState(0)
    wave = np.round(3000 * random.normal(size=16_000)).astype(np.int16)
    expected = model.embed((wave / 32768).astype(np.float32))
    tensor = torch.from_numpy(wave / 32768).float()
    forms = [wave, wave.astype(np.int32) * 65536, (wave / 32768).tolist(), tensor.requires_grad_(), tensor.double()]
    forms += [np.stack([wave, wave], 1), tensor[:, None], (wave // 256 + 128).astype(np.uint8), tensor.bfloat16()]
    for form in forms[:-2]:
        assert np.abs(model.embed(form) - expected).max() < 1e-5
    for coarse in forms[-2:]:  # of 8 bits
        assert np.corrcoef(model.embed(coarse), expected)[0, 1] > 0.99
    left = np.stack([wave, np.zeros_like(wave)], 1)  # channels are averaged, as those of files
    assert np.abs(model.embed([left, left]) - model.embed((wave / 65536).astype(np.float32))).max() < 1e-5
    assert model.embed([]).shape == (0, 8)


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint32])
def test_samples_in_a_type_that_is_too_wide_are_refused(student: str, kind: type) -> None:
    samples = (1000 * np.sin(np.arange(16_000) / 10)).astype(np.int64) + (2**31 if kind is np.uint32 else 0)
    with pytest.raises(UsageError, match="far below the full scale"):
        spkd.load(student).embed(samples.astype(kind))


def test_other_rates_are_resampled(student: str) -> None:
    model, random = spkd.load(student), np.random.RandomState(0)
    wave = np.convolve(0.1 * random.normal(size=48_000), np.ones(24) / 24, "same").astype(np.float32)  # below 2 kHz
    slow = wave[::3]
    assert np.corrcoef(model.embed(wave, sample_rate=48_000), model.embed(slow))[0, 1] > 0.98


def test_the_threshold_travels_with_the_model(
    request: pytest.FixtureRequest, student: str, paths: list[str], corpus: Path
) -> None:
    model, paths = spkd.load(student), paths[3:]  # the first speaker is too breathy to be found
    with pytest.raises(UsageError, match="has no calibration; make one with `spkd calibrate TRIALS model="):
        model.verify(paths[0], paths[1])
    run = request.getfixturevalue("spkd")
    assert run("calibrate", corpus / "trials.txt", f"manifest={corpus / 'manifest.csv'}", "force=true").code == 0
    model = spkd.load(Path(student))
    assert model.calibration is not None
    found = model.verify(paths[0], paths[4])
    assert found.score == pytest.approx(model.score(paths[0], paths[4]))
    assert found.ratio == pytest.approx(model.calibration.weights[0] * found.score + model.calibration.offset)
    assert found.threshold == model.calibration.thresholds["eer"]
    assert found.same == (found.ratio >= found.threshold)
    assert model.verify(paths[0], paths[0], threshold=-1e9).same
    assert not model.verify(paths[0], paths[0], threshold=1e9).same
    silence, short = np.zeros(32_000, np.float32), soundfile.read(paths[0], dtype="float32")[0][4000:10_000]
    loud, time = 0.1 * np.random.RandomState(0).normal(size=32_000), np.arange(32_000) / 16_000
    hum, tone = 0.05 * np.sin(2 * np.pi * 50 * time), 0.1 * np.sin(880 * time)
    quiet, gap = loud * 10 ** (-40 / 20), np.concatenate([loud[:6000], np.zeros(60_000)])
    for poor in (silence, short, quiet, gap, silence + 0.3, np.stack([loud, -loud], 1), loud, 0.03 * loud, hum, tone):
        for pair in ((poor, poor), (poor, paths[0]), (paths[0], poor)):
            found = model.verify(*pair)
            assert found.same is None
            assert not found.same
            assert found.remarks
    assert model.verify(paths[0], gap).remarks == (
        "the second recording: only 0.38 s are louder than -55 dB of full scale; a decision needs 0.5 s",
    )
    found = model.verify(loud, paths[0], threshold=-1e9)
    assert (found.same, len(found.remarks)) == (None, 1)
    assert found.remarks[0].startswith(
        "the first recording: no speech found (0.00 s are voiced, and the level varies by "
    )
    spoken = soundfile.read(paths[0], dtype="float32")[0]
    padded = model.verify(np.concatenate([silence, spoken, silence]), paths[0])
    share = 64_000 // 320 / ((64_000 + len(spoken)) // 320)
    assert (padded.same is None, len(padded.remarks)) == (False, 1)
    assert padded.remarks[0].startswith(f"the first recording: {int(100 * share)} % of it is silence below -90 dB")
    assert "vad=energy" in padded.remarks[0]
    clipped = model.verify(np.clip(5 * spoken / np.abs(spoken).max(), -1, 1), paths[1])
    assert clipped.same is not None
    assert clipped.remarks == ("the first recording: its samples are clipped in more than 2 % of their samples",)
    with pytest.raises(UsageError, match="threshold=nan: give a number, or one of eer"):
        model.verify(paths[0], paths[1], threshold=float("nan"))
    with pytest.raises(UsageError, match="threshold=-inf: give a number, or one of eer"):
        model.verify(paths[0], paths[1], threshold=-float("inf"))
    with pytest.raises(UsageError, match="expected voices as a mapping of names to voiceprints, got a list of 1"):
        model.identify(paths[0], [model.enrol(paths[0])])  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"of \(channels, samples\), as torchaudio gives, give the transpose"):
        model.verify(paths[0], np.zeros((1, 16_000), np.float32))
    with pytest.raises(UsageError, match="threshold='err': .* has eer"):
        model.verify(paths[0], paths[1], threshold="err")
    with pytest.raises(UsageError, match="false_alarm_0.01 takes at least 1,000 non-target trials, and .* on [0-9]+:"):
        model.verify(paths[0], paths[1], threshold="false_alarm_0.01")


def test_what_cannot_be_used_is_an_error_that_says_why(student: str, paths: list[str], tmp_path: Path) -> None:
    model = spkd.load(student)
    with pytest.raises(SpkdError, match="no such file"):
        model.embed([paths[0], "none.wav"])
    with pytest.raises(SpkdError, match=r"0.01 s of audio; .* takes at least 0.025 s"):
        model.embed(np.zeros(100, np.float32))
    with pytest.raises(SpkdError, match=r"expected a waveform \(samples,\) of finite numbers"):
        model.embed(np.array([np.nan] * 16_000))
    for wrong in (np.zeros((2, 3, 4)), None, io.BytesIO(), [paths[0]], b"a.wav", np.zeros(9000, complex)):
        with pytest.raises(UsageError, match="^expected a (path or a )?waveform"):
            model.embed([wrong])  # type: ignore[list-item]
        with pytest.raises(UsageError, match="^expected a (path or a )?waveform"):
            model.score(wrong, paths[0])  # type: ignore[arg-type]
    for nothing in (None, io.BytesIO(), 3.0, np.zeros((2, 3, 4)), np.float32(1)):
        with pytest.raises(UsageError, match="^expected recordings"):
            model.embed(nothing)  # type: ignore[arg-type]
    for rate in (0, -8000, None, "16k", 16_000.5):
        with pytest.raises(UsageError, match="sample_rate=.*: give the rate"):
            model.embed(np.zeros(16_000), sample_rate=rate)  # type: ignore[arg-type]
    with pytest.raises(SpkdError, match="at integer scale"):
        model.embed(np.full(16_000, 3000.0))
    assert repr(model) == f"SpeakerModel({student!r}, dim=8, no calibration)"
    assert "device: auto, cpu" in inspect.getdoc(spkd.load)  # type: ignore[operator]
    with pytest.raises(UsageError, match="no student there"):
        spkd.load(tmp_path)
    with pytest.raises(UsageError, match="no student there.*; did you mean 'dvector'"):
        spkd.load("dvectr")
    with pytest.raises(UsageError, match="weights='w': no argument for a student"):
        spkd.load(student, weights="w")
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        spkd.lode("x")


def test_a_teacher_with_its_settings_gives_what_its_library_gives(tiny_wavlm: Path, paths: list[str]) -> None:
    """Mean over time, and standard deviation after it, of a hidden state of transformers."""
    transformers = pytest.importorskip("transformers")
    network = transformers.WavLMModel.from_pretrained(tiny_wavlm).eval()
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=True)
    wave = extractor(soundfile.read(paths[0])[0], sampling_rate=16_000, return_tensors="pt").input_values
    with torch.no_grad():
        states = network(wave.float(), output_hidden_states=True).hidden_states
    for layer in (1, 2):
        found = spkd.load("wavlm", weights=tiny_wavlm, layer=layer).embed(paths[0])
        frames = states[layer][0].double()
        expected = torch.cat([frames.mean(0), frames.std(0, unbiased=False)])
        assert np.allclose(found, expected, atol=1e-3)
    with pytest.raises(UsageError, match="layers=1: no setting of wavlm; did you mean 'layer'"):
        spkd.load("wavlm", weights=tiny_wavlm, layers=1)
    with pytest.raises(UsageError, match=r"load\(layer=-1\): .* at least 0"):
        spkd.load("wavlm", weights=tiny_wavlm, layer=-1)
    with pytest.raises(UsageError, match="gives no embeddings"):
        spkd.load("none")
