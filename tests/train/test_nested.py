"""Losses at every size of a nested embedding."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from spkd.errors import UsageError
from spkd.outputs.features import FBANKS
from spkd.outputs.target import Target
from spkd.registry import LOSSES
from spkd.students import load_student
from spkd.train.batches import CropPlan
from spkd.train.losses.base import ChosenLoss, Loss, LossContext
from spkd.train.losses.nested import Nested, make_loss
from spkd.train.losses.settings import AAMSettings, ContrastiveSettings, MultiLevelSettings, NTXentSettings
from tests.conftest import CommandLine, save_teacher
from tests.train.killing import kill_after_saving
from tests.train.test_losses import CODES, DIM, FRAMES, f64, log_softmax, margin_logits, setting, unit

SIZES = (2, 4, DIM)
SMALL = ["student.channels=16", "student.embedding=8", "batch_size=6", "crop=0.6", "steps=6"]
NESTED = "student.nested=[2,4,8]"


def nested(name: str, settings: Any = None, crops: tuple[float, ...] = (), teacher_dim: int = DIM) -> Nested:
    """A loss at the sizes of a student, over targets of test_losses."""
    torch.manual_seed(1)
    targets = {"embedding": Target("embedding", teacher_dim), "logits": Target("logits", 5), "frames": FRAMES}
    targets |= {CODES.name: CODES, "embedding.codes": Target("embedding.codes", 3, codec="rq3x8")}
    levels = {"embedding": Target("embedding", DIM), "frames": Target("frames", DIM, 320, 400)}
    settings = settings or LOSSES[name].Settings()
    if name == "one-step":
        settings = replace(settings, targets=["frames"])
    if name in ("codebook", "multilevel"):
        settings = replace(settings, levels={"frames": "frames", "embedding": "embedding"})
    context = LossContext(levels, targets, 5, SIZES, crops)
    made = make_loss(ChosenLoss(name, LOSSES[name], settings), context)
    assert isinstance(made, Nested)
    return made


def weight(loss: Loss, name: str) -> np.ndarray:
    return f64(dict(loss.named_parameters())[name])


def test_aam_has_a_classifier_for_each_size() -> None:
    student, inputs = setting()
    loss = nested("aam", AAMSettings(margin=0.3, scale=20.0))
    embedding, label, values = f64(student["embedding"]), inputs.label.tolist(), []
    for size, part in zip(SIZES, loss.of_size, strict=True):
        cosine = unit(embedding[:, :size]) @ unit(weight(part, "weight")).T
        rows = log_softmax(margin_logits(cosine, label, 0.3, 20.0))
        values.append(-np.mean([row[y] for row, y in zip(rows, label, strict=True)]))
    assert loss(student, inputs).item() == pytest.approx(np.mean(values), rel=1e-5)
    kept = loss.classifier()
    assert kept is not None
    assert kept.weight.shape == (5, DIM)


def test_cosine_mse_and_contrastive_have_a_projection_for_each_size() -> None:
    student, inputs = setting(teacher_dim=11)
    embedding, teacher = f64(student["embedding"]), f64(inputs.targets["embedding"])
    values: dict[str, list[float]] = {"cosine": [], "mse": [], "contrastive": []}
    losses = {name: nested(name, teacher_dim=11) for name in values}
    losses["contrastive"] = nested("contrastive", ContrastiveSettings(0.1, ceiling=1.5), teacher_dim=11)
    for name, loss in losses.items():
        for size, part in zip(SIZES, loss.of_size, strict=True):
            s = embedding[:, :size] @ weight(part, "project.weight").T
            cosine = unit(s) @ unit(teacher).T
            values[name].append(
                {
                    "cosine": np.mean(1 - np.diag(cosine)),
                    "mse": np.mean(((s - teacher) ** 2).sum(1)),
                    "contrastive": -np.mean(np.diag(log_softmax(cosine / 0.1))),
                }[name]
            )
        assert loss(student, inputs).item() == pytest.approx(np.mean(values[name]), rel=1e-5)


def test_a_size_as_wide_as_the_teacher_has_no_projection() -> None:
    parts = nested("cosine", teacher_dim=4).of_size
    assert [len(list(part.parameters())) for part in parts] == [1, 0, 1]


def test_relational_and_ntxent_normalise_each_size_by_itself() -> None:
    student, inputs = setting(batch=7)
    embedding, other = f64(student["embedding"]), f64(inputs.other_levels[0]["embedding"])
    teacher, relational, ntxent = unit(f64(inputs.targets["embedding"])), [], []
    for size in SIZES:
        s = unit(embedding[:, :size])
        pairs = [(i, j) for i in range(7) for j in range(7) if i != j]
        relational.append(np.mean([(s[i] @ s[j] - teacher[i] @ teacher[j]) ** 2 for i, j in pairs]))
        rows, total = unit(np.concatenate([embedding[:, :size], other[:, :size]])), 0.0
        for i in range(14):
            partner = (i + 7) % 14
            kept = [k for k in range(14) if k == partner or k % 7 != i % 7]
            total -= rows[i] @ rows[partner] / 0.2 - math.log(sum(math.exp(rows[i] @ rows[k] / 0.2) for k in kept))
        ntxent.append(total / 14)
    assert nested("relational")(student, inputs).item() == pytest.approx(np.mean(relational), rel=1e-5)
    settings = NTXentSettings(temperature=0.2)
    assert nested("ntxent", settings)(student, inputs).item() == pytest.approx(np.mean(ntxent), rel=1e-5)


def test_kld_has_a_classifier_for_each_size() -> None:
    student, inputs = setting()
    loss, values = nested("kld"), []
    label, teacher = inputs.teacher_label.tolist(), f64(inputs.targets["logits"])
    for size, part in zip(SIZES, loss.of_size, strict=True):
        cosine = unit(f64(student["embedding"])[:, :size]) @ unit(weight(part, "weight")).T
        z_s = log_softmax(margin_logits(cosine, label, 0.2, 32.0))
        z_t = log_softmax(margin_logits(teacher / 30.0, label, 0.2, 30.0))
        entropy = -np.mean([row[y] for row, y in zip(z_s, label, strict=True)])
        values.append(entropy + np.mean((np.exp(z_t) * (z_t - z_s)).sum(1)))
    assert loss(student, inputs).item() == pytest.approx(np.mean(values), rel=1e-4)


def test_other_levels_are_compared_once() -> None:
    """Of multilevel, the frames count as without nested sizes, and the embedding is the mean over the sizes."""
    student, inputs = setting()
    loss = nested("multilevel", MultiLevelSettings(level_weights={"frames": 0.7}))
    assert loss.beside is not None
    mapped = f64(student["frames"]) @ weight(loss.beside, "project.level0.weight").T
    frames = np.mean(1 - (unit(mapped) * unit(f64(inputs.targets["frames"]))).sum(-1))
    teacher, parts = unit(f64(inputs.targets["embedding"])), []
    for size, part in zip(SIZES, loss.of_size, strict=True):
        s = f64(student["embedding"])[:, :size]
        if size != DIM:
            s = s @ weight(part, "project.level0.weight").T
        parts.append(np.mean(1 - (unit(s) * teacher).sum(1)))
    assert loss(student, inputs).item() == pytest.approx(0.7 * frames + np.mean(parts), rel=1e-4)


@pytest.mark.parametrize("kit", FBANKS)
@pytest.mark.parametrize("name", LOSSES)
def test_a_crop_trains_the_sizes_whose_length_it_reaches(name: str, kit: str) -> None:
    """Gradients of every loss reach these numbers and no others; or the loss is refused with the reason."""
    if name == "memo":
        with pytest.raises(UsageError, match=r"student\.nested: not with --loss memo, whose heads and averaged"):
            nested(name)
        return
    loss = nested(name, crops=(0.5, 1.0, 2.0))
    for seconds, reached in ((0.5, 2), (0.97, 2), (1, 4), (1.5, 4), (1.97, 4), (2, DIM), (3, DIM), (0.2, 2)):
        frames = FBANKS[kit].num_frames(round(16_000 * seconds))
        student, inputs = setting()
        leaves = [student, *inputs.other_levels, inputs.finetune_levels]
        for levels in leaves:
            levels["embedding"] = levels["embedding"].clone().requires_grad_()
        loss(student, replace(inputs, crops=[torch.zeros(9, frames, 80)])).backward()
        found = [levels["embedding"].grad for levels in leaves]
        gradient = sum(g.abs().sum(0) for g in found if g is not None)
        assert isinstance(gradient, torch.Tensor)
        assert (gradient[:reached] > 0).all(), (name, frames)
        assert (gradient[reached:] == 0).all(), (name, frames)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "memo"])
def test_half_precision_and_the_order_of_the_batch(name: str) -> None:
    student, inputs = setting(batch=16)
    loss = nested(name)
    exact = loss(student, inputs).item()

    def lower(levels: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: values.bfloat16() for key, values in levels.items()}

    others = [lower(levels) for levels in inputs.other_levels]
    halved = replace(inputs, other_levels=others, finetune_levels=lower(inputs.finetune_levels))
    assert abs(loss(lower(student), halved).item() - exact) < 0.02 * max(abs(exact), 1.0)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("multilevel", MultiLevelSettings(levels={"frames": "frames"})),
        ("codebook", LOSSES["codebook"].Settings()),
        ("one-step", replace(LOSSES["one-step"].Settings(), targets=["frames"], finetune_weight=0.0)),
    ],
)
def test_losses_on_other_levels_alone_stay_as_they_are(name: str, settings: Any) -> None:
    targets = {"frames": FRAMES, "frames.codes": CODES}
    levels = {"embedding": Target("embedding", DIM), "frames": Target("frames", DIM, 320, 400)}
    made = make_loss(ChosenLoss(name, LOSSES[name], settings), LossContext(levels, targets, 5, SIZES))
    assert type(made) is LOSSES[name]


def test_every_batch_has_one_of_the_crop_lengths() -> None:
    plan = CropPlan((2.0, 2.0, 0.3), drawn=(0.5, 1.0, 2.0), seed=3)
    lengths = [plan.samples(0, step) for step in range(3000)]
    counts = Counter(lengths)
    assert set(counts) == {8000, 16_000, 32_000}
    # Within four standard deviations of a third.
    assert all(abs(count - 1000) < 4 * math.sqrt(3000 * 2 / 9) for count in counts.values())
    assert lengths == [plan.samples(1, step) for step in range(3000)]  # the second crop is as long as the first
    assert {plan.samples(2, step) for step in range(50)} == {4800}  # and one of another length keeps it
    assert lengths != [replace(plan, seed=4).samples(0, step) for step in range(3000)]
    later = replace(plan, later=(10, 5.0))
    assert [later.samples(0, step) for step in range(12)] == [*lengths[:10], 80_000, 80_000]


@pytest.fixture
def cached(spkd: CommandLine, extraction: list[str], tmp_path: Path) -> None:
    save_teacher(tmp_path / "teacher", 12, [f"spk{s}" for s in range(6)])
    spkd.once("cache", *extraction, "fbank=true", "teacher.targets=[embedding,frames,logits]")


@pytest.mark.usefixtures("cached")
@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["student.nested=[4,2,8]"], "student.nested=[4,2,8]: give two sizes or more, rising, of which the last is"),
        (["student.nested=[2,4]"], "student.nested=[2,4]: give two sizes or more, rising, of which the last is"),
        (["student.nested=[8]"], "student.nested=[8]: give two sizes or more, rising, of which the last is"),
        (["student.nested=[0,8]"], "student.nested"),
        (["student.nested_crops=[0.3,0.6]"], "no student.nested is set"),
        ([NESTED, "student.nested_crops=[0.3,0.6]"], "student.nested_crops=[0.3,0.6]: give a length (s) for each of"),
        ([NESTED, "student.nested_crops=[0.2,0.3,0.5]"], "of which the last is crop=0.6"),
        ([NESTED, "student.nested_crops=[0.3,0.2,0.6]"], "rising"),
        ([NESTED, "loss=memo", "loss.memo.partner=none"], "student.nested: not with --loss memo"),
        (
            [NESTED, "loss=multilevel", "loss.multilevel.levels={frames: frames}"],
            "multilevel does not act on the student's embedding",
        ),
    ],
)
def test_wrong_settings_are_a_line(spkd: Callable, typed: list[str], message: str) -> None:
    done = spkd("train", "loss=cosine", *SMALL, *typed)
    assert done.code == 2
    assert message in done.err
    assert len(done.err.splitlines()) == 1
    assert not Path("student").exists()


@pytest.mark.usefixtures("cached")
def test_a_killed_run_continues_to_the_same_weights(spkd: Callable, tmp_path: Path) -> None:
    crops, losses = "student.nested_crops=[0.3,0.4,0.6]", "loss=[contrastive,ntxent,aam,kld]"
    given = ["train", losses, *SMALL[:-1], NESTED, crops, "steps=30", "save_every=5"]
    spkd(*given, "out=whole").ok()
    kill_after_saving([*given, "out=killed"], tmp_path / "killed")
    spkd(*given, "out=killed").ok()
    whole, killed = load_file("whole/model.safetensors"), load_file("killed/model.safetensors")
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    described = json.loads(Path("whole/model.json").read_text())
    assert described["nested"] == [2, 4, 8]
    assert load_student("whole").head.shape == (6, 8)  # type: ignore[union-attr]
    # Crops and sizes identify the run.
    done = spkd(*given[:-3], "student.nested=[4,8]", *given[-2:], "student.nested_crops=[0.3,0.6]", "out=whole")
    assert "student.nested" in done.err
    assert done.code == 2


@pytest.mark.usefixtures("cached")
def test_training_lowers_the_loss_of_every_size(spkd: Callable) -> None:
    """The similarities of the teacher, by two, four and all eight numbers of a student."""
    spkd("train", "loss=relational", *SMALL[:-1], NESTED, "steps=80", "optim.warmup=5", "optim.lr=0.01").ok()
    first, last = (
        json.loads(Path("student/log.jsonl").read_text().splitlines()[place])["relational"] for place in (0, -1)
    )
    assert last < 0.7 * first
