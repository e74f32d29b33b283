"""Frames meet by time. Times are known from outside: of a ramp, every frame's value is the time of its own middle."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from spkd.cache import Crop, Rows
from spkd.errors import SpkdError
from spkd.networks.campplus import Masked
from spkd.networks.ecapa import SqueezeExcitation
from spkd.networks.encoder import PositionalConvolution, RelativeAttention
from spkd.networks.network import Network
from spkd.networks.ssl import SSLStudent
from spkd.networks.toolkits.redimnet import TimeContext
from spkd.outputs.features import FBANK, FBANKS, HOP, input_features, is_fbank
from spkd.outputs.target import Target
from spkd.students import build
from spkd.train.alignment import Alignment, align, every, mean_over_frames

CROP = 32_000
LENGTHS = np.array([100_000, 47_111, 32_000, 31_999, 27_043, 19_237, 16_000, 9_999])


def starts(grid: int, seed: int) -> np.ndarray:
    room = np.maximum(LENGTHS - CROP, 0) // grid + 1
    return (np.random.RandomState(seed).random_sample(len(LENGTHS)) * room).astype(int) * grid


def middles(target: Target) -> list[np.ndarray]:
    """The time of every frame of each view, in samples."""
    return [np.arange(target.num_frames(int(n))) * target.hop + target.middle for n in LENGTHS]


@pytest.mark.parametrize("kit", ["kaldi", "sherpa"])
@pytest.mark.parametrize("stride", [1, 2, 8])
@pytest.mark.parametrize(
    ("hop", "window"),
    [(160, 0), (160, 400), (320, 400), (640, 560), (1280, 400), (320, 2640), (12_800, 25_440), (200, 512)],
)
def test_frames_meet_by_time(kit: str, stride: int, hop: int, window: int) -> None:
    """For teachers of every hop and students of every stride, at every start, also in views that are repeated."""
    kind = FBANKS[kit]
    level = Target("frames", 1, HOP, 400).after(FBANK, kind)
    level = Target("frames", 1, stride * HOP, level.window, centre=round(level.middle))
    target = Target("t", 1, hop, window)
    compared = 0
    for seed in range(6):
        crop = Crop(starts(stride * HOP, seed), CROP, stride * HOP)
        picked = Rows.of(kind, LENGTHS, crop).numbers
        mine = np.stack([times[numbers] for times, numbers in zip(middles(kind), picked, strict=True)])[:, ::stride]
        picked = Rows.of(target, LENGTHS, crop).numbers
        theirs = np.stack([times[numbers] for times, numbers in zip(middles(target), picked, strict=True)])
        given = (torch.from_numpy(x).double()[..., None] for x in (mine, theirs))
        found, expected, kept = align(*given, Alignment.of(level, target, LENGTHS, crop))
        apart = (found - expected)[..., 0].abs()
        kept = torch.ones_like(apart, dtype=torch.bool) if kept is None else kept
        inside = kept & (apart <= stride * HOP / 2)  # at the ends half a frame is taken for the nearest
        compared += int(inside.sum())
        # No frame is compared with another time than its own but at the ends of a view or of a crop.
        assert int((apart[inside] > 1e-3).sum()) <= 4 * len(LENGTHS) * max(CROP / 9_999, 1)
        whole = torch.from_numpy(LENGTHS >= CROP)
        if window <= 2640:
            assert torch.equal(inside, kept)
            # Whole views lose no more than the frames of one student's window at each end.
            assert kept[whole].sum(1).min() >= (CROP - 2 * max(stride * HOP, 400) - window) // hop - 1
    assert compared > 0


@pytest.mark.parametrize("time_last", [False, True])
def test_values_and_gradients_are_those_of_numpys_interpolation(time_last: bool) -> None:
    level, target = Target("frames", 3, 160, 400), Target("t", 2, 320, 720)
    crop = Crop(starts(160, 3), CROP)
    alignment = Alignment.of(level, target, LENGTHS, crop)
    count = int(level.num_frames(CROP))
    values = torch.randn(len(LENGTHS), 3, count, dtype=torch.float64).mT
    mine = (values if time_last else values.contiguous()).requires_grad_()
    theirs = torch.randn(len(LENGTHS), int(target.num_frames(CROP)), 2)
    found, same, _ = align(mine, theirs, alignment)
    assert torch.equal(same, theirs)
    # The first three views are whole.
    for view in range(3):
        first = Rows.of(target, LENGTHS, crop).numbers[view]
        place = (first * 320 + 360 - crop.start[view] - 200) / 160
        for column in range(3):
            expected = np.interp(place, np.arange(count), mine[view, :, column].detach().numpy())
            assert np.allclose(found[view, :, column].detach().numpy(), expected)
    found.sum().backward()
    assert mine.grad is not None
    assert mine.grad.sum().item() == pytest.approx(found.numel())


def test_where_frames_come_in_step_nothing_is_copied() -> None:
    level, target = Target("frames", 3, 160, 400), Target("t", 3, 160, 720)
    whole = np.full(2, 10_000)
    alignment = Alignment.of(level, target, whole, Crop(np.array([0, 1600]), 1040))
    mine, theirs = torch.randn(2, 5, 3, requires_grad=True), torch.randn(2, 3, 3)
    found, kept, mask = align(mine, theirs, alignment)
    assert torch.equal(found, mine[:, 1:4])
    assert found.data_ptr() == mine[:, 1].data_ptr()
    assert torch.equal(kept, theirs)
    assert mask is None
    with pytest.raises(SpkdError, match="gives 6 frames of a crop, its levels say 5"):
        align(torch.randn(2, 6, 3), theirs, alignment)


def test_the_mean_is_over_the_frames_of_each_view_and_then_over_the_views() -> None:
    values = torch.tensor([[1.0, 3.0, 100.0], [5.0, 100.0, 100.0]])
    kept = torch.tensor([[True, True, False], [True, False, False]])
    assert mean_over_frames(values, kept).item() == pytest.approx((2.0 + 5.0) / 2)
    assert mean_over_frames(values, None).item() == pytest.approx(values.mean().item())


def families() -> dict[str, Callable[[], Network]]:
    """Of every hop; WavLM-shaped ones with a normalisation that does not look at the whole view."""
    shape = SSLStudent(32, 6, 1).settings["shape"] | {"extractor_mode": "layer_norm"}
    return {
        "tiny": lambda: build("tiny", channels=16, embedding=8),
        "xvector": lambda: build("xvector", channels=16, embedding=8),
        "ecapa": lambda: build("ecapa", channels=16, embedding=8),
        "resnet34": lambda: build("resnet34", channels=4, embedding=8),
        "campplus": lambda: build("campplus", channels=16, embedding=8),
        "redimnet2": lambda: build("redimnet2", channels=4, embedding=8),
        "wavlm": lambda: SSLStudent(32, 6, 1, relative=True, shape=shape),
    }


def without_context(network: Network) -> Network:
    """A network whose frames depend on nothing but the input around them: what gates or attends by the whole view is
    constant."""
    for module in network.modules():
        constant = {
            Masked: lambda m: m.linear2.weight,
            SqueezeExcitation: lambda m: m.gate[2].weight,
            PositionalConvolution: lambda m: m.conv.parametrizations.weight.original0,
            RelativeAttention: lambda m: m.attention.out_proj.weight,
            TimeContext: lambda m: m.exp_dim_conv.weight,
        }.get(type(module))
        if constant is not None:
            constant(module).data.zero_()
        if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
    return network.eval()


@pytest.mark.parametrize("name", families())
def test_a_student_that_is_its_teacher_has_the_frames_of_its_cache(name: str) -> None:
    """At every start, and in a view that is repeated. Compared are the frames that see nothing but the crop, or one
    repetition, nearly: those within 0.3 s of its middle."""
    torch.manual_seed(0)
    network = without_context(families()[name]())
    level, kind, samples = network.levels["frames"], network.input_kind, np.array([60_000] * 5 + [40_777])
    generator = torch.Generator().manual_seed(1)
    views = [input_features(kind, 0.1 * torch.randn(1, int(n), generator=generator)) for n in samples]
    crop = Crop(np.array([0, 1, 2, 3, 4, 0]) * level.hop, 48_000, level.hop)
    with torch.no_grad():
        # Not normalised by the mean, which is another of a crop than of a view.
        cached = [network.run(view.mT if is_fbank(kind) else view)["frames"][0] for view in views]
        picked = Rows.of(kind, samples, crop).numbers
        crops = torch.stack([view[0, numbers] for view, numbers in zip(views, picked, strict=True)])
        mine = network.run(crops.mT if is_fbank(kind) else crops)["frames"]
    rows = Rows.of(level, samples, crop)
    theirs = torch.stack([of[numbers] for of, numbers in zip(cached, rows.numbers, strict=True)])
    found, expected, kept = align(mine, theirs, Alignment.of(level, level, samples, crop))
    mean = expected.mean(1, keepdim=True)  # what all frames have in common would make any two of them alike
    cosine = torch.cosine_similarity(found - mean, expected - mean, dim=-1)
    time = torch.from_numpy(np.arange(rows.height) * level.hop + level.middle)
    for view, centre in enumerate([24_000] * 5 + [20_000]):
        seen = (time - centre).abs() < 4800
        assert bool(seen.any())
        assert kept is None or bool(kept[view][seen].all())
        assert cosine[view][seen].min() > 0.9999, (name, view)


@pytest.mark.parametrize("name", families())
def test_the_time_of_a_frame_is_the_middle_of_what_it_sees(name: str) -> None:
    """The input to which a frame reacts at all reaches equally far to both sides of its declared time."""
    torch.manual_seed(0)
    network = without_context(families()[name]())
    level, kind = network.levels["frames"], network.input_kind
    if is_fbank(kind):  # nothing is cut off by a ReLU
        for parameter in network.parameters():
            parameter.data.abs_()
    features = input_features(kind, 0.1 * torch.randn(1, 16_000 * 8)).abs().requires_grad_()
    frames = network.run(features.mT if is_fbank(kind) else features)["frames"]
    number = frames.shape[1] // 2
    (gradient,) = torch.autograd.grad(frames[0, number].square().sum(), features)
    if is_fbank(kind):
        seen = gradient[0].abs().sum(-1).nonzero()[:, 0] * kind.hop + kind.middle
    else:
        energy = gradient[0].flatten().abs()
        seen = (energy > 1e-3 * energy.max()).nonzero()[:, 0].float() + 0.5
    middle = float(seen.min() + seen.max()) / 2
    assert middle == pytest.approx(number * level.hop + level.middle, abs=1 if is_fbank(kind) else 20)


@pytest.mark.parametrize("time_last", [False, True])
@pytest.mark.parametrize("stride", [1, 2, 3, 7, 20])
def test_every_so_many_frames_from_the_first_that_counts(stride: int, time_last: bool) -> None:
    random = np.random.RandomState(stride)
    made, codes, kept = random.randn(40, 7, 3), random.randint(9, size=(40, 7, 2)), random.rand(40, 7) < 0.3
    kept[np.arange(40), random.randint(7, size=40)] = True
    frames = torch.from_numpy(made)
    if time_last:
        frames = frames.mT.contiguous().mT
    expected = []
    for view in range(40):
        first = int(np.flatnonzero(kept[view])[0])
        expected.append([frame for frame in range(first, 7, stride) if kept[view, frame]])
    found = every(stride, frames, torch.from_numpy(codes), torch.from_numpy(kept))
    assert found[2] is not None
    for view, numbers in enumerate(expected):
        chosen = found[2][view]
        np.testing.assert_array_equal(found[0][view][chosen], made[view][numbers])
        np.testing.assert_array_equal(found[1][view][chosen], codes[view][numbers])
    whole = every(stride, frames, torch.from_numpy(codes), None)
    assert whole[2] is None
    np.testing.assert_array_equal(whole[0], made[:, ::stride])
    np.testing.assert_array_equal(whole[1], codes[:, ::stride])
