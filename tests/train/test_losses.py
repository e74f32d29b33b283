"""Every loss against its formula written out in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from spkd.cache import Target
from spkd.config import LossConfig
from spkd.errors import UsageError
from spkd.train.losses import (
    AAM,
    KLD,
    LOSSES,
    MSE,
    Contrastive,
    Cosine,
    Loss,
    MultiLevel,
    NonTarget,
    NTXent,
    Relational,
    Said,
    Sum,
    check_names,
    check_values,
    of_teachers,
)
from spkd.train.losses.aam import add_margin, risen

DIM = 6
FRAMES = Target("frames", 7, 320, 400)
FROM_LEVELS = [name for name in LOSSES if name != "memo"]  # memo listens itself: see test_memo


def setting(
    batch: int = 9, classes: int = 5, seed: int = 0, teacher_dim: int = DIM
) -> tuple[dict[str, torch.Tensor], Said]:
    generator = torch.Generator().manual_seed(seed)
    student = {"embedding": torch.randn(batch, DIM, generator=generator)}
    teacher = {"embedding": torch.randn(batch, teacher_dim, generator=generator)}
    label = torch.randint(classes, (batch,), generator=generator)
    teacher["logits"] = 30.0 * (2 * torch.rand(batch, classes, generator=generator) - 1)
    student["frames"] = torch.randn(batch, 24, DIM, generator=generator)
    teacher["frames"] = torch.randn(batch, 24, 7, generator=generator)
    others = [{"embedding": torch.randn(batch, DIM, generator=generator)}]
    tuned = {"embedding": torch.randn(batch, DIM, generator=generator)}
    said = Said(teacher, label, torch.arange(batch), label, 30.0, others=others, tuned=tuned, tuned_label=label)
    return student, said


def build(kind: type[Loss], config: LossConfig | None = None, classes: int = 5, teacher_dim: int = DIM) -> Loss:
    torch.manual_seed(1)
    targets = {"embedding": Target("embedding", teacher_dim), "logits": Target("logits", classes), "frames": FRAMES}
    levels = {"embedding": Target("embedding", DIM), "frames": Target("frames", DIM, 320, 400)}
    config = config or LossConfig()
    return kind(replace(config, one_step=replace(config.one_step, targets=["frames"])), levels, targets, classes)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def f64(x: torch.Tensor) -> np.ndarray:
    return x.detach().double().numpy()


@pytest.mark.parametrize("classes", [2, 5, 6000])
def test_aam(classes: int) -> None:
    student, said = setting(classes=classes)
    config = LossConfig(margin=0.3, scale=20.0)
    loss = build(AAM, config, classes)
    cosine = unit(f64(student["embedding"])) @ unit(f64(loss.weight)).T  # type: ignore[arg-type]
    total = 0.0
    for row, y in zip(cosine, said.label.tolist(), strict=True):
        theta = math.acos(row[y])
        logits = 20.0 * row
        logits[y] = 20.0 * (math.cos(theta + 0.3) if theta + 0.3 < math.pi else row[y] - (1 - math.cos(0.3)))
        total += np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[y]
    assert abs(loss(student, said).item() - total / len(cosine)) < 1e-4


def test_the_margin_is_continuous_and_monotonic_over_all_angles() -> None:
    theta = torch.linspace(0, math.pi, 2001, dtype=torch.float64)
    cosine = theta.cos()[:, None]
    shifted = add_margin(cosine, torch.zeros(2001, dtype=torch.long), 0.2)[:, 0]
    assert (shifted.diff() <= 1e-12).all()
    assert shifted.diff().abs().max() < 0.05


def test_cosine_and_mse() -> None:
    student, said = setting()
    s, t = f64(student["embedding"]), f64(said.targets["embedding"])
    assert abs(build(Cosine)(student, said).item() - np.mean(1 - (unit(s) * unit(t)).sum(1))) < 1e-5
    assert abs(build(MSE)(student, said).item() - np.mean(((s - t) ** 2).sum(1))) < 1e-4


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


def classifier_logits(loss: Loss, student: dict, said: Said, config: LossConfig) -> tuple[np.ndarray, np.ndarray]:
    """Of teacher and student, with their margins."""
    label = said.teacher_label.tolist()
    cosine = unit(f64(student["embedding"])) @ unit(f64(loss.weight)).T  # type: ignore[arg-type]
    z_s = margin_logits(cosine, label, config.margin, config.scale)
    return margin_logits(f64(said.targets["logits"]) / 30.0, label, config.teacher_margin, 30.0), z_s


@pytest.mark.parametrize("classes", [2, 7, 6000])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kld(classes: int, temperature: float) -> None:
    student, said = setting(classes=classes)
    config = LossConfig(kd_temperature=temperature)
    loss = build(KLD, config, classes)
    z_t, z_s = classifier_logits(loss, student, said, config)
    entropy = -np.mean([log_softmax(row)[y] for row, y in zip(z_s, said.label.tolist(), strict=True)])
    p, q = log_softmax(z_t / temperature), log_softmax(z_s / temperature)
    expected = entropy + temperature**2 * np.mean((np.exp(p) * (p - q)).sum(1))
    assert loss(student, said).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("classes", [2, 7, 6000])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_nontarget(classes: int, temperature: float) -> None:
    """Both parts from the probabilities themselves, as the paper writes them."""
    student, said = setting(classes=classes)
    config = LossConfig(kd_temperature=temperature, gamma=3.0)
    loss = build(NonTarget, config, classes)
    z_t, z_s = classifier_logits(loss, student, said, config)
    total = 0.0
    for t, s, y in zip(z_t, z_s, said.label.tolist(), strict=True):
        p_t, p_s = (np.exp(log_softmax(z / temperature)) for z in (t, s))
        b_t, b_s = (np.array([p[y], np.delete(p, y).sum()]) for p in (p_t, p_s))
        q_t, q_s = (np.exp(log_softmax(np.delete(z, y) / temperature)) for z in (t, s))
        divergence = (b_t * np.log(b_t / b_s)).sum() + 3.0 * (q_t * np.log(q_t / q_s)).sum()
        total += -log_softmax(s)[y] + temperature**2 * divergence
    assert loss(student, said).item() == pytest.approx(total / len(z_t), rel=1e-4)


def test_nontarget_does_not_underflow_where_the_teacher_is_sure() -> None:
    student, said = setting(classes=50)
    sure = torch.full((9, 50), -30.0)
    sure.scatter_(1, said.label[:, None], 30.0)
    sure[:, 0] += 3.0
    loss = build(NonTarget, LossConfig(teacher_margin=0.0), 50)
    embedding = student["embedding"].clone().requires_grad_()
    value = loss({"embedding": embedding}, replace(said, targets={"logits": sure}, teacher_scale=None))
    value.backward()
    assert torch.isfinite(value)
    assert embedding.grad is not None
    assert torch.isfinite(embedding.grad).all()
    assert embedding.grad.abs().max() > 0


def test_the_divergence_is_also_learnt_from_views_without_a_class() -> None:
    student, said = setting()
    unlabelled = replace(said, teacher_label=torch.full_like(said.label, -1))
    loss, config = build(KLD), LossConfig()
    z_t, z_s = classifier_logits(loss, student, unlabelled, config)
    p, q = log_softmax(z_t), log_softmax(z_s)
    assert loss(student, unlabelled).item() == pytest.approx(np.mean((np.exp(p) * (p - q)).sum(1)), rel=1e-4)


def test_margin_and_divergence_rise() -> None:
    between = [0.2, 0.6]
    assert [risen(d, between) for d in (0.0, 0.1, 0.6, 1.0)] == [0.0, 0.0, 1.0, 1.0]
    assert risen(0.4, between) == pytest.approx(1 - 0.001**0.5)
    assert risen(0.0, [0.0, 0.0]) == 1.0
    student, said = setting()
    plain = build(AAM, LossConfig(margin=0.0))(student, said)
    rising = build(AAM, LossConfig(margin=0.3, margin_rise=between))
    assert torch.equal(rising(student, replace(said, done=0.1)), plain)
    assert rising(student, replace(said, done=0.9)) > plain
    slow = build(KLD, LossConfig(kd_rise=0.5))
    at = [slow(student, replace(said, done=d)).item() for d in (0.0, 0.25, 0.5)]
    assert at[1] == pytest.approx((at[0] + at[2]) / 2, rel=1e-5)
    assert at[2] == build(KLD)(student, said).item()


def test_of_several_centres_the_nearest_counts() -> None:
    student, said = setting()
    config = LossConfig(subcentres=3, margin=0.1, scale=20.0)
    loss = build(AAM, config)
    cosine = (unit(f64(student["embedding"])) @ unit(f64(loss.weight)).T).reshape(9, 5, 3).max(2)  # type: ignore[arg-type]
    z = margin_logits(cosine, said.label.tolist(), 0.1, 20.0)
    expected = -np.mean([log_softmax(row)[y] for row, y in zip(z, said.label.tolist(), strict=True)])
    assert loss(student, said).item() == pytest.approx(expected, rel=1e-5)


def test_relational() -> None:
    student, said = setting(teacher_dim=11)
    s, t = unit(f64(student["embedding"])), unit(f64(said.targets["embedding"]))
    pairs = [(s[i] @ s[j] - t[i] @ t[j]) ** 2 for i in range(9) for j in range(9) if i != j]
    assert build(Relational, teacher_dim=11)(student, said).item() == pytest.approx(np.mean(pairs), rel=1e-5)


def reference_contrastive(s: np.ndarray, t: np.ndarray, voice: np.ndarray, tau: float, ceiling: float) -> float:
    s, t, total = unit(s), unit(t), 0.0
    for i in range(len(s)):
        kept = [j for j in range(len(s)) if j == i or (voice[i] != voice[j] and t[i] @ t[j] <= ceiling)]
        total -= s[i] @ t[i] / tau - math.log(sum(math.exp(s[i] @ t[j] / tau) for j in kept))
    return total / len(s)


@pytest.mark.parametrize("ceiling", [0.2, 1.1])
def test_contrastive(ceiling: float) -> None:
    student, said = setting(batch=12)
    said = Said(said.targets, said.label, torch.tensor([0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9]))
    loss = build(Contrastive, LossConfig(temperature=0.1, ceiling=ceiling))
    expected = reference_contrastive(
        f64(student["embedding"]), f64(said.targets["embedding"]), said.voice.numpy(), 0.1, ceiling
    )
    assert abs(loss(student, said).item() - expected) < 1e-4


def test_ntxent() -> None:
    student, said = setting(batch=7)
    said = replace(said, voice=torch.tensor([0, 0, 1, 2, 3, 4, 4]))
    rows = unit(np.concatenate([f64(student["embedding"]), f64(said.others[0]["embedding"])]))
    voice, total = np.concatenate([said.voice.numpy()] * 2), 0.0
    for i in range(14):
        partner = (i + 7) % 14
        kept = [k for k in range(14) if k == partner or voice[k] != voice[i]]
        total -= rows[i] @ rows[partner] / 0.2 - math.log(sum(math.exp(rows[i] @ rows[k] / 0.2) for k in kept))
    assert build(NTXent, LossConfig(temperature=0.2))(student, said).item() == pytest.approx(total / 14, rel=1e-5)


@pytest.mark.parametrize("name", ["cosine", "mse", "contrastive"])
def test_other_widths_go_through_a_projection(name: str) -> None:
    student, said = setting(teacher_dim=11)
    loss = build(LOSSES[name], teacher_dim=11)
    projected = {"embedding": student["embedding"] @ loss.project.weight.T}  # type: ignore[union-attr, operator]
    straight = LOSSES[name](
        LossConfig(), {"embedding": Target("embedding", 11)}, {"embedding": Target("embedding", 11)}, 5
    )
    assert torch.allclose(loss(student, said), straight(projected, said))


@pytest.mark.parametrize("name", FROM_LEVELS)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    student, said = setting(batch=5)
    loss = build(LOSSES[name], LossConfig(temperature=0.5, scale=4.0))
    embedding = student["embedding"].clone().requires_grad_()

    def value(of: torch.Tensor) -> torch.Tensor:
        if name == "one-step":  # learns the embedding on the other path
            return loss(student, replace(said, tuned={"embedding": of}))
        return loss(student | {"embedding": of}, said)

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
    student, said = setting(batch)
    loss = build(LOSSES[name])
    exact = loss(student, said).item()
    half, tuned = ({k: v.to(dtype).requires_grad_() for k, v in levels.items()} for levels in (student, said.tuned))
    others = [{k: v.to(dtype) for k, v in levels.items()} for levels in said.others]
    value = loss(half, replace(said, others=others, tuned=tuned))
    value.backward()
    gradient = tuned["embedding"].grad if name == "one-step" else half["embedding"].grad
    assert gradient is not None
    assert torch.isfinite(gradient).all()
    assert abs(value.item() - exact) < 0.02 * max(abs(exact), 1.0)


@pytest.mark.parametrize("name", FROM_LEVELS)
def test_the_order_of_the_batch_does_not_matter(name: str) -> None:
    student, said = setting(batch=16)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    targets = {name: values[order] for name, values in said.targets.items()}
    shuffled = Said(targets, said.label[order], said.voice[order], said.teacher_label[order], said.teacher_scale)
    others = [{"embedding": said.others[0]["embedding"][order]}]
    tuned = {"embedding": said.tuned["embedding"][order]}
    shuffled = replace(shuffled, others=others, tuned=tuned, tuned_label=said.tuned_label[order])
    loss = build(LOSSES[name])
    turned = {level: values[order] for level, values in student.items()}
    assert torch.allclose(loss(student, said), loss(turned, shuffled), atol=1e-5)


@pytest.mark.parametrize("name", FROM_LEVELS)
@pytest.mark.parametrize("classes", [2, 6000])
def test_few_and_many_classes(name: str, classes: int) -> None:
    student, said = setting(batch=8, classes=classes)
    loss = build(LOSSES[name], classes=classes)
    levels, tuned = ({k: v.clone().requires_grad_() for k, v in of.items()} for of in (student, said.tuned))
    value = loss(levels, replace(said, tuned=tuned))
    value.backward()
    gradient = tuned["embedding"].grad if name == "one-step" else levels["embedding"].grad
    assert torch.isfinite(value)
    assert gradient is not None
    assert torch.isfinite(gradient).all()
    assert gradient.abs().sum() > 0


def test_a_perfect_student_has_no_loss() -> None:
    _, said = setting()
    student = {"embedding": 3.0 * said.targets["embedding"]}
    assert build(Cosine)(student, said).item() < 1e-6
    assert build(MSE)({"embedding": said.targets["embedding"]}, said).item() == 0.0
    assert build(Contrastive, LossConfig(temperature=0.001))(student, said).item() < 1e-6


def test_losses_add_up_with_their_weights() -> None:
    student, said = setting()
    config, targets = LossConfig(weights={"mse": 0.25}), {"embedding": Target("embedding", DIM)}
    both = Sum(
        of_teachers(["cosine", "mse"], ["embedding"]), config, {"embedding": Target("embedding", DIM)}, targets, 1
    )
    total, terms = both(student, said)
    assert torch.allclose(total, terms["cosine"] + 0.25 * terms["mse"])


def test_separate_teachers_teach_once_each() -> None:
    student, said = setting()
    assert of_teachers(["aam", "mse"], ["embedding@0", "embedding@1", "fbank"]) == {
        "aam": ("aam", ""),
        "mse@0": ("mse", "@0"),
        "mse@1": ("mse", "@1"),
    }
    own = student["embedding"]
    targets = {"embedding@0": own.detach(), "embedding@1": own.detach() + 1.0}
    described = {name: Target(name, DIM) for name in targets}
    both = Sum(of_teachers(["mse"], list(targets)), LossConfig(), {"embedding": Target("embedding", DIM)}, described, 1)
    total, terms = both(student, Said(targets, said.label, said.voice))
    assert terms["mse@0"].item() == 0.0
    assert torch.allclose(total, terms["mse@1"])
    assert terms["mse@1"].item() > 0.0


@pytest.mark.parametrize(
    ("names", "weights", "expected"),
    [
        ([], {}, "at least one loss"),
        (["cosin"], {}, "did you mean 'cosine'"),
        (["mse", "mse"], {}, "once"),
        (["mse"], {"aam": 1.0}, "not in use"),
    ],
)
def test_bad_choices(names: list[str], weights: dict[str, float], expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        check_names(names, LossConfig(weights=weights))


@pytest.mark.parametrize(
    "wrong",
    [{"margin_rise": [0.5]}, {"margin_rise": [0.5, 0.2]}, {"kd_rise": 2.0}, {"subcentres": 0}, {"temperature": 0.0}],
)
def test_settings_outside_their_range(wrong: dict) -> None:
    with pytest.raises(UsageError, match=f"loss.{next(iter(wrong))}"):
        check_values(LossConfig(**wrong))


def levels_setting(hop: int, window: int) -> tuple[dict[str, Target], dict[str, torch.Tensor], Said]:
    """A student of 0.5 s (48 frames), a teacher with frames at another rate, and two vectors."""
    generator = torch.Generator().manual_seed(5)
    frames = Target("frames", 7, hop, window)
    targets = {"frames": frames, "stats": Target("stats", 9), "embedding": Target("embedding", 5)}
    student = {
        "frames": torch.randn(3, 48, 4, generator=generator),
        "stats": torch.randn(3, 8, generator=generator),
        "embedding": torch.randn(3, 6, generator=generator),
    }
    said = {
        "frames": torch.randn(3, frames.count(8000), 7, generator=generator),
        "stats": torch.randn(3, 9, generator=generator),
        "embedding": torch.randn(3, 5, generator=generator),
    }
    return targets, student, Said(said, torch.zeros(3), torch.arange(3))


def levels_of(student: dict[str, torch.Tensor]) -> dict[str, Target]:
    vectors = {name: Target(name, values.shape[-1]) for name, values in student.items() if values.ndim == 2}
    return vectors | {"frames": Target("frames", student["frames"].shape[-1], 160, 400)}


def apart(a: np.ndarray, b: np.ndarray, distance: str) -> float:
    return float(np.mean((a - b) ** 2) if distance == "mse" else np.mean(1 - (unit(a) * unit(b)).sum(-1)))


@pytest.mark.parametrize("distance", ["cosine", "mse"])
@pytest.mark.parametrize(("hop", "window"), [(160, 400), (320, 400), (160, 0), (200, 512)])
def test_multilevel(distance: str, hop: int, window: int) -> None:
    targets, student, said = levels_setting(hop, window)
    levels = {"frames": "frames", "stats": "stats", "embedding": "embedding"}
    config = LossConfig(
        levels=levels, concat=["stats", "embedding"], distance=distance, level_weights={"stats": 0.5, "concat": 2.0}
    )
    loss = MultiLevel(config, levels_of(student), targets, 1)
    assert MultiLevel.needed(config) == ("frames", "stats", "embedding")
    weight = {level: f64(loss.project[f"level{i}"].weight) for i, level in enumerate([*levels, "concat"])}  # type: ignore[arg-type, union-attr]
    s, t = ({name: f64(values) for name, values in side.items()} for side in (student, said.targets))
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
    assert loss(student, said).item() == pytest.approx(expected, rel=1e-4)
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
    with pytest.raises(UsageError, match=expected):
        MultiLevel(LossConfig(**change), levels_of(student), targets, 1)
