"""Every loss against its formula written out in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from spkd import config
from spkd.cache import Crop
from spkd.errors import UsageError
from spkd.outputs.target import Target
from spkd.registry import LOSSES
from spkd.train.alignment import Alignment
from spkd.train.losses import multilevel
from spkd.train.losses.aam import AAM, AAMSettings, add_margin, margin_ramp
from spkd.train.losses.base import ChosenLoss, Loss, LossContext, LossInputs
from spkd.train.losses.chosen import WeightedSum, chosen_losses, for_teachers
from spkd.train.losses.codebook import Codebook, CodebookSettings
from spkd.train.losses.contrastive import Contrastive, ContrastiveSettings
from spkd.train.losses.logits import (
    KLD,
    LabelSettings,
    NonTarget,
    NonTargetSettings,
    Triage,
    TriageSettings,
    confusion_set,
)
from spkd.train.losses.multilevel import MultiLevel, MultiLevelSettings, cosines
from spkd.train.losses.ntxent import NTXent, NTXentSettings
from spkd.train.losses.regression import MSE, Cosine
from spkd.train.losses.relational import Relational
from spkd.train.settings import LossConfig, TrainConfig

DIM = 6
FRAMES = Target("frames", 7, 320, 400)
CODES = Target("frames.codes", 3, 320, 400, "rq3x8")
FROM_LEVELS = [name for name in LOSSES if name != "memo"]  # memo computes levels of its own: see test_memo


def setting(
    batch: int = 9, classes: int = 5, seed: int = 0, teacher_dim: int = DIM
) -> tuple[dict[str, torch.Tensor], LossInputs]:
    generator = torch.Generator().manual_seed(seed)
    student = {"embedding": torch.randn(batch, DIM, generator=generator)}
    teacher = {"embedding": torch.randn(batch, teacher_dim, generator=generator)}
    label = torch.randint(classes, (batch,), generator=generator)
    teacher["logits"] = 30.0 * (2 * torch.rand(batch, classes, generator=generator) - 1)
    student["frames"] = torch.randn(batch, 24, DIM, generator=generator)
    teacher["frames"] = torch.randn(batch, 24, 7, generator=generator)
    teacher["frames.codes"] = torch.randint(256, (batch, 24, 3), generator=generator, dtype=torch.uint8)
    teacher["embedding.codes"] = torch.randint(256, (batch, 3), generator=generator, dtype=torch.uint8)
    others = [{"embedding": torch.randn(batch, DIM, generator=generator)}]
    tuned = {"embedding": torch.randn(batch, DIM, generator=generator)}
    inputs = LossInputs(
        teacher,
        label,
        torch.arange(batch),
        label,
        30.0,
        other_levels=others,
        finetune_levels=tuned,
        finetune_label=label,
        alignments={
            name: Alignment.of(FRAMES, FRAMES, np.full(batch, 7760), Crop(np.zeros(batch, int), 7760))
            for name in ("frames", "frames.codes")
        },
    )
    return student, inputs


def build(kind: type[Loss], settings: object = None, classes: int = 5, teacher_dim: int = DIM) -> Loss:
    torch.manual_seed(1)
    targets = {"embedding": Target("embedding", teacher_dim), "logits": Target("logits", classes), "frames": FRAMES}
    targets |= {CODES.name: CODES, "embedding.codes": Target("embedding.codes", 3, codec="rq3x8")}
    levels = {"embedding": Target("embedding", DIM), "frames": Target("frames", DIM, 320, 400)}
    settings = settings or kind.Settings()
    if kind is LOSSES["one-step"]:
        settings = replace(settings, targets=["frames"])  # type: ignore[type-var]
    if kind is LOSSES["codebook"]:
        settings = replace(settings, levels={"frames": "frames", "embedding": "embedding"})  # type: ignore[type-var]
    return kind(settings, LossContext(levels, targets, classes))


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def f64(x: torch.Tensor) -> np.ndarray:
    return x.detach().double().numpy()


@pytest.mark.parametrize("classes", [2, 5, 6000])
def test_aam(classes: int) -> None:
    student, inputs = setting(classes=classes)
    config = AAMSettings(margin=0.3, scale=20.0)
    loss = build(AAM, config, classes)
    cosine = unit(f64(student["embedding"])) @ unit(f64(loss.weight)).T  # type: ignore[arg-type]
    total = 0.0
    for row, y in zip(cosine, inputs.label.tolist(), strict=True):
        theta = math.acos(row[y])
        logits = 20.0 * row
        logits[y] = 20.0 * (math.cos(theta + 0.3) if theta + 0.3 < math.pi else row[y] - (1 - math.cos(0.3)))
        total += np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[y]
    assert abs(loss(student, inputs).item() - total / len(cosine)) < 1e-4


def test_aam_is_the_mean_over_the_views_that_have_a_label() -> None:
    student, inputs = setting()
    known = torch.tensor([True, False, True, True, False, False, True, True, True])
    loss = build(AAM)
    part = loss({"embedding": student["embedding"][known]}, replace(inputs, label=inputs.label[known]))
    whole = loss(student, replace(inputs, label=torch.where(known, inputs.label, -1)))
    torch.testing.assert_close(whole, part)
    embedding = student["embedding"].clone().requires_grad_()
    none = loss({"embedding": embedding}, replace(inputs, label=torch.full_like(inputs.label, -1)))
    none.backward()
    assert none.item() == 0.0
    assert (embedding.grad == 0).all()


def test_the_margin_is_continuous_and_monotonic_over_all_angles() -> None:
    theta = torch.linspace(0, math.pi, 2001, dtype=torch.float64)
    cosine = theta.cos()[:, None]
    shifted = add_margin(cosine, torch.zeros(2001, dtype=torch.long), 0.2)[:, 0]
    assert (shifted.diff() <= 1e-12).all()
    assert shifted.diff().abs().max() < 0.05


def test_cosine_and_mse() -> None:
    student, inputs = setting()
    s, t = f64(student["embedding"]), f64(inputs.targets["embedding"])
    assert abs(build(Cosine)(student, inputs).item() - np.mean(1 - (unit(s) * unit(t)).sum(1))) < 1e-5
    assert abs(build(MSE)(student, inputs).item() - np.mean(((s - t) ** 2).sum(1))) < 1e-4


def margin_logits(cosine: np.ndarray, label: list[int], margin: float, scale: float) -> np.ndarray:
    """scale * cos(theta + margin) at the labels, entry by entry, in float64."""
    logits = scale * cosine
    for row, (values, y) in enumerate(zip(cosine, label, strict=True)):
        if y >= 0:
            theta = math.acos(values[y])
            shifted = math.cos(theta + margin) if theta + margin < math.pi else values[y] - (1 - math.cos(margin))
            logits[row, y] = scale * shifted
    return logits


def log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def classifier_logits(
    loss: Loss, student: dict, inputs: LossInputs, config: LabelSettings
) -> tuple[np.ndarray, np.ndarray]:
    """Of teacher and student, with their margins."""
    label = inputs.teacher_label.tolist()
    cosine = unit(f64(student["embedding"])) @ unit(f64(loss.weight)).T  # type: ignore[arg-type]
    z_s = margin_logits(cosine, label, config.margin, config.scale)
    return margin_logits(f64(inputs.targets["logits"]) / 30.0, label, config.teacher_margin, 30.0), z_s


@pytest.mark.parametrize("classes", [2, 7, 6000])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kld(classes: int, temperature: float) -> None:
    student, inputs = setting(classes=classes)
    config = LabelSettings(temperature=temperature)
    loss = build(KLD, config, classes)
    z_t, z_s = classifier_logits(loss, student, inputs, config)
    entropy = -np.mean([log_softmax(row)[y] for row, y in zip(z_s, inputs.label.tolist(), strict=True)])
    p, q = log_softmax(z_t / temperature), log_softmax(z_s / temperature)
    expected = entropy + temperature**2 * np.mean((np.exp(p) * (p - q)).sum(1))
    assert loss(student, inputs).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("classes", [2, 7, 6000])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_nontarget(classes: int, temperature: float) -> None:
    """Both parts from the probabilities themselves, as the paper writes them."""
    student, inputs = setting(classes=classes)
    config = NonTargetSettings(temperature=temperature, gamma=3.0)
    loss = build(NonTarget, config, classes)
    z_t, z_s = classifier_logits(loss, student, inputs, config)
    total = 0.0
    for t, s, y in zip(z_t, z_s, inputs.label.tolist(), strict=True):
        p_t, p_s = (np.exp(log_softmax(z / temperature)) for z in (t, s))
        b_t, b_s = (np.array([p[y], np.delete(p, y).sum()]) for p in (p_t, p_s))
        q_t, q_s = (np.exp(log_softmax(np.delete(z, y) / temperature)) for z in (t, s))
        divergence = (b_t * np.log(b_t / b_s)).sum() + 3.0 * (q_t * np.log(q_t / q_s)).sum()
        total += -log_softmax(s)[y] + temperature**2 * divergence
    assert loss(student, inputs).item() == pytest.approx(total / len(z_t), rel=1e-4)


@pytest.mark.parametrize("classes", [2, 7, 600])
@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_trkd(classes: int, progress: float) -> None:
    """From the probabilities: sort the non-targets, take the fewest that reach the cut-off, sum and compare."""
    student, inputs = setting(classes=classes)
    config = TriageSettings(temperature=4.0, cutoff=[0.99, 0.4], gamma=3.0)
    loss = build(Triage, config, classes)
    z_t, z_s = classifier_logits(loss, student, inputs, config)
    cutoff, total = 0.99 + (0.4 - 0.99) * progress, 0.0
    for t, s, y in zip(z_t, z_s, inputs.label.tolist(), strict=True):
        p_t, p_s = (np.exp(log_softmax(z / 4.0)) for z in (t, s))
        confused: list[int] = []
        for k in sorted(set(range(classes)) - {y}, key=lambda k: -p_t[k]):
            if not confused or p_t[confused].sum() / (1 - p_t[y]) < cutoff:
                confused.append(k)
        rest = [k for k in range(classes) if k != y and k not in confused]
        divergence = 0.0
        for part in ([y], confused, rest):
            if part:
                divergence += p_t[part].sum() * np.log(p_t[part].sum() / p_s[part].sum())
        c_t, c_s = (p[confused] / p[confused].sum() for p in (p_t, p_s))
        divergence += 3.0 * (c_t * np.log(c_t / c_s)).sum()
        total += -log_softmax(s)[y] + 16.0 * divergence
    value = loss(student, replace(inputs, progress=progress))
    assert value.item() == pytest.approx(total / len(z_t), rel=1e-4)


def test_the_confusion_set_of_trkd_shrinks_and_is_never_empty() -> None:
    _, inputs = setting(classes=40, batch=50)
    sets = [confusion_set(inputs.targets["logits"], inputs.label, cutoff) for cutoff in (1.0, 0.99, 0.5, 0.0)]
    for wide, narrow in pairwise(sets):
        assert (wide | narrow).equal(wide)
    assert sets[-1].sum(1).tolist() == [1] * 50
    assert not any(chosen.gather(1, inputs.label[:, None]).any() for chosen in sets)


def test_nontarget_does_not_underflow_where_the_teacher_is_sure() -> None:
    student, inputs = setting(classes=50)
    sure = torch.full((9, 50), -30.0)
    sure.scatter_(1, inputs.label[:, None], 30.0)
    sure[:, 0] += 3.0
    loss = build(NonTarget, NonTargetSettings(teacher_margin=0.0), 50)
    embedding = student["embedding"].clone().requires_grad_()
    value = loss({"embedding": embedding}, replace(inputs, targets={"logits": sure}, teacher_scale=None))
    value.backward()
    assert torch.isfinite(value)
    assert embedding.grad is not None
    assert torch.isfinite(embedding.grad).all()
    assert embedding.grad.abs().max() > 0


def test_the_divergence_is_also_learnt_from_views_without_a_class() -> None:
    student, inputs = setting()
    unlabelled = replace(inputs, teacher_label=torch.full_like(inputs.label, -1))
    loss, config = build(KLD), LabelSettings()
    z_t, z_s = classifier_logits(loss, student, unlabelled, config)
    p, q = log_softmax(z_t), log_softmax(z_s)
    assert loss(student, unlabelled).item() == pytest.approx(np.mean((np.exp(p) * (p - q)).sum(1)), rel=1e-4)


def test_margin_and_divergence_warm_up() -> None:
    between = [0.2, 0.6]
    assert [margin_ramp(d, between) for d in (0.0, 0.1, 0.6, 1.0)] == [0.0, 0.0, 1.0, 1.0]
    assert margin_ramp(0.4, between) == pytest.approx(1 - 0.001**0.5)
    assert margin_ramp(0.0, [0.0, 0.0]) == 1.0
    student, inputs = setting()
    plain = build(AAM, AAMSettings(margin=0.0))(student, inputs)
    rising = build(AAM, AAMSettings(margin=0.3, margin_warmup=between))
    assert torch.equal(rising(student, replace(inputs, progress=0.1)), plain)
    assert rising(student, replace(inputs, progress=0.9)) > plain
    slow = build(KLD, LabelSettings(kd_warmup=0.5))
    at = [slow(student, replace(inputs, progress=d)).item() for d in (0.0, 0.25, 0.5)]
    assert at[1] == pytest.approx((at[0] + at[2]) / 2, rel=1e-5)
    assert at[2] == build(KLD)(student, inputs).item()


def test_of_several_centres_the_nearest_counts() -> None:
    student, inputs = setting()
    config = AAMSettings(subcentres=3, margin=0.1, scale=20.0)
    loss = build(AAM, config)
    cosine = (unit(f64(student["embedding"])) @ unit(f64(loss.weight)).T).reshape(9, 5, 3).max(2)  # type: ignore[arg-type]
    z = margin_logits(cosine, inputs.label.tolist(), 0.1, 20.0)
    expected = -np.mean([log_softmax(row)[y] for row, y in zip(z, inputs.label.tolist(), strict=True)])
    assert loss(student, inputs).item() == pytest.approx(expected, rel=1e-5)


def test_relational() -> None:
    student, inputs = setting(teacher_dim=11)
    s, t = unit(f64(student["embedding"])), unit(f64(inputs.targets["embedding"]))
    pairs = [(s[i] @ s[j] - t[i] @ t[j]) ** 2 for i in range(9) for j in range(9) if i != j]
    assert build(Relational, teacher_dim=11)(student, inputs).item() == pytest.approx(np.mean(pairs), rel=1e-5)


def reference_contrastive(s: np.ndarray, t: np.ndarray, instance: np.ndarray, tau: float, ceiling: float) -> float:
    s, t, total = unit(s), unit(t), 0.0
    for i in range(len(s)):
        kept = [j for j in range(len(s)) if j == i or (instance[i] != instance[j] and t[i] @ t[j] <= ceiling)]
        total -= s[i] @ t[i] / tau - math.log(sum(math.exp(s[i] @ t[j] / tau) for j in kept))
    return total / len(s)


@pytest.mark.parametrize("ceiling", [0.2, 1.1])
def test_contrastive(ceiling: float) -> None:
    student, inputs = setting(batch=12)
    inputs = LossInputs(inputs.targets, inputs.label, torch.tensor([0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9]))
    loss = build(Contrastive, ContrastiveSettings(temperature=0.1, ceiling=ceiling))
    expected = reference_contrastive(
        f64(student["embedding"]), f64(inputs.targets["embedding"]), inputs.instance.numpy(), 0.1, ceiling
    )
    assert abs(loss(student, inputs).item() - expected) < 1e-4


def test_ntxent() -> None:
    student, inputs = setting(batch=7)
    inputs = replace(inputs, instance=torch.tensor([0, 0, 1, 2, 3, 4, 4]))
    rows = unit(np.concatenate([f64(student["embedding"]), f64(inputs.other_levels[0]["embedding"])]))
    instance, total = np.concatenate([inputs.instance.numpy()] * 2), 0.0
    for i in range(14):
        partner = (i + 7) % 14
        kept = [k for k in range(14) if k == partner or instance[k] != instance[i]]
        total -= rows[i] @ rows[partner] / 0.2 - math.log(sum(math.exp(rows[i] @ rows[k] / 0.2) for k in kept))
    assert build(NTXent, NTXentSettings(temperature=0.2))(student, inputs).item() == pytest.approx(total / 14, rel=1e-5)


def test_ntxent_with_mined_positives() -> None:
    """No crop is a negative of its own instance, nor of the instance of its positive: by sums over pairs, float64."""
    student, inputs = setting(batch=5)
    first, second = [0, 1, 2, 3, 4], [1, 1, 4, 7, 8]  # the positive of view 0 is of view 1's instance, view 2's of 4's
    inputs = replace(inputs, instance=torch.tensor(first), other_instance=[torch.tensor(second)])
    rows = unit(np.concatenate([f64(student["embedding"]), f64(inputs.other_levels[0]["embedding"])]))
    speaker = [0, 0, 2, 3, 2]  # views that are taken for one
    total = 0.0
    for i in range(10):
        partner = (i + 5) % 10
        kept = [k for k in range(10) if k == partner or speaker[k % 5] != speaker[i % 5]]
        total -= rows[i] @ rows[partner] / 0.2 - math.log(sum(math.exp(rows[i] @ rows[k] / 0.2) for k in kept))
    assert build(NTXent, NTXentSettings(temperature=0.2))(student, inputs).item() == pytest.approx(total / 10, rel=1e-5)


@pytest.mark.parametrize("name", ["cosine", "mse", "contrastive"])
def test_other_widths_go_through_a_projection(name: str) -> None:
    student, inputs = setting(teacher_dim=11)
    loss = build(LOSSES[name], teacher_dim=11)
    projected = {"embedding": student["embedding"] @ loss.project.weight.T}  # type: ignore[union-attr, operator]
    wide = {"embedding": Target("embedding", 11)}
    straight = LOSSES[name](LOSSES[name].Settings(), LossContext(wide, wide, 5))
    assert torch.allclose(loss(student, inputs), straight(projected, inputs))


@pytest.mark.parametrize("name", FROM_LEVELS)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    student, inputs = setting(batch=5)
    kind = LOSSES[name]
    soft = {"temperature": 0.5, "scale": 4.0}
    settings = replace(kind.Settings(), **{k: v for k, v in soft.items() if hasattr(kind.Settings(), k)})
    if name in ("kld", "nontarget", "trkd"):
        settings = replace(settings, temperature=1.0)
    loss = build(kind, settings)
    embedding = student["embedding"].clone().requires_grad_()

    def value(of: torch.Tensor) -> torch.Tensor:
        if name == "one-step":  # learns the embedding on the other path
            return loss(student, replace(inputs, finetune_levels={"embedding": of}))
        return loss(student | {"embedding": of}, inputs)

    value(embedding).backward()
    assert embedding.grad is not None
    for index in ((0, 0), (2, 3), (4, 5)):
        step = torch.zeros_like(embedding)
        step[index] = 1e-2
        with torch.no_grad():
            change = value(embedding + step) - value(embedding - step)
        assert abs(change.item() / 2e-2 - embedding.grad[index].item()) < 5e-3


@pytest.mark.parametrize("name", FROM_LEVELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 512])
def test_half_precision_is_stable(name: str, dtype: torch.dtype, batch: int) -> None:
    student, inputs = setting(batch)
    loss = build(LOSSES[name])
    exact = loss(student, inputs).item()
    half, tuned = (
        {k: v.to(dtype).requires_grad_() for k, v in levels.items()} for levels in (student, inputs.finetune_levels)
    )
    others = [{k: v.to(dtype) for k, v in levels.items()} for levels in inputs.other_levels]
    value = loss(half, replace(inputs, other_levels=others, finetune_levels=tuned))
    value.backward()
    gradient = tuned["embedding"].grad if name == "one-step" else half["embedding"].grad
    assert gradient is not None
    assert torch.isfinite(gradient).all()
    assert abs(value.item() - exact) < 0.02 * max(abs(exact), 1.0)


@pytest.mark.parametrize("name", ["contrastive", "cosine", "mse", "multilevel"])
def test_half_precision_goes_through_a_projection(name: str) -> None:
    student, inputs = setting(teacher_dim=10)
    loss = build(LOSSES[name], teacher_dim=10)
    half = {level: values.bfloat16() for level, values in student.items()}
    assert abs(loss(half, inputs).item() - loss(student, inputs).item()) < 0.02 * abs(loss(student, inputs).item())


@pytest.mark.parametrize("name", FROM_LEVELS)
def test_the_order_of_the_batch_does_not_matter(name: str) -> None:
    student, inputs = setting(batch=16)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    targets = {name: values[order] for name, values in inputs.targets.items()}
    shuffled = LossInputs(
        targets,
        inputs.label[order],
        inputs.instance[order],
        inputs.teacher_label[order],
        inputs.teacher_scale,
        alignments=inputs.alignments,
    )
    others = [{"embedding": inputs.other_levels[0]["embedding"][order]}]
    tuned = {"embedding": inputs.finetune_levels["embedding"][order]}
    shuffled = replace(
        shuffled, other_levels=others, finetune_levels=tuned, finetune_label=inputs.finetune_label[order]
    )
    loss = build(LOSSES[name])
    turned = {level: values[order] for level, values in student.items()}
    assert torch.allclose(loss(student, inputs), loss(turned, shuffled), atol=1e-5)


@pytest.mark.parametrize("name", FROM_LEVELS)
@pytest.mark.parametrize("classes", [2, 6000])
def test_few_and_many_classes(name: str, classes: int) -> None:
    student, inputs = setting(batch=8, classes=classes)
    loss = build(LOSSES[name], classes=classes)
    levels, tuned = ({k: v.clone().requires_grad_() for k, v in of.items()} for of in (student, inputs.finetune_levels))
    value = loss(levels, replace(inputs, finetune_levels=tuned))
    value.backward()
    gradient = tuned["embedding"].grad if name == "one-step" else levels["embedding"].grad
    assert torch.isfinite(value)
    assert gradient is not None
    assert torch.isfinite(gradient).all()
    assert gradient.abs().sum() > 0


def test_a_perfect_student_has_no_loss() -> None:
    _, inputs = setting()
    student = {"embedding": 3.0 * inputs.targets["embedding"]}
    assert build(Cosine)(student, inputs).item() < 1e-6
    assert build(MSE)({"embedding": inputs.targets["embedding"]}, inputs).item() == 0.0
    assert build(Contrastive, ContrastiveSettings(temperature=0.001))(student, inputs).item() < 1e-6


def chosen(*names: str, weights: dict[str, float] | None = None) -> dict[str, ChosenLoss]:
    return chosen_losses(LossConfig(list(names), weights or {}))


def test_losses_add_up_with_their_weights() -> None:
    student, inputs = setting()
    one = {"embedding": Target("embedding", DIM)}
    both = WeightedSum(
        for_teachers(chosen("cosine", "mse", weights={"mse": 0.25}), ["embedding"]), LossContext(one, one, 1)
    )
    total, terms = both(student, inputs)
    assert torch.allclose(total, terms["cosine"] + 0.25 * terms["mse"])


def test_separate_teachers_give_a_term_each() -> None:
    student, inputs = setting()
    losses = chosen("aam", "mse")
    assert for_teachers(losses, ["embedding@0", "embedding@1", "fbank"]) == {
        "aam": (losses["aam"], ""),
        "mse@0": (losses["mse"], "@0"),
        "mse@1": (losses["mse"], "@1"),
    }
    own = student["embedding"]
    targets = {"embedding@0": own.detach(), "embedding@1": own.detach() + 1.0}
    described = {name: Target(name, DIM) for name in targets}
    context = LossContext({"embedding": Target("embedding", DIM)}, described, 1)
    both = WeightedSum(for_teachers(chosen("mse"), list(targets)), context)
    total, terms = both(student, LossInputs(targets, inputs.label, inputs.instance))
    assert terms["mse@0"].item() == 0.0
    assert torch.allclose(total, terms["mse@1"])
    assert terms["mse@1"].item() > 0.0


@pytest.mark.parametrize(
    ("names", "weights", "expected"),
    [
        (["cosin"], {}, "did you mean 'cosine'"),
        (["mse", "mse"], {}, "once"),
    ],
)
def test_bad_choices(names: list[str], weights: dict[str, float], expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        chosen(*names, weights=weights)


@pytest.mark.parametrize(
    ("loss", "key", "value"),
    [
        ("aam", "margin_warmup", "[0.5]"),
        ("aam", "margin_warmup", "[0.5,0.2]"),
        ("kld", "kd_warmup", "2.0"),
        ("aam", "subcentres", "0"),
        ("ntxent", "temperature", "0.0"),
        ("contrastive", "temperature", "nan"),
        ("memo", "momentum", "[0.5]"),
        ("multilevel", "level_weights", "{stat: 1}"),
    ],
)
def test_settings_outside_their_range(loss: str, key: str, value: str) -> None:
    given = [f"loss={loss}", f"loss.{loss}.{key}={value}"]
    with pytest.raises(UsageError, match=key):
        chosen_losses(config.load(TrainConfig, given, environ={}).loss)


def test_a_classifier_over_one_speaker_is_refused() -> None:
    for kind in (AAM, KLD):
        with pytest.raises(UsageError, match="two"):
            build(kind, classes=1)


def test_settings_of_a_loss_that_is_not_in_use_are_refused_where_they_are_typed(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def losses(content: str, *given: str) -> dict[str, ChosenLoss]:
        (tmp_path / "lab.yaml").write_text(content)
        return chosen_losses(config.load(TrainConfig, ["loss=mse", *given], tmp_path / "lab.yaml", {}).loss)

    for typed in ("loss.aam.margin=0.3", "loss.weights.aam=1.0"):
        with pytest.raises(UsageError, match="aam is not in use"):
            losses("", typed)
    assert list(losses("train: {loss: {aam: {margin: 0.3}, weights: {aam: 1.0}}}")) == ["mse"]
    assert "left out loss.aam.margin: loss=aam is not in use" in capsys.readouterr().out
    with pytest.raises(UsageError, match="did you mean 'loss.aam.margin'"):
        losses("train: {loss: {aam: {margn: 0.3}}}")


def test_every_loss_declares_its_settings_with_limits() -> None:
    for name in LOSSES:
        assert LOSSES.settings(name) is LOSSES[name].Settings
        for key in config.keys(LOSSES.settings(name)):
            assert key.meaning
            if key.kind.startswith(("int", "float", "list[float]")):
                assert any(key.limits.get(limit) is not None for limit in ("low", "high")), f"{name}: {key.name}"


def levels_setting(hop: int, window: int) -> tuple[dict[str, Target], dict[str, torch.Tensor], LossInputs]:
    """A student of 0.5 s (48 frames), a teacher with frames at another rate, and two vectors."""
    generator = torch.Generator().manual_seed(5)
    frames = Target("frames", 7, hop, window)
    targets = {"frames": frames, "stats": Target("stats", 9), "embedding": Target("embedding", 5)}
    student = {
        "frames": torch.randn(3, 48, 4, generator=generator),
        "stats": torch.randn(3, 8, generator=generator),
        "embedding": torch.randn(3, 6, generator=generator),
    }
    inputs = {
        "frames": torch.randn(3, frames.num_frames(8000), 7, generator=generator),
        "stats": torch.randn(3, 9, generator=generator),
        "embedding": torch.randn(3, 5, generator=generator),
    }
    crop = Crop(np.zeros(3, int), 8000)
    alignment = Alignment.of(Target("frames", 4, 160, 400), frames, np.full(3, 8000), crop)
    return targets, student, LossInputs(inputs, torch.zeros(3), torch.arange(3), alignments={"frames": alignment})


def levels_of(student: dict[str, torch.Tensor]) -> dict[str, Target]:
    vectors = {name: Target(name, values.shape[-1]) for name, values in student.items() if values.ndim == 2}
    return vectors | {"frames": Target("frames", student["frames"].shape[-1], 160, 400)}


def apart(a: np.ndarray, b: np.ndarray, distance: str) -> float:
    return float(np.mean((a - b) ** 2) if distance == "mse" else np.mean(1 - (unit(a) * unit(b)).sum(-1)))


@pytest.mark.parametrize("distance", ["cosine", "mse"])
@pytest.mark.parametrize(("hop", "window"), [(160, 400), (320, 400), (160, 0), (200, 512)])
def test_multilevel(distance: str, hop: int, window: int) -> None:
    targets, student, inputs = levels_setting(hop, window)
    levels = {"frames": "frames", "stats": "stats", "embedding": "embedding"}
    config = MultiLevelSettings(
        levels=levels, concat=["stats", "embedding"], distance=distance, level_weights={"stats": 0.5, "concat": 2.0}
    )
    loss = MultiLevel(config, LossContext(levels_of(student), targets, 1))
    assert config.needed_targets() == ("frames", "stats", "embedding")
    weight = {level: f64(loss.project[f"level{i}"].weight) for i, level in enumerate([*levels, "concat"])}  # type: ignore[arg-type, union-attr]
    s, t = ({name: f64(values) for name, values in side.items()} for side in (student, inputs.targets))
    mine = s["frames"] @ weight["frames"].T
    rows, theirs = [], []
    for j in range(t["frames"].shape[1]):
        place = (j * hop + window / 2 - 200) / 160  # in the student's frames: 25 ms windows every 10 ms
        if -0.5 <= place <= 47.5:
            place = min(max(place, 0.0), 47.0)
            rows.append([[np.interp(place, np.arange(48), mine[b, :, c]) for c in range(7)] for b in range(3)])
            theirs.append(t["frames"][:, j])
    expected = apart(np.array(rows), np.array(theirs), distance)
    expected += 0.5 * apart(s["stats"] @ weight["stats"].T, t["stats"], distance)
    expected += apart(s["embedding"] @ weight["embedding"].T, t["embedding"], distance)
    both = np.concatenate([unit(t["stats"]), unit(t["embedding"])], 1)
    expected += 2.0 * apart(s["embedding"] @ weight["concat"].T, both, distance)
    assert loss(student, inputs).item() == pytest.approx(expected, rel=1e-4)
    if (hop, window) == (160, 400):
        assert len(rows) == 48


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"levels": {"stat": "stats"}}, "did you mean 'stats'"),
        ({"levels": {"frames": "stats"}}, "compares frames with a vector"),
        ({"levels": {"stats": "frames"}}, "compares frames with a vector"),
        ({"levels": {}, "concat": ["frames"]}, "is frames, not a vector"),
        ({"levels": {}}, "name at least one pair"),
    ],
)
def test_levels_that_do_not_go_together(change: dict, expected: str) -> None:
    targets, student, _ = levels_setting(160, 400)

    def make() -> None:
        MultiLevelSettings(**change).check()
        MultiLevel(MultiLevelSettings(**change), LossContext(levels_of(student), targets, 1))

    with pytest.raises(UsageError, match=expected):
        make()


@pytest.mark.parametrize(("hop", "every"), [(0.0, 1), (0.04, 2), (0.055, 3)])
@pytest.mark.parametrize("codec", ["rq4x4", "lsq4x8", "pq4x8"])
def test_codebook(codec: str, hop: float, every: int) -> None:
    """Cross-entropy written out in float64: frames at the teacher's times (one every 20 ms), and vectors."""
    targets, student, inputs = levels_setting(320, 400)
    classes, random = 2 ** int(codec[-1]), torch.Generator().manual_seed(4)
    codes = {
        "frames": torch.randint(classes, (*inputs.targets["frames"].shape[:2], 4), generator=random),
        "stats": torch.randint(classes, (3, 4), generator=random),
    }
    for name, values in codes.items():
        inputs.targets[f"{name}.codes"] = values.to(torch.uint8)
        targets[f"{name}.codes"] = replace(targets[name], dim=4, codec=codec)
    inputs.alignments["frames.codes"] = inputs.alignments["frames"]
    settings = CodebookSettings({"frames": "frames", "embedding": "stats"}, hop)
    assert settings.needed_targets() == ("frames.codes", "stats.codes")
    loss = Codebook(settings, LossContext(levels_of(student), targets, 1))
    weights = [(f64(layer.weight), f64(layer.bias)) for layer in loss.classify.values()]  # type: ignore[arg-type]

    def crossed(x: np.ndarray, chosen: np.ndarray, layer: tuple[np.ndarray, np.ndarray]) -> float:
        logits = (layer[0] @ x + layer[1]).reshape(4, classes)
        return float(np.mean([np.log(np.exp(of).sum()) - of[i] for of, i in zip(logits, chosen, strict=True)]))

    s, found = f64(student["frames"]), []
    for j in range(0, codes["frames"].shape[1], every):
        place = (j * 320 + 200 - 200) / 160
        if place <= 47.5:
            place = min(place, 47.0)
            at = [np.array([np.interp(place, np.arange(48), s[b, :, c]) for c in range(s.shape[2])]) for b in range(3)]
            found += [crossed(x, codes["frames"][b, j].numpy(), weights[0]) for b, x in enumerate(at)]
    vectors = zip(f64(student["embedding"]), codes["stats"].numpy(), strict=True)
    expected = np.mean(found) + np.mean([crossed(x, chosen, weights[1]) for x, chosen in vectors])
    assert loss(student, inputs).item() == pytest.approx(expected, rel=1e-5)


