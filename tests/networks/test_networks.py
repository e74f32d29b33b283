from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from spkd.errors import UsageError
from spkd.networks.ecapa import AttentiveStatistics, Res2
from spkd.networks.network import count_macs, count_parameters, forward_crops, statistics
from spkd.networks.resnet import shortcut
from spkd.networks.settings import SSLSettings, StudentConfig
from spkd.students import STUDENTS, Checkpoint, build, make_student, save_student


@pytest.mark.parametrize("name", STUDENTS)
def test_levels_have_the_declared_shapes(name: str) -> None:
    torch.manual_seed(0)
    network = build(name, channels=32, embedding=24).eval()
    for samples in (8160, 32000, 400 if name != "ssl" else 800):
        levels = network(network.features(0.1 * torch.randn(3, samples)))
        assert set(levels) == set(network.levels)
        for level, target in network.levels.items():
            shape = (3, target.dim) if target.hop is None else (3, target.num_frames(samples), target.dim)
            assert levels[level].shape == shape
            assert torch.isfinite(levels[level]).all()


@pytest.mark.parametrize("name", [name for name in STUDENTS if STUDENTS[name].takes_lengths])
def test_views_of_different_length_in_one_batch_have_the_levels_they_have_alone(name: str) -> None:
    torch.manual_seed(0)
    network = build(name, channels=32, embedding=24)
    for module in network.modules():  # as after training: padding would show
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    network.eval()
    lengths = torch.tensor([37, 240, 101, 5, 239])
    features = torch.randn(5, 240, network.input_kind.dim)
    with torch.no_grad():
        together = network(features, lengths=lengths)
        for i, length in enumerate(lengths):
            alone = network(features[i : i + 1, :length])
            for level, values in alone.items():
                padded = together[level][i, : values.shape[1]] if values.dim() == 3 else together[level][i]
                assert torch.allclose(padded, values[0], atol=1e-5 * float(values.abs().max())), level


@pytest.mark.parametrize("name", STUDENTS)
def test_a_constant_offset_of_the_features_changes_nothing(name: str) -> None:
    network = build(name, channels=32, embedding=24).eval()
    features = torch.randn(2, 60, network.input_kind.dim)
    assert torch.allclose(network(features)["embedding"], network(features + 3.0)["embedding"], atol=1e-4)


@pytest.mark.parametrize("name", STUDENTS)
def test_gradients_reach_every_parameter_and_stay_finite_on_silence(name: str) -> None:
    torch.manual_seed(0)
    network = build(name, channels=32, embedding=24)
    features = torch.randn(4, 40, network.input_kind.dim)
    features[0] = 0.0
    network(features)["embedding"].square().sum().backward()
    for parameter_name, parameter in network.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert torch.isfinite(parameter.grad).all(), parameter_name


def test_parameter_counts_are_those_of_the_docstrings() -> None:
    assert round(count_parameters(build("xvector", channels=256, embedding=192)) / 1e6, 2) == 0.93
    assert round(count_parameters(build("ecapa", channels=512, embedding=192)) / 1e6, 1) == 6.2
    assert round(count_parameters(build("ecapa", channels=128, embedding=192)) / 1e6, 1) == 0.8
    assert round(count_parameters(build("resnet34", channels=16, embedding=256)) / 1e6, 1) == 2.0
    assert round(count_parameters(build("ssl", channels=192, embedding=192)) / 1e6, 1) == 1.5
    assert round(count_parameters(build("tiny", channels=96, embedding=192)) / 1e6, 2) == 0.19
    assert round(count_parameters(build("redimnet2", channels=16, embedding=192)) / 1e6, 2) == 0.71


@pytest.mark.parametrize(
    ("name", "channels", "embedding", "millions"), [("resnet34", 32, 256, 6.63), ("campplus", 128, 512, 7.18)]
)
def test_sizes_are_those_that_wespeaker_publishes(name: str, channels: int, embedding: int, millions: float) -> None:
    assert round(count_parameters(build(name, channels=channels, embedding=embedding)) / 1e6, 2) == millions


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
        build("ecapa", channels=30, embedding=24)


