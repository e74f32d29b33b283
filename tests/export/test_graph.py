from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from spkd.export.graph import Embedder, Fbank, lengths_of, simplified, traced, traced_alone
from spkd.networks.network import Network, describe
from spkd.outputs.features import FBANKS, input_features
from spkd.registry import STUDENTS
from spkd.students import Checkpoint, build, save_student
from tests.conftest import CommandLine
from tests.export.npm import write_package

STRIDED = (("resnet34", 4, False), ("redimnet2", 8, True), ("campplus", 8, True))


def waves(count: int, samples: int) -> torch.Tensor:
    return 0.1 * torch.randn(count, samples, generator=torch.Generator().manual_seed(samples))


@pytest.mark.parametrize("toolkit", FBANKS)
@pytest.mark.parametrize("samples", [8_000, 16_001, 16_079, 16_080, 31_999])
def test_features_in_the_graph_are_those_of_training(toolkit: str, samples: int) -> None:
    given = waves(2, samples)
    found, expected = Fbank(toolkit)(given, None), input_features(FBANKS[toolkit], given)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 5e-3


@pytest.mark.parametrize("name", ["tiny", "ssl"])
def test_a_view_shorter_than_a_window_is_one_frame_as_everywhere(name: str) -> None:
    network = build(name, channels=16, embedding=8).eval()
    embedder, lengths = Embedder(network, waveform=True), torch.tensor([8000, 399, 100, 1])
    batch = waves(4, 8000)
    with torch.no_grad():
        found = embedder(batch, lengths)
        for row, length in enumerate(lengths.tolist()):
            alone = network(network.features(batch[row : row + 1, :length]))["embedding"]
            assert (found[row] - alone[0]).abs().max() < 1e-5, length


@pytest.mark.parametrize("toolkit", FBANKS)
def test_padding_changes_no_embedding(toolkit: str) -> None:
    network = build("tiny", channels=16, embedding=8)
    network.take(FBANKS[toolkit])
    embedder, lengths = Embedder(network, waveform=True), torch.tensor([24_000, 16_005, 11_120])
    batch = waves(3, 24_000)
    with torch.no_grad():
        found = embedder(batch, lengths)
        for row, length in enumerate(lengths.tolist()):
            assert (found[row] - embedder(batch[row : row + 1, :length])[0]).abs().max() < 1e-5


def test_a_student_of_the_waveform_drops_what_fills_no_frame() -> None:
    embedder = Embedder(build("ssl", channels=16, embedding=8, layers=1), waveform=True)
    given = waves(2, 16_100)
    with torch.no_grad():
        expected = embedder.network(embedder.network.features(given))["embedding"]
        assert (embedder(given) - expected).abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("channels", [16, 32])
def test_cam_with_the_features_in_the_graph_is_exported_at_every_width(
    channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spkd.networks.campplus.DENSE", ((2, 1), (2, 2), (1, 2)))  # 52 layers take a minute
    network = build("campplus", channels=channels, embedding=8).eval()
    program = traced(Embedder(network, waveform=True)).module()
    with torch.no_grad():
        for samples in (41_360, 64_001):
            given = waves(1, samples)
            expected = network(network.features(given))["embedding"]
            assert (program(given) - expected).abs().max() < 1e-4


class Recurrent(Network):
    default_channels = 4
    settings: dict[str, Any] = {}

    def __init__(self) -> None:
        super().__init__()
        self.levels = describe(4, {"embedding": 4})
        self.layer = torch.nn.GRU(80, 4, batch_first=True)

    def run(self, features: torch.Tensor, lengths: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        frames = self.layer(features.transpose(1, 2))[0]
        return {"frames": frames, "embedding": frames.mean(1)}


@pytest.mark.parametrize(
    ("name", "channels"),
    [pytest.param(name, channels, marks=[pytest.mark.slow] * slow) for name, channels, slow in STRIDED],
)
def test_graphs_for_phones_hold_no_arithmetic_that_converters_lack(name: str, channels: int) -> None:
    torch.manual_seed(0)
    network = build(name, channels=channels, embedding=8).eval()
    program = simplified(traced_alone(Embedder(network, waveform=False), 4.0))
    lacking = {torch.sym_max, torch.sym_min, torch.sym_not, torch.ops.aten._assert_scalar.default}
    assert not lacking & {node.target for node in program.graph.nodes}
    least, most = lengths_of(program)
    assert most == 398
    with torch.no_grad():
        for frames in (least, least + 1, 301, most):
            given = torch.randn(1, frames, 80, generator=torch.Generator().manual_seed(frames))
            assert (program.module()(given) - network(given)["embedding"]).abs().max() < 1e-5


def test_a_recurrent_student_is_refused_with_what_to_do(
    spkd: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    point = importlib.metadata.EntryPoint("recurrent", f"{__name__}:Recurrent", "spkd.students")
    monkeypatch.setattr("spkd.registry.entry_points", lambda group: [point] if group == "spkd.students" else [])
    monkeypatch.delitem(STUDENTS.__dict__, "_points", raising=False)
    try:
        save_student("s", Checkpoint(Recurrent().eval()))
        before = sorted(Path("s").iterdir())
        for to in ("onnx", "ort", "pt2", "web", "pte", "coreml", "litert"):
            given = [f"web.runtime={write_package(tmp_path / 'npm')}"] if to == "web" else []
            done = spkd("export", "s", f"to={to}", *given)
            text = "error: the student has a recurrent layer (GRU), which torch exports for one length alone: take "
            assert (done.code, done.err.startswith(text), done.err.count("\n")) == (2, True, 1), done.err
        assert sorted(Path("s").iterdir()) == before
    finally:
        STUDENTS.__dict__.pop("_points", None)
