"""OS-KDFT: the formulas in float64, which path teaches which parameters, and the real commands."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from spkd.cache import Cache, Crop
from spkd.corpus.manifest import Manifest, Utterance
from spkd.errors import UsageError
from spkd.networks.settings import SSLSettings, StudentConfig
from spkd.networks.ssl import SSLStudent, from_teacher
from spkd.outputs.target import Target
from spkd.students import build, load_student, make_student
from spkd.train.alignment import Alignment
from spkd.train.losses.aam import AAMSettings
from spkd.train.losses.base import ChosenLoss, LossContext, LossInputs
from spkd.train.losses.chosen import WeightedSum
from spkd.train.losses.onestep import OneStep, OneStepSettings
from spkd.train.module import TrainingModule

from ..conftest import TINY_SSL

SMALL = ["steps=6", "batch_size=6", "student=ssl", "student.channels=32", "student.embedding=6", "crop=0.5"]
TEACHER = {"frames.a": Target("frames.a", 7, 320, 400), "frames.b": Target("frames.b", 5, 320, 400)}


def alignments(level: Target, views: int, samples: int) -> dict[str, Alignment]:
    """Of whole views of one length."""
    whole, crop = np.full(views, samples), Crop(np.zeros(views, int), samples)
    return {name: Alignment.of(level, target, whole, crop) for name, target in TEACHER.items()}


def f64(x: torch.Tensor) -> np.ndarray:
    return x.detach().double().numpy()


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


@pytest.mark.parametrize(
    ("distance", "time_reduction", "classifier"),
    [("l1", "mean", "softmax"), ("l1", "sum", "aam"), ("mse", "mean", "softmax")],
)
def test_the_formulas(distance: str, time_reduction: str, classifier: str) -> None:
    torch.manual_seed(0)
    aam = AAMSettings(margin=0.0, scale=10.0)
    chosen = OneStepSettings(list(TEACHER), distance, 0.7, time_reduction, 3.0, True, 0.8, classifier, aam)
    levels = {"frames": Target("frames", 6, 320, 400), "embedding": Target("embedding", 4)}
    loss = OneStep(chosen, LossContext(levels, TEACHER, 3))
    frames, tuned, label = torch.randn(2, 9, 6), torch.randn(5, 4), torch.tensor([0, 2, 1, 1, 0])
    outputs = {name: torch.randn(2, 9, target.dim) for name, target in TEACHER.items()}
    value = loss(
        {"frames": frames},
        LossInputs(
            outputs,
            label,
            label,
            progress=0.25,
            finetune_levels={"embedding": tuned},
            finetune_label=label,
            alignments=alignments(levels["frames"], 2, 400 + 8 * 320),
        ),
    )

    distilled = 0.0
    for predict, target in zip(loss.predict, outputs.values(), strict=True):
        first, _, last = predict  # type: ignore[misc]
        x = f64(frames) @ f64(first.weight).T + f64(first.bias)
        x = x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
        x, t = x @ f64(last.weight).T + f64(last.bias), f64(target)
        if distance == "mse":
            distilled += ((x - t) ** 2).mean()
        else:
            likeness = np.log(1 / (1 + np.exp(-cosine(x, t))))  # (B, T)
            distilled += (
                np.abs(x - t).mean() - 0.7 * (likeness.sum(1) if time_reduction == "sum" else likeness.mean(1)).mean()
            )
    if classifier == "aam":
        w = f64(loss.classify.weight)  # type: ignore[arg-type]
        logits = 10.0 * np.array([[cosine(e, row) for row in w] for e in f64(tuned)])
    else:
        logits = f64(tuned) @ f64(loss.classify.weight).T + f64(loss.classify.bias)  # type: ignore[arg-type]
    entropy = np.mean([np.log(np.exp(z).sum()) - z[y] for z, y in zip(logits, label.tolist(), strict=True)])
    assert value.item() == pytest.approx(3.0 * 0.75 * distilled + 0.8 * entropy, rel=1e-4)


def module(adapters: int = 4) -> TrainingModule:
    torch.manual_seed(0)
    network = SSLStudent(32, 6, 2, adapters)
    loss = ChosenLoss("one-step", OneStep, OneStepSettings(["frames.a"]))
    return TrainingModule(network, WeightedSum({"one-step": (loss, "")}, LossContext(network.levels, TEACHER, 3)))


def gradients(model: TrainingModule, weight: float, finetune: bool) -> set[str]:
    """Which parameters a loss reaches: the distillation alone, the fine-tuning alone."""
    model.train()
    crops, more = torch.randn(4, 50, 160), torch.randn(3, 50, 160)
    loss = model.objective.by_name()["one-step"]
    inputs = LossInputs(
        {"frames.a": torch.randn(4, 24, 7)},
        torch.full((4,), -1),
        torch.arange(4),
        finetune_label=torch.tensor([0, 1, 2]),
        alignments=alignments(model.network.levels["frames"], 4, 8000),
    )
    model.zero_grad()
    levels = model.network(torch.cat([crops, more]), 4)
    assert isinstance(loss, OneStep)
    if finetune:
        tuned = {name: values[4:] for name, values in levels.items()}
        loss.finetuning(
            LossInputs({}, inputs.label, inputs.instance, finetune_levels=tuned, finetune_label=inputs.finetune_label)
        ).backward()
    else:
        (weight * loss.distillation(levels["frames"][:4], inputs)).backward()
    return {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)}


def test_which_path_trains_which_parameters() -> None:
    model = module()
    for name, parameter in model.named_parameters():  # the last weights begin at zero and would hide the first
        if name.endswith(("feed_forward.up.weight", "feed_forward.up.bias")):
            torch.nn.init.normal_(parameter)
    every = {name for name, _ in model.named_parameters()}
    adapters = {n for n in every if ".feed_forward.down." in n or ".feed_forward.up." in n}
    pooling = {n for n in every if n.startswith(("network.embed.", "network.norm.", "network.layer_weights"))}
    predict = {n for n in every if ".predict." in n}
    classify = {n for n in every if ".classify." in n}
    # The softmax over keys does not change with what is added to all of them.
    idle = {n for n in every if n.endswith("attention.k_proj.bias")}
    shared = every - adapters - pooling - predict - classify - idle
    distilled, tuned = gradients(model, 1.0, False) - idle, gradients(model, 1.0, True) - idle
    assert adapters
    assert pooling
    assert distilled == shared | predict
    assert tuned == shared | adapters | pooling | classify


def test_the_path_without_adapters_is_the_network_without_them() -> None:
    model = module().network
    bare = SSLStudent(32, 6, 2, 0)
    for layer in model.transformer.layers:  # type: ignore[union-attr]
        torch.nn.init.normal_(layer.feed_forward.up.weight)
    renamed = {k.replace(".feed_forward.feed_forward.", ".feed_forward."): v for k, v in model.state_dict().items()}
    bare.load_state_dict(
        {k: v for k, v in renamed.items() if ".feed_forward.up." not in k and ".feed_forward.down." not in k}
    )
    features = torch.randn(3, 60, 160)
    model.eval()
    bare.eval()
    none, some = model(features, 3), model(features, 1)
    for level in ("frames", "stats", "embedding"):
        assert torch.allclose(none[level], bare(features)[level], atol=1e-6)
        assert torch.allclose(some[level][0], bare(features)[level][0], atol=1e-6)
        assert torch.allclose(some[level][1:], model(features)[level][1:], atol=1e-6)
        assert not torch.allclose(some[level][1:], bare(features)[level][1:], atol=1e-3)
    assert torch.equal(model(features)["embedding"], model(features)["embedding"])  # no noise in evaluation


def test_noise_and_statistics_belong_to_the_adapters_path_in_training() -> None:
    model = module().network.train()
    for layer in model.transformer.layers:  # type: ignore[union-attr]
        torch.nn.init.normal_(layer.feed_forward.up.weight)
    features = torch.randn(6, 60, 160)
    before = model.norm.running_mean.clone()  # type: ignore[operator, union-attr]
    first, second = model(features, 3), model(features, 3)
    assert torch.allclose(first["frames"][:3], second["frames"][:3], atol=1e-6)
    assert not torch.allclose(first["frames"][3:], second["frames"][3:], atol=1e-3)
    after = model.norm.running_mean.clone()  # type: ignore[operator, union-attr]
    assert not torch.equal(before, after)
    model(features, 6)
    assert torch.equal(after, model.norm.running_mean)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["WavLM", "Hubert", "Wav2Vec2", "Wav2Vec2 stable"])
def test_a_student_begins_as_its_teachers_first_layers(family: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    kind, _, stable = family.partition(" ")
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        **TINY_SSL | {"hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 48},
        feat_extract_norm="layer" if stable else "group",
        do_stable_layer_norm=bool(stable),
        conv_bias=bool(stable),
    )
    teacher = getattr(transformers, f"{kind}Model")(config).eval()
    teacher.save_pretrained(tmp_path / "teacher")
    for adapters in (0, 4):
        student = from_teacher(str(tmp_path / "teacher"), 6, 2, adapters).eval()
        wave = torch.randn(2, 8000)
        normalised = torch.nn.functional.layer_norm(wave, wave.shape[-1:])
        with torch.no_grad():
            expected = teacher(normalised, output_hidden_states=True).hidden_states
            found = student.hidden(wave)
        for i in range(2):
            assert torch.allclose(found[i], expected[i], atol=2e-5)
        if not stable:  # its last layer is normalised once more
            assert torch.allclose(found[2], expected[2], atol=2e-5)
    again = build("ssl", **student.settings)
    again.load_state_dict(student.state_dict())
    with pytest.raises(UsageError, match=r"student.ssl.layers=9: .* has 3"):
        make_student(StudentConfig("ssl", init=str(tmp_path / "teacher"), settings=SSLSettings(layers=9)))


@pytest.fixture
def caches(spkd: Callable, corpus: Path, tiny_wavlm: Path) -> None:
    """`kd`: two speakers without labels, and what a WavLM says of them; `ft`: the other four, labelled, no teacher."""
    rows = list(Manifest.load(corpus / "manifest.csv"))
    Manifest(tuple(Utterance(u.id, u.path, None, u.duration) for u in rows[:6])).save("kd.csv")
    Manifest(tuple(rows[6:])).save("ft.csv")
    spkd(
        "extract",
        "teacher=wavlm",
        f"teacher.weights={tiny_wavlm}",
        "teacher.targets=[embedding,frames.layer2,frames.layer3]",
        "manifest=kd.csv",
        "cache=kd",
        "wave=true",
    ).ok()
    spkd("extract", "teacher=none", "manifest=ft.csv", "cache=ft", "wave=true").ok()
    assert set(Cache.open("ft").names) == {"wave"}


CHOSEN = ["--loss", "one-step", "loss.one_step.targets=[frames.layer2,frames.layer3]", "student.ssl.adapters=4"]


@pytest.mark.usefixtures("caches")
def test_two_manifests_train_two_paths(spkd: Callable, corpus: Path, tiny_wavlm: Path) -> None:
    init = f"student.init={tiny_wavlm}"
    done = spkd("train", *CHOSEN, "cache=kd", "finetune_cache=ft", init, *SMALL)
    assert (done.code, f"student.channels=32 has no effect: the width is that of {tiny_wavlm}" in done.err) == (2, True)
    of_init = [item for item in SMALL if not item.startswith("student.channels=")]
    spkd("train", *CHOSEN, "cache=kd", "finetune_cache=ft", init, *of_init).ok()
    checkpoint = load_student("student")
    assert len(checkpoint.classes) == len(checkpoint.head) == 4  # type: ignore[arg-type]
    assert checkpoint.network.settings["adapters"] == 4
    spkd("eval", str(corpus / "trials.txt"), f"manifest={corpus / 'manifest.csv'}").ok()
    # From audio instead of cached samples, and beside a loss over embeddings.
    spkd("train", *CHOSEN, "--loss", "contrastive", "cache=kd", "finetune_cache=ft", init, *of_init, "out=both").ok()
    # Two-step: what distillation left, fine-tuned. An adapter may come new beside the trained layers.
    first = [*CHOSEN[:-1], "loss.one_step.finetune_weight=0", "cache=kd", "out=first", *SMALL]
    spkd("train", *first).ok()
    spkd("train", "--loss", "aam", "cache=ft", "student.init=first", "out=second", *SMALL).ok()
    spkd("train", "--loss", "aam", "cache=ft", "student.init=first", "student.ssl.adapters=4", "out=third", *SMALL).ok()


@pytest.mark.usefixtures("caches")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["cache=kd", "finetune_cache=ft", *SMALL], "needs a student with adapters"),
        (
            ["cache=kd", "finetune_cache=ft", *SMALL, "student=xvector", "student.ssl.adapters=4"],
            "student=ssl is not in use",
        ),
        (["cache=kd", *SMALL, "student.ssl.adapters=4"], "needs at least batch_size=6 labelled views"),
        (
            ["cache=ft", *SMALL, "student.ssl.adapters=4"],
            "needs the target frames.layer2, frames.layer3, which ft lacks",
        ),
    ],
)
def test_what_one_step_cannot_do(spkd: Callable, arguments: list[str], expected: str) -> None:
    done = spkd("train", *CHOSEN[:-1], *arguments)
    assert done.code in (1, 2)
    assert expected in done.err
    done = spkd("train", "--loss", "cosine", "cache=kd", "finetune_cache=ft", *SMALL)
    assert "does not fine-tune" in done.err
