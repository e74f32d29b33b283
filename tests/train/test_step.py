from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from spkd import config
from spkd.cache import Crop
from spkd.errors import UsageError
from spkd.outputs.target import Target
from spkd.students import build
from spkd.train.alignment import Alignment
from spkd.train.loading import TrainBatch
from spkd.train.losses.base import LossContext, LossInputs
from spkd.train.losses.chosen import WeightedSum, chosen_losses
from spkd.train.module import TrainingModule
from spkd.train.settings import TrainConfig
from spkd.train.step import Optimisation

CPU = torch.device("cpu")


def prepared(loss: str = "mse", student: str = "xvector", **settings: object) -> tuple[Optimisation, TrainingModule]:
    given = [f"{name}={value}" for name, value in settings.items()]
    options = config.load(
        TrainConfig, [f"loss={loss}", "steps=10", "mask.frames=0", "mask.bands=0", *given], environ={}
    )
    torch.manual_seed(0)
    network = build(student, channels=16, embedding=8)
    # Frames whose times are between the student's.
    context = LossContext(
        network.levels, {"embedding": Target("embedding", 8), "frames": Target("frames", 5, 200, 512)}, 4
    )
    losses = {name: (chosen, "") for name, chosen in chosen_losses(options.loss).items()}
    module = TrainingModule(network, WeightedSum(losses, context))
    return Optimisation(options, module, CPU), module


def batch(seed: int, views: int = 8) -> TrainBatch:
    generator = torch.Generator().manual_seed(seed)
    crop = torch.randn(views, 60, 80, generator=generator)
    targets = {"embedding": torch.randn(views, 8, generator=generator)}
    targets["frames"] = torch.randn(views, 47, 5, generator=generator)
    whole, level = np.full(views, 9840), Target("frames", 1, 160, 400)
    alignment = Alignment.of(level, Target("frames", 5, 200, 512), whole, Crop(np.zeros(views, int), 9840))
    alignments = {"frames": alignment}
    return TrainBatch([crop], LossInputs(targets, torch.arange(views) % 4, torch.arange(views), alignments=alignments))


def gradients(module: TrainingModule) -> list[Tensor]:
    return [p.grad.clone() for p in module.parameters() if p.grad is not None]


def test_gradients_of_several_batches_are_their_mean() -> None:
    """Against one batch at a time, with statistics of batch-norm that are each batch's own."""
    optimisation, module = prepared(**{"accumulate": 2, "optim.clip": 0})
    terms = optimisation.step(0, [batch(0), batch(1)])
    found, each, losses = gradients(module), [], []
    for seed in (0, 1):
        single, other = prepared(**{"optim.clip": 0})
        losses.append(single.step(0, [batch(seed)])["mse"])
        each.append(gradients(other))
    for mean, one, two in zip(found, *each, strict=True):
        assert torch.allclose(mean, (one + two) / 2, atol=1e-6)
    assert torch.allclose(terms["mse"], torch.stack(losses).mean())


def test_bfloat16_gives_nearly_the_same_loss_and_trains() -> None:
    whole, half = prepared()[0], prepared(precision="bf16")[0]
    first = [float(one.step(0, [batch(0)])["mse"]) for one in (whole, half)]
    assert first[0] == pytest.approx(first[1], rel=0.02)
    last = [float(half.step(step, [batch(0)])["mse"]) for step in range(1, 10)][-1]
    assert last < first[1]
    with pytest.raises(UsageError, match="precision=fp16: needs a GPU"):
        prepared(precision="fp16")


@pytest.mark.parametrize("loss", ["contrastive", "aam", "relational", "multilevel"])
def test_losses_are_in_full_precision_beside_a_network_in_half(loss: str) -> None:
    more = {"loss.multilevel.levels": "{frames: frames}"} if loss == "multilevel" else {}
    optimisation, module = prepared(loss, precision="bf16", **more)
    one, kept = batch(0), []
    module.network.register_forward_hook(lambda network, given, levels: kept.append(levels))
    (term,) = optimisation.step(0, [one]).values()
    assert kept[0]["embedding"].dtype == torch.bfloat16
    with torch.no_grad():
        levels = {name: values.detach().float() for name, values in kept[0].items()}
        fresh = prepared(loss, **more)[1]
        expected, _ = fresh.objective(levels, one.inputs)
    assert term.dtype == torch.float32
    torch.testing.assert_close(term, expected)


def test_the_memory_format_changes_rounding_alone() -> None:
    plain, other = prepared(student="resnet34")[0], prepared(student="resnet34", channels_last="true")[0]
    for step in range(3):
        one, two = plain.step(step, [batch(step)]), other.step(step, [batch(step)])
        assert float(one["mse"]) == pytest.approx(float(two["mse"]), rel=1e-3)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_the_fused_optimiser_changes_rounding_alone(name: str) -> None:
    fused, other = (prepared(student="tiny", optim=name)[0] for _ in range(2))
    for group in other.optimiser.param_groups:
        assert group["fused"]
        group["fused"] = False
    for step in range(3):
        one, two = fused.step(step, [batch(step)]), other.step(step, [batch(step)])
        assert float(one["mse"]) == pytest.approx(float(two["mse"]), rel=1e-3)


def test_no_step_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a step is read back: on a GPU that would stop it until the device is done. (Adam's own count of steps
    is on the host.)"""
    optimisation, _ = prepared(
        "contrastive", **{"loss.contrastive.ceiling": 2, "optim": "sgd"}
    )  # Adam counts on the host

    def refuse(*_: object) -> None:
        raise AssertionError("a value of the device was read")

    optimisation.step(0, [batch(0)])
    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(Tensor, name, refuse)
    terms = optimisation.step(1, [batch(1)])
    monkeypatch.undo()
    assert isinstance(terms["contrastive"], Tensor)


def test_the_first_step_that_is_not_finite_is_kept() -> None:
    optimisation, _ = prepared()
    optimisation.step(0, [batch(0)])
    assert int(optimisation.first_bad) == -1
    bad = batch(1)
    bad.inputs.targets["embedding"][0, 0] = float("nan")
    for step, one in enumerate((batch(2), bad, batch(3)), 1):
        optimisation.step(step, [one])
    assert int(optimisation.first_bad) == 2


def test_a_loss_can_change_its_weight_and_its_margin() -> None:
    given = {"loss.final_weights.mse": 0, "large_margin.steps": 2, "large_margin.margin": 0.5}
    optimisation, module = prepared("[mse,aam]", **given)
    chosen = {name: one for name, (one, _) in module.objective._terms.items()}
    assert [chosen["mse"].weight_at(p) for p in (0.0, 0.5, 1.0)] == [1.0, 0.5, 0.0]
    assert chosen["aam"].weight_at(0.7) == 1.0
    seen = []
    aam = module.objective.by_name()["aam"]
    aam.register_forward_pre_hook(lambda _, arguments: seen.append((arguments[1].margin, arguments[1].progress)))
    for step in (9, 10, 11):
        optimisation.step(step, [batch(step)])
    assert seen == [(None, 0.9), (0.5, 1.0), (0.5, 1.0)]
    assert optimisation.optimiser.param_groups[0]["lr"] == pytest.approx(2.5e-5)


def test_what_is_not_in_use_has_no_final_weight(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"the loss aam is not in use"):
        prepared(**{"loss.final_weights.aam": 1})
