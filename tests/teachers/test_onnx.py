from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from spkd.errors import SpkdError, UsageError
from spkd.outputs.features import FBANK, fbank_of
from spkd.teachers import load_teacher
from spkd.teachers.base import Teacher
from spkd.teachers.onnx import nemo_fbank
from spkd.teachers.settings import ModelConfig, ONNXSettings

from .fixed import fixed_wave

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
WAVE = torch.from_numpy(fixed_wave())[None]


class OfBands(nn.Module):
    """Strided convolution over fbank, mean over time, linear: embedding and frames."""

    def __init__(self, bands_first: bool = False, lengths: bool = False) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv1d(80, 12, 5, 2), nn.Linear(12, 7)
        self._first, self._lengths = bands_first, lengths

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        frames = self.conv(x if self._first else x.transpose(1, 2)).relu()
        mean = frames.mean(2)
        if lengths is not None:
            mean = frames.sum(2) / lengths[:, None]
        return self.out(mean), frames.transpose(1, 2)


class OfWaves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 6, 400, 320)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x[:, None]).abs().mean(2)


def save(
    path: Path, model: nn.Module, inputs: tuple[Tensor, ...], dynamic: dict[str, dict[int, str]], **described: str
) -> Path:
    names = ["x", "x_lens"][: len(inputs)]
    outputs = ["embs", "frames"] if isinstance(model, OfBands) else ["out"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model.eval(), inputs, str(path), input_names=names, output_names=outputs, dynamic_axes=dynamic, dynamo=False
        )
    graph = onnx.load(str(path))
    for key, value in described.items():
        graph.metadata_props.add(key=key, value=value)
    onnx.save(graph, str(path))
    return path


FREE = {"x": {0: "B", 1: "T"}, "embs": {0: "B"}, "frames": {0: "B", 1: "U"}}


def load(path: Path, **settings: Any) -> Teacher:
    return load_teacher(ModelConfig("onnx", str(path), settings=ONNXSettings(**settings)), torch.device("cpu"))


def centred(bank: Tensor) -> Tensor:
    return bank - bank.mean(1, keepdim=True)


@pytest.mark.parametrize("toolkit", ["wespeaker", "3d-speaker"])
def test_a_model_with_the_metadata_of_sherpa(tmp_path: Path, toolkit: str) -> None:
    model = OfBands()
    file = save(tmp_path / "m.onnx", model, (torch.randn(2, 60, 80),), FREE, framework=toolkit, output_dim="7")
    teacher = load(file)
    assert {n: (t.dim, t.hop, t.window) for n, t in teacher.targets.items()} == {
        "embedding": (7, None, 0),
        "frames": (12, 320, 400 + 4 * 160),
    }
    waves = torch.cat([WAVE, 0.5 * WAVE.flip(1)])
    outputs = teacher.extract(waves, ["embedding", "frames"])
    with torch.no_grad():
        embedding, frames = model(centred(fbank_of(toolkit, waves)))
    assert np.allclose(outputs["embedding"], embedding, atol=1e-4)
    assert np.allclose(outputs["frames"], frames, atol=1e-4)


def test_whose_fbank_it_is_can_be_named_and_is_not_guessed(tmp_path: Path) -> None:
    model = OfBands()
    file = save(tmp_path / "m.onnx", model, (torch.randn(1, 60, 80),), {"x": {1: "T"}, "frames": {1: "U"}})
    with pytest.raises(UsageError, match=r"takes fbank .* not whose: set teacher.onnx.input"):
        load(file)
    waves = torch.cat([WAVE, 0.5 * WAVE.flip(1)])  # the graph takes one view at a time
    outputs = load(file, input="kaldi").extract(waves, ["embedding"])
    with torch.no_grad():
        expected = torch.cat([model(centred(fbank_of("kaldi", w[None])))[0] for w in waves])
    assert np.allclose(outputs["embedding"], expected, atol=1e-4)


def test_a_model_of_the_waveform(tmp_path: Path, spkd: Callable, corpus: Path) -> None:
    model = OfWaves()
    file = save(tmp_path / "m.onnx", model, (torch.randn(2, 8000),), {"x": {0: "B", 1: "N"}, "out": {0: "B"}})
    with torch.no_grad():
        expected = model(WAVE)
    assert np.allclose(load(file).extract(WAVE, ["embedding"])["embedding"], expected, atol=1e-5)
    with pytest.raises(UsageError, match="takes a waveform"):
        load(file, input="kaldi")
    given = ["teacher=onnx", f"teacher.weights={file}", f"manifest={corpus / 'manifest.csv'}"]
    done = spkd("extract", *given)
    assert done.code == 0, done.err
    assert "18 views extracted, 0 rejected; complete" in done.out
    done = spkd("eval", corpus / "trials.txt", "model=onnx", f"model.weights={file}", given[2])
    assert (done.code, "EER" in done.out) == (0, True), done.err


