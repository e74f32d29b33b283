"""Self-distillation: the formulas in float64, what moves and what does not, and the real commands."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from spkd.networks.network import forward_crops
from spkd.outputs.target import Target
from spkd.students import build, load_student
from spkd.train.losses.base import ChosenLoss, LossContext, LossInputs
from spkd.train.losses.chosen import WeightedSum
from spkd.train.losses.contrastive import Contrastive
from spkd.train.losses.memo import MeMo, MeMoSettings
from spkd.train.module import TrainingModule
from tests.conftest import CommandLine, save_teacher
from tests.train.killing import kill_after_saving

TINY = MeMoSettings(
    partner="tiny",
    partner_channels=8,
    locals=2,
    prototypes=12,
    hidden=10,
    bottleneck=5,
    frozen_prototypes=0.0,
    contrastive_weight=0.5,
)
EMBEDDING = {"embedding": Target("embedding", 6)}


def f64(x: torch.Tensor) -> np.ndarray:
    return x.detach().double().numpy()


def module(config: MeMoSettings = TINY) -> TrainingModule:
    torch.manual_seed(0)
    network = build("xvector", channels=8, embedding=6)
    terms = {"memo": (ChosenLoss("memo", MeMo, config), "")}
    return TrainingModule(network, WeightedSum(terms, LossContext(network.levels, EMBEDDING, 1)))


def batch(size: int = 6) -> tuple[list[torch.Tensor], LossInputs]:
    generator = torch.Generator().manual_seed(1)
    lengths = (40, 40, 24, 24)
    crops = [torch.randn(size, length, 80, generator=generator) for length in lengths]
    targets = {"embedding": torch.randn(size, 6, generator=generator)}
    return crops, LossInputs(targets, torch.full((size,), -1), torch.arange(size), progress=0.1)


def loss_of(model: TrainingModule) -> MeMo:
    loss = model.objective.by_name()["memo"]
    assert isinstance(loss, MeMo)
    return loss


def log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("teacher", [0.0, 0.3])
def test_the_sum_of_modes_and_contrast(teacher: float) -> None:
    model = module(replace(TINY, teacher_weight=teacher, cross_weight=0.7)).eval()
    loss = loss_of(model)
    generator = torch.Generator().manual_seed(2)
    for learner in (loss.own, loss.other):
        for p in learner.teacher_heads.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
        for c in learner.centre.values():
            c.copy_(torch.randn(12, generator=generator) * 0.1)
    crops, inputs = batch()
    total, _ = model(crops, inputs)

    def head(learner: torch.nn.Module, which: str, mode: str, e: np.ndarray) -> np.ndarray:
        module = getattr(learner, which)[mode]
        x = f64(module.mlp(torch.from_numpy(e).float()))
        return unit(x) @ unit(f64(module.last)).T

    networks = {"a": (model.network, loss.own), "b": (loss._partner(), loss.other)}
    s = {n: [f64(net(c)["embedding"]) for c in crops] for n, (net, _) in networks.items()}
    t = {n: [f64(learner.teacher(c)["embedding"]) for c in crops[:2]] for n, (_, learner) in networks.items()}  # type: ignore[operator]
    tau = 0.04 + (0.07 - 0.04) * 0.5  # 0.1 of the run, of a warm-up over 0.2

    def h(mode: str, teacher_of: str, student_of: str) -> float:
        terms = []
        centre = f64(networks[teacher_of][1].centre[mode])
        for i in range(2):
            p = np.exp(
                log_softmax((head(networks[teacher_of][1], "teacher_heads", mode, t[teacher_of][i]) - centre) / tau)
            )
            for v in range(4):
                if v != i:
                    q = log_softmax(head(networks[student_of][1], "heads", mode, s[student_of][v]) / 0.1)
                    terms.append(-(p * q).sum(1).mean())
        return float(np.mean(terms))

    def info_nce(n: str) -> float:
        terms = []
        for i, v in ((0, 1), (1, 0)):
            rows = unit(np.concatenate([t[n][i], s[n][v]]))
            for r in range(12):
                z = 10.0 * rows @ rows[r]
                others = [z[k] for k in range(12) if k != r]
                terms.append(math.log(sum(math.exp(x) for x in others)) - z[(r + 6) % 12])
        return float(np.mean(terms)) / 0.07

    expected = h("self", "a", "a") + h("self", "b", "b") + 0.7 * (h("cross", "b", "a") + h("cross", "a", "b"))
    expected += 0.5 * (info_nce("a") + info_nce("b"))
    if teacher:
        for frozen, n in zip(loss.frozen, "ab", strict=True):  # type: ignore[arg-type]
            assert isinstance(frozen, Contrastive)
            expected += 0.3 * frozen({"embedding": torch.from_numpy(s[n][0]).float()}, inputs).item()
    assert total.item() == pytest.approx(expected, rel=1e-4)


def test_students_learn_teachers_follow() -> None:
    model = module().train()
    loss = loss_of(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    crops, inputs = batch()
    total, _ = model(crops, inputs)
    total.backward()
    learning = {name for name, p in model.named_parameters() if p.grad is not None and bool((p.grad != 0).any())}
    still = {name for name, p in model.named_parameters() if ".teacher" in name or ".centre" in name}
    assert all(not p.requires_grad for name, p in model.named_parameters() if name in still)
    heads = {f"{who}.heads.{mode}.last" for who in ("own", "other") for mode in ("self", "cross")}
    assert heads <= {name.removeprefix("objective.losses.memo.") for name in learning}
    assert any(name.startswith("network.") for name in learning)
    assert any(name.startswith("objective.losses.memo.partner.network") for name in learning)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    embeddings = torch.cat([levels["embedding"] for levels in forward_crops(loss.own.teacher, crops[:2])])
    teacher_outputs = f64(loss.own.teacher_heads["self"](embeddings))
    model.after_step(0.5, 0.5)
    momentum = 1.0 - (1.0 - 0.996) * (math.cos(math.pi * 0.5) + 1) / 2
    for name, mine in loss.own.teacher.named_parameters():
        old, new = before[f"objective.losses.memo.own.teacher.{name}"], model.network.get_parameter(name)
        assert torch.allclose(mine, momentum * old + (1 - momentum) * new, atol=1e-6)
    assert np.allclose(f64(loss.own.centre["self"]), 0.1 * teacher_outputs.mean(0), atol=1e-5)
    assert model.trained_network() is loss.own.teacher


def test_each_network_is_clipped_by_itself() -> None:
    model = module()
    own, partner = model.by_network()
    loss = loss_of(model)
    theirs = {id(p) for p in [*loss._partner().parameters(), *loss.other.heads.parameters()]}
    assert {id(p) for p in partner} == theirs
    assert {id(p) for p in own} == {id(p) for p in model.parameters() if p.requires_grad} - theirs


def test_the_last_layer_is_not_trained_at_first() -> None:
    model = module(replace(TINY, frozen_prototypes=0.2)).train()
    crops, inputs = batch()
    for done, moved in ((0.1, False), (0.3, True)):
        model.zero_grad()
        model(crops, replace(inputs, progress=done))[0].backward()
        gradient = loss_of(model).own.heads["self"].last.grad  # type: ignore[union-attr]
        assert (gradient is not None) == moved


def watched(model: TrainingModule, steps: int, crops_at: Callable[[int], list[torch.Tensor]], lr: float = 0.05) -> MeMo:
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    _, inputs = batch()
    for step in range(steps):
        model.train()
        optimiser.zero_grad()
        total, _ = model(crops_at(step), replace(inputs, progress=step / steps))
        total.backward()
        optimiser.step()
        model.after_step((step + 1) / steps, (step + 1) / steps)
    return loss_of(model)


@pytest.mark.slow
def test_contrast_that_no_longer_falls_is_stopped(capsys: pytest.CaptureFixture) -> None:
    crops, _ = batch()
    loss = watched(module(), 160, lambda step: crops, lr=0.0)
    report = loss.report()
    assert 20 <= report["contrastive_stopped"] <= 60
    assert "stopped at step" in capsys.readouterr().out
    model = module().eval()
    loss = loss_of(model)
    with_term = model(*batch())[0]
    loss.load_state_dict(loss.state_dict() | {"stopped": torch.tensor(3)})
    without = model(*batch())[0]
    never = watched(module(replace(TINY, dynamic_stop=False)), 160, lambda step: crops, lr=0.0)
    assert never.report()["contrastive_stopped"] is None
    alone = loss_of(module(replace(TINY, contrastive_weight=0.0)).eval())
    assert with_term > without
    assert alone.report()["contrastive_stopped"] is None


@pytest.mark.slow
def test_contrast_that_opposes_the_distillation_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    contrast = MeMo._contrast
    crops, _ = batch()
    model = module()
    # Against a term that falls wherever the distillation rises.
    monkeypatch.setattr(MeMo, "_contrast", lambda self, s, t: -contrast(self, s, t))
    loss = watched(model, 100, lambda step: crops, lr=0.02)
    report = loss.report()
    assert report["contrastive_stopped"] is not None
    monkeypatch.undo()
    assert report["reason"]


@pytest.mark.slow
def test_a_collapse_is_reported(capsys: pytest.CaptureFixture) -> None:
    generator = torch.Generator().manual_seed(3)
    varied = [[torch.randn(6, n, 80, generator=generator) for n in (40, 40, 24, 24)] for _ in range(60)]
    alike = [torch.ones(6, n, 80) for n in (40, 40, 24, 24)]
    loss = watched(module(replace(TINY, contrastive_weight=0.0)), 60, lambda step: alike)
    assert loss.report()["collapsed"] is not None
    assert loss.report()["information_nats"] < 0.05
    assert "memo has collapsed" in capsys.readouterr().out
    loss = watched(module(replace(TINY, momentum=[0.9, 1.0])), 60, lambda step: varied[step])
    assert loss.report()["information_nats"] > 0.05
    assert loss.report()["collapsed"] is None


def test_mixed_precision_changes_little() -> None:
    model, (crops, inputs) = module(), batch(32)
    exact = model(crops, inputs)[0].item()
    with torch.autocast("cpu", torch.bfloat16):
        value = model(crops, inputs)[0]
    value.backward()
    model.after_step(0.5, 0.5)
    assert abs(value.item() - exact) < 0.05 * abs(exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_embeddings(dtype: torch.dtype) -> None:
    for size in (1, 512):
        model = module().eval()
        crops, inputs = batch(size)
        exact = model(crops, inputs)[0].item()
        levels = [{k: v.to(dtype).float() for k, v in model.network(c).items()} for c in crops]
        value = loss_of(model)(levels[0], replace(inputs, crops=crops, other_levels=levels[1:]))
        value.backward()
        assert abs(value.item() - exact) < 0.02 * abs(exact)


def test_gradients_are_those_of_finite_differences() -> None:
    model = module(
        replace(TINY, teacher_temperature=[0.5, 0.5], student_temperature=0.5, contrastive_weight=0.05)
    ).eval()
    crops, inputs = batch(4)
    levels = [{"embedding": model.network(crop)["embedding"].detach()} for crop in crops]
    loss = loss_of(model)

    def value(of: torch.Tensor) -> torch.Tensor:
        return loss({"embedding": of}, replace(inputs, crops=crops, other_levels=levels[1:]))

    embedding = levels[0]["embedding"].clone().requires_grad_()
    value(embedding).backward()
    assert embedding.grad is not None
    for index in ((0, 0), (2, 3), (3, 5)):
        step = torch.zeros_like(embedding)
        step[index] = 1e-3
        with torch.no_grad():
            change = value(embedding + step) - value(embedding - step)
        assert abs(change.item() / 2e-3 - embedding.grad[index].item()) < 5e-3 * max(1.0, abs(change.item() / 2e-3))


def test_the_order_of_the_batch_does_not_matter() -> None:
    model = module().eval()
    crops, inputs = batch(8)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(model(crops, inputs)[0], model([c[order] for c in crops], inputs)[0], atol=1e-4)


SMALL = [
    *("steps=12", "batch_size=6", "student.channels=8", "student.embedding=6", "crop=0.5", "loss.memo.local_crop=0.3"),
    *("loss.memo.partner=tiny", "loss.memo.partner_channels=8", "loss.memo.prototypes=20", "loss.memo.hidden=12"),
    *("loss.memo.bottleneck=6", "loss.memo.locals=2"),
]


@pytest.fixture
def cached(spkd: CommandLine, extraction: list[str]) -> None:
    save_teacher(Path("teacher"), 12)
    spkd.once("cache", *extraction, "fbank=true", "view=crops:3,0.8", "view.noise=synthetic")


@pytest.mark.slow
@pytest.mark.usefixtures("cached")
def test_two_architectures_and_one(spkd: Callable, corpus: Path) -> None:
    spkd("train", "--loss", "memo", *SMALL).ok()
    record = load_student("student").training.reports["memo"]
    assert set(record) == {"contrastive_stopped", "reason", "collapsed", "information_nats"}
    spkd("eval", str(corpus / "trials.txt"), f"manifest={corpus / 'manifest.csv'}").ok()
    dino = [argument for argument in SMALL if "partner" not in argument]
    spkd("train", "--loss", "memo", *dino, "loss.memo.partner=none", "out=dino").ok()
    third = ["loss.memo.teacher_weight=1.0", "mining.negatives=2", "out=third"]
    spkd("train", "--loss", "memo", *SMALL, *third).ok()
    done = spkd("train", "--loss", "memo", *SMALL, "loss.memo.partner=ssl", "loss.memo.partner_channels=16", "out=no")
    assert "takes wave input, the student takes fbank" in done.err


@pytest.mark.slow
@pytest.mark.usefixtures("cached")
def test_a_killed_run_continues_to_the_same_weights(spkd: Callable, tmp_path: Path) -> None:
    arguments = ["train", "--loss", "memo", "--loss", "ntxent", *SMALL[1:], "steps=40", "save_every=5"]
    spkd(*arguments, "out=whole").ok()
    kill_after_saving([*arguments, "out=killed"], tmp_path / "killed")
    spkd(*arguments, "out=killed").ok()
    whole, killed = load_file("whole/model.safetensors"), load_file("killed/model.safetensors")
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    assert (
        json.loads(Path("whole/model.json").read_text())["training"]["reports"]["memo"]
        == json.loads(Path("killed/model.json").read_text())["training"]["reports"]["memo"]
    )