@pytest.mark.parametrize(
    ("name", "channels", "embedding", "shapes"),
    [
        (
            "resnet34",
            32,
            256,
            {
                "conv1.weight": (32, 1, 3, 3),
                "layer2.0.shortcut.0.weight": (64, 32, 1, 1),
                "layer3.5.conv2.weight": (128, 128, 3, 3),
                "layer4.2.bn2.running_var": (256,),
                "seg_1.weight": (256, 5120),
            },
        ),
        (
            "campplus",
            128,
            512,
            {
                "head.layer2.0.shortcut.0.weight": (32, 32, 1, 1),
                "head.conv2.weight": (32, 32, 3, 3),
                "xvector.tdnn.linear.weight": (128, 320, 5),
                "xvector.block2.tdnnd24.cam_layer.linear_local.weight": (32, 128, 3),
                "xvector.block3.tdnnd16.nonlinear1.batchnorm.weight": (992,),
                "xvector.transit3.linear.weight": (512, 1024, 1),
                "xvector.out_nonlinear.batchnorm.weight": (512,),
                "xvector.dense.linear.weight": (512, 1024, 1),
                "xvector.dense.nonlinear.batchnorm.running_mean": (512,),
            },
        ),
    ],
)
def test_tensors_are_named_and_shaped_as_wespeakers(
    name: str, channels: int, embedding: int, shapes: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    network = build(name, channels=channels, embedding=embedding)
    state = network.state_dict()
    assert {key: tuple(state[key].shape) for key in shapes} == shapes
    # Their files carry a classifier besides, and may carry counters or not.
    state = {k: torch.randn(v.shape) for k, v in state.items() if not k.endswith("num_batches_tracked")}
    torch.save({**state, "projection.weight": torch.randn(10, embedding)}, tmp_path / "avg_model.pt")
    config = StudentConfig(name, channels, embedding, init=str(tmp_path / "avg_model.pt"))
    begun = make_student(config).state_dict()
    assert all(torch.equal(begun[key], values) for key, values in state.items())


def test_weights_that_know_other_features_are_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_student(tmp_path / "kaldi", Checkpoint(build("tiny", channels=16, embedding=8)))
    for features in ("kaldi", "sherpa"):
        make_student(StudentConfig("tiny", 16, 8, features=features, init=str(tmp_path / "kaldi")))
        note = f"note: student.init={tmp_path / 'kaldi'} was trained on fbank, and this student takes fbank.sherpa"
        assert (note in capsys.readouterr().out) == (features == "sherpa")


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    save_file(build("xvector", channels=16, embedding=8).state_dict(), tmp_path / "weights.safetensors")
    save_student(tmp_path / "ecapa", Checkpoint(build("ecapa", channels=16, embedding=8)))
    for config, expected in (
        (StudentConfig("xvector", 24, 8, init=str(tmp_path / "weights.safetensors")), "other widths"),
        (StudentConfig("tiny", 16, 8, init=str(tmp_path / "weights.safetensors")), "another architecture"),
        (StudentConfig("xvector", 16, 8, init=str(tmp_path / "ecapa")), "another architecture"),
        (StudentConfig("xvector", 16, 8, init=str(tmp_path / "none.pt")), "no such file"),
        (StudentConfig("ssl", 40, 8), "16, 32, 48 or a multiple of 64"),
        (StudentConfig("ssl", 64, 8, settings=SSLSettings(layers=0)), "at least 1"),
        (StudentConfig("campplus", 12, 8), "multiple of 8"),
    ):
        with pytest.raises(UsageError, match=expected):
            make_student(config)


def test_multiplications_are_counted() -> None:
    frames, c, e = 98, 16, 8  # of one second
    expected = frames * (80 * c * 5 + 2 * c * c * 3 + c * c + c * 2 * c) + 4 * c * e + e * e
    assert count_macs(build("xvector", channels=c, embedding=e), 1.0) == expected


def test_crops_of_equal_length_go_through_the_network_together() -> None:
    network = build("xvector", channels=16, embedding=8).eval()
    crops = [torch.randn(3, n, 80) for n in (40, 40, 30, 40)]
    for levels, crop in zip(forward_crops(network, crops), crops, strict=True):
        for name, values in network(crop).items():
            assert torch.allclose(levels[name], values, atol=1e-5)


def test_gradients_of_frames_reach_convolutions_with_time_last_in_memory() -> None:
    network = build("xvector", channels=16, embedding=8)
    layouts = []
    network.tdnn[-1].register_full_backward_hook(lambda module, inputs, outputs: layouts.append(outputs[0]))
    (levels,) = forward_crops(network, [torch.randn(3, 40, 80)])
    weight = torch.randn(3, 40, 32)
    (levels["frames"] * weight).sum().backward()
    assert layouts[0].is_contiguous()
    torch.testing.assert_close(layouts[0], weight.mT)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("stride", [(1, 1), (2, 1), (2, 2)])
def test_shortcuts_of_few_channels_have_the_gradients_of_a_convolution(
    stride: tuple[int, int], memory: torch.memory_format
) -> None:
    """In channels-last memory, oneDNN's own strided convolution has wrong weight gradients or ends the process."""
    torch.manual_seed(0)
    layer = shortcut(4, 8, stride)[0].to(memory_format=memory)
    x, direction = torch.randn(64, 4, 40, 100).to(memory_format=memory), torch.randn(8, 1, 1).double()
    weight = layer.weight.detach().double().requires_grad_()
    expected = torch.nn.functional.conv2d(x.double(), weight, stride=stride)
    (expected.sin() * direction).sum().backward()
    found = layer(x)
    (found.sin() * direction.float()).sum().backward()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.weight.grad.double(), weight.grad, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("level", ["frames", "embedding"])
def test_compiled_network_has_the_gradients_of_the_same_network(level: str) -> None:
    torch.manual_seed(0)
    network, crops = build("xvector", channels=16, embedding=8), [torch.randn(3, 40, 80)]

    def gradients() -> dict[str, torch.Tensor]:
        network.zero_grad()
        forward_crops(network, crops)[0][level].square().sum().backward()
        return {
            name: torch.zeros_like(weight) if weight.grad is None else weight.grad
            for name, weight in network.named_parameters()
        }

    expected = gradients()
    network.compile(backend="aot_eager")
    torch.testing.assert_close(gradients(), expected, rtol=1e-4, atol=1e-4)
