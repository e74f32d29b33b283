from __future__ import annotations

import pytest
import torch

from spkd.errors import SpkdError
from spkd.export.graph import Embedder, Fbank, traced
from spkd.networks.network import Network, describe
from spkd.outputs.features import FBANKS, input_features
from spkd.students import build


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
    def __init__(self) -> None:
        super().__init__()
        self.levels = describe(4, {"embedding": 4})
        self.layer = torch.nn.GRU(80, 4, batch_first=True)

    def run(self, features: torch.Tensor, lengths: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        frames = self.layer(features.transpose(1, 2))[0]
        return {"frames": frames, "embedding": frames.mean(1)}


def test_a_recurrent_network_is_refused_with_what_to_do() -> None:
    with pytest.raises(SpkdError, match="a recurrent layer .GRU., which torch exports for one length alone: take"):
        traced(Embedder(Recurrent(), waveform=True))