def test_codes_of_levels_that_the_student_lacks() -> None:
    targets, student, _ = levels_setting(160, 400)
    targets |= {f"{name}.codes": replace(target, dim=8, codec="rq8x8") for name, target in targets.items()}
    context = LossContext(levels_of(student), targets, 1)
    with pytest.raises(UsageError, match="did you mean 'frames'"):
        Codebook(CodebookSettings({"frame": "frames"}), context)
    with pytest.raises(UsageError, match="compares frames with a vector"):
        Codebook(CodebookSettings({"frames": "stats"}), context)
    with pytest.raises(UsageError, match="name at least one pair"):
        CodebookSettings({}).check()


@pytest.mark.parametrize("distance", ["cosine", "mse"])
def test_frames_in_half_precision_are_compared_in_single(distance: str) -> None:
    targets, student, inputs = levels_setting(160, 400)
    settings = MultiLevelSettings(levels={"frames": "frames"}, distance=distance)
    loss = MultiLevel(settings, LossContext(levels_of(student), targets, 1))
    stored = inputs.targets["frames"].half()
    half, single = (replace(inputs, targets={"frames": frames}) for frames in (stored, stored.float()))
    found = loss(student, half)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(loss(student, single).item(), rel=1e-6)


@pytest.mark.parametrize("together", [1000, 70, 1])
@pytest.mark.parametrize("time_last", [False, True])
def test_cosines_and_their_gradient_are_torchs(time_last: bool, together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever way the student's vectors lie in memory, and however many are compared at a time."""
    monkeypatch.setattr(multilevel, "CACHED_NUMBERS", together)
    generator = torch.Generator().manual_seed(0)
    shape = (3, 7, 5) if time_last else (3, 5, 7)
    made = torch.randn(shape, generator=generator, dtype=torch.float64)
    theirs = torch.randn(3, 5, 7, generator=generator, dtype=torch.float64)
    theirs[0, 0] = 0.0
    found, expected = (made.clone().requires_grad_() for _ in range(2))
    mine, other = ((x.transpose(1, 2) if time_last else x) for x in (found, expected))
    weight = torch.arange(15).view(3, 5)
    (cosines(mine, theirs) * weight).sum().backward()
    (torch.cosine_similarity(other, theirs, dim=-1) * weight).sum().backward()
    assert torch.allclose(cosines(mine, theirs), torch.cosine_similarity(other, theirs, dim=-1))
    assert found.grad is not None
    assert expected.grad is not None
    assert torch.allclose(found.grad, expected.grad)