def test_a_model_of_nemo_with_lengths(tmp_path: Path) -> None:
    model = OfBands(bands_first=True, lengths=True)
    free = {"x": {0: "B", 2: "T"}, "x_lens": {0: "B"}, "embs": {0: "B"}, "frames": {0: "B", 1: "U"}}
    inputs = (torch.randn(2, 80, 60), torch.tensor([60, 60]))
    outputs = load(
        save(tmp_path / "m.onnx", model, inputs, free, framework="nemo", feat_dim="80", output_dim="7")
    ).extract(WAVE, ["embedding"])
    bank = nemo_fbank(WAVE, 80)
    padded = nn.functional.pad(bank.transpose(1, 2), (0, -bank.shape[1] % 16))
    with torch.no_grad():
        expected = model(padded, torch.tensor([bank.shape[1]]))[0]
    assert np.allclose(outputs["embedding"], expected, atol=1e-4)


def test_nemos_fbank_is_its_formula() -> None:
    """Written out in float64: pre-emphasis, centred Hann windows, power, Slaney's triangles, log, normalisation."""
    wave = WAVE[0].double().numpy()
    emphasised = np.concatenate([wave[:1], wave[1:] - 0.97 * wave[:-1]])
    padded = np.pad(emphasised, 256)
    window = np.zeros(512)
    window[56:456] = np.hanning(400)
    count = 1 + len(wave) // 160
    power = np.abs(np.fft.rfft([padded[160 * i : 160 * i + 512] * window for i in range(count)])) ** 2

    def to_hz(mel: float) -> float:
        return 200 * mel / 3 if mel < 15 else 1000 * math.exp(math.log(6.4) / 27 * (mel - 15))

    top = 15 + math.log(8) / (math.log(6.4) / 27)
    hz = [to_hz(top * i / 81) for i in range(82)]
    bins = np.arange(257) * 16_000 / 512
    filters = [
        np.clip(np.minimum((bins - a) / (b - a), (c - bins) / (c - b)), 0, None) * 2 / (c - a)
        for a, b, c in zip(hz, hz[1:], hz[2:], strict=False)
    ]
    bank = np.log(power @ np.array(filters).T + 2.0**-24)
    expected = (bank - bank.mean(0)) / (bank.std(0, ddof=1) + 1e-5)
    assert np.allclose(nemo_fbank(WAVE, 80)[0], expected, atol=2e-3)


def test_which_output_is_the_embedding_can_be_named(tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.mean(1)[:, :5], x.amax(1)[:, :9]

    path = tmp_path / "m.onnx"
    torch.onnx.export(
        Two(), (torch.randn(2, 60, 80),), str(path), input_names=["x"], output_names=["one", "other"], dynamo=False,
        dynamic_axes={"x": {0: "B", 1: "T"}, "one": {0: "B"}, "other": {0: "B"}},
    )  # fmt: skip
    with pytest.raises(UsageError, match="which of one, other is the embedding"):
        load(path, input="kaldi")
    assert load(path, input="kaldi", outputs={"embedding": "other"}).targets["embedding"].dim == 9
    with pytest.raises(UsageError, match="has one, other"):
        load(path, input="kaldi", outputs={"embedding": "third"})


def test_files_that_are_no_such_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        load(tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"nothing")
    with pytest.raises(SpkdError, match="cannot be loaded as an ONNX model"):
        load(tmp_path / "bad.onnx")
    file = save(tmp_path / "m.onnx", OfBands(), (torch.randn(1, 60, 80),), {"x": {0: "B"}}, framework="wespeaker")
    with pytest.raises(UsageError, match="takes exactly 60 frames"):
        load(file)
    file = save(
        tmp_path / "n.onnx", OfBands(), (torch.randn(2, 60, 80),), FREE, framework="3d-speaker", sample_rate="8000"
    )
    with pytest.raises(UsageError, match="8000 Hz"):
        load(file)


def test_the_shortest_view_gives_what_is_declared(tmp_path: Path) -> None:
    teacher = load(save(tmp_path / "m.onnx", OfBands(), (torch.randn(2, 60, 80),), FREE, framework="wespeaker"))
    samples = max(teacher.min_samples, teacher.targets["frames"].window)
    assert FBANK.num_frames(samples) == 5
    assert teacher.extract(torch.randn(1, samples), ["frames"])["frames"].shape == (1, 1, 12)
