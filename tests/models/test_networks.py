from __future__ import annotations

import math

import pytest
import torch

from spkd import models
from spkd.models import NETWORKS
from spkd.models.ecapa import AttentiveStatistics, Res2
from spkd.models.network import parameters, statistics


@pytest.mark.parametrize("name", NETWORKS)
def test_levels_have_the_declared_shapes(name: str) -> None:
    torch.manual_seed(0)
    network = models.build(name, channels=32, embedding=24).eval()
    for samples in (8160, 32000, 400 if name != "ssl" else 800):
        levels = network(network.features(0.1 * torch.randn(3, samples)))
        assert set(levels) == set(network.levels)
        for level, target in network.levels.items():
            shape = (3, target.dim) if target.hop is None else (3, target.count(samples), target.dim)
            assert levels[level].shape == shape
            assert torch.isfinite(levels[level]).all()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_constant_offset_of_the_features_changes_nothing(name: str) -> None:
    network = models.build(name, channels=32, embedding=24).eval()
    features = torch.randn(2, 60, network.hears.dim)
    assert torch.allclose(network(features)["embedding"], network(features + 3.0)["embedding"], atol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_reach_every_parameter_and_stay_finite_on_silence(name: str) -> None:
    torch.manual_seed(0)
    network = models.build(name, channels=32, embedding=24)
    features = torch.randn(4, 40, network.hears.dim)
    features[0] = 0.0
    network(features)["embedding"].square().sum().backward()
    for parameter_name, parameter in network.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert torch.isfinite(parameter.grad).all(), parameter_name


def test_parameter_counts_are_those_of_the_docstrings() -> None:
    assert round(parameters(models.build("xvector", channels=256, embedding=192)) / 1e6, 2) == 0.93
    assert round(parameters(models.build("ecapa", channels=512, embedding=192)) / 1e6, 1) == 6.2
    assert round(parameters(models.build("ecapa", channels=128, embedding=192)) / 1e6, 1) == 0.8
    assert round(parameters(models.build("resnet34", channels=16, embedding=256)) / 1e6, 1) == 2.0
    assert round(parameters(models.build("ssl", channels=192, embedding=192)) / 1e6, 1) == 1.5
    assert round(parameters(models.build("tiny", channels=96, embedding=192)) / 1e6, 2) == 0.19


@pytest.mark.parametrize(
    ("name", "channels", "embedding", "millions"), [("resnet34", 32, 256, 6.63), ("campplus", 128, 512, 7.18)]
)
def test_sizes_are_those_that_wespeaker_publishes(name: str, channels: int, embedding: int, millions: float) -> None:
    assert round(parameters(models.build(name, channels=channels, embedding=embedding)) / 1e6, 2) == millions


def test_statistics_are_mean_and_population_deviation() -> None:
    x = torch.randn(2, 3, 11, dtype=torch.float64)
    expected = torch.cat([x.mean(-1), ((x - x.mean(-1, keepdim=True)) ** 2).mean(-1).sqrt()], 1)
    assert torch.allclose(statistics(x), expected)


def test_attentive_statistics_are_the_weighted_moments() -> None:
    torch.manual_seed(0)
    pool = AttentiveStatistics(6).double().eval()
    x = torch.randn(2, 6, 9, dtype=torch.float64)
    mean, deviation = x.mean(-1, keepdim=True), x.std(-1, keepdim=True, correction=0)
    scores = pool.attention(torch.cat([x, mean.expand_as(x), deviation.expand_as(x)], 1))
    out = pool(x)
    for b in range(2):
        for d in range(6):
            weights = [math.exp(s) for s in scores[b, d].tolist()]
            weights = [w / sum(weights) for w in weights]
            mu = sum(w * v for w, v in zip(weights, x[b, d].tolist(), strict=True))
            var = sum(w * v * v for w, v in zip(weights, x[b, d].tolist(), strict=True)) - mu * mu
            assert abs(out[b, d].item() - mu) < 1e-9
            assert abs(out[b, 6 + d].item() - math.sqrt(var)) < 1e-9


def test_res2_cascades_its_groups() -> None:
    torch.manual_seed(0)
    block = Res2(16, 2).eval()
    x = torch.randn(1, 16, 12)
    groups = x.chunk(8, 1)
    before = torch.zeros_like(groups[0])
    expected = [groups[0]]
    for i in range(1, 8):
        before = block.blocks[i - 1](groups[i] + before)
        expected.append(before)
    assert torch.allclose(block(x), torch.cat(expected, 1))


def test_a_width_ecapa_cannot_have() -> None:
    with pytest.raises(ValueError, match="multiple of 8"):
        models.build("ecapa", channels=30, embedding=24)
