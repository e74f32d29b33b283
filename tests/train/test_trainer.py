"""`spkd train` through the real command line."""

from __future__ import annotations

import fcntl
import itertools
import json
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from spkd import config
from spkd.cache import Cache
from spkd.corpus.manifest import Manifest, Utterance
from spkd.extract.settings import ExtractConfig
from spkd.files import digest
from spkd.students import build, load_student, make_student
from spkd.train import trainer
from spkd.train.losses.base import LossContext
from spkd.train.losses.chosen import WeightedSum, chosen_losses
from spkd.train.module import TrainingModule
from spkd.train.optim import clip_gradients, learning_rate, make_optimiser
from spkd.train.resume import FORMAT
from spkd.train.settings import OptimConfig, SGDSettings, TrainConfig
from tests import processes
from tests.cache.test_lock import FLOCK
from tests.conftest import CommandLine, save_teacher
from tests.train.killing import kill_after_saving

SMALL = ["student.channels=16", "student.embedding=8", "batch_size=6", "crop=0.6", "steps=12"]


NARROW = ["student.channels=16", "student.embedding=8", "crop=0.6"]


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    save_teacher(tmp_path / "teacher", 12)
    return tmp_path / "teacher"


@pytest.fixture
def cached(spkd: CommandLine, extraction: list[str], teacher: Path) -> None:
    spkd.once("cache", *extraction, "fbank=true", "view.speeds=[0.9,1.0]")


@pytest.mark.usefixtures("cached")
@pytest.mark.parametrize("student", ["xvector", "ecapa"])
@pytest.mark.parametrize("losses", [["aam"], ["cosine"], ["mse"], ["contrastive"], ["aam", "contrastive", "cosine"]])
def test_every_loss_trains_every_student(spkd: Callable, student: str, losses: list[str]) -> None:
    chosen = [argument for loss in losses for argument in ("--loss", loss)]
    spkd("train", *chosen, f"student={student}", *SMALL).ok()
    checkpoint = load_student("student")
    assert checkpoint.training.settings["losses"].keys() == set(losses)
    assert set(checkpoint.training.last_terms) == set(losses)
    assert (checkpoint.head is not None) == ("aam" in losses)
    if checkpoint.head is not None:
        assert len(checkpoint.classes) == len(checkpoint.head) == 12
    lines = [json.loads(line) for line in Path("student/log.jsonl").read_text().splitlines()]
    assert set(lines[0]) == {"step", "lr", "check", *losses}
    assert list(Path("student/tensorboard").glob("events.*"))
    assert not list(Path("student").glob("state*"))


@pytest.mark.usefixtures("cached")
@pytest.mark.parametrize("means", [False, True])
def test_class_means_stand_for_the_embeddings_of_labelled_views(means: bool, tmp_path: Path) -> None:
    given = ["loss=cosine", *SMALL, f"class_means={str(means).lower()}"]
    run = trainer.build(trainer.checked(config.load(TrainConfig, given, environ={})), tmp_path)
    cache, views = Cache.open("cache"), run.loader.batches.order.views(2)
    stored = torch.nn.functional.normalize(cache.batch(cache.usable_views, ["embedding"])["embedding"].float(), dim=-1)
    (batch,) = run.loader.batches_from(2, 3, run.config, run.device)
    columns = cache.plan.views
    for view, target in zip(views, batch.inputs.targets["embedding"], strict=True):
        same = (cache.speaker(cache.usable_views) == cache.speaker(view)) & (columns.speed == columns.speed[view])
        expected = stored[torch.from_numpy(same)].mean(0) if means else stored[view]
        assert torch.cosine_similarity(target, expected, dim=0) > 1 - 1e-6


@pytest.mark.usefixtures("cached")
@pytest.mark.parametrize("given", [["loss=aam"], ["loss=kld"], ["loss=ntxent"]])
def test_class_means_are_refused_where_nothing_learns_from_embeddings(spkd: Callable, given: list[str]) -> None:
    done = spkd("train", *given, *SMALL, "class_means=true")
    name = given[0].removeprefix("loss=")
    error = f"error: class_means=true has no effect: {name} learns nothing from the teacher's embeddings\n"
    assert (done.code, done.err) == (2, error)


@pytest.mark.usefixtures("cached")
def test_a_batch_that_the_cache_cannot_fill_is_refused(spkd: Callable) -> None:
    done = spkd("train", "--loss", "cosine", *NARROW, "steps=2", "batch_size=37")
    error = "error: cache: 36 usable views, fewer than batch_size=37; lower it, or extract more\n"
    assert (done.code, done.err) == (1, error)
    spkd("train", "--loss", "cosine", *NARROW, "steps=2", "batch_size=36").ok()


@pytest.mark.usefixtures("cached")
@pytest.mark.parametrize("workers", [0, 1])
def test_audio_that_is_gone_is_a_line(spkd: Callable, corpus: Path, workers: int) -> None:
    rows = Manifest.load(corpus / "manifest.csv").utterances
    Manifest(tuple(replace(row, path=f"/nowhere/{row.path}") for row in rows)).save("gone.csv")
    given = [f"workers={workers}", "manifest=gone.csv", "augment.noise=synthetic"]
    done = spkd("train", "--loss", "cosine", *SMALL, *given)
    assert done.code == 1
    (line,) = done.err.splitlines()
    assert line.startswith("error: training: /nowhere/")


@pytest.mark.usefixtures("cached")
@pytest.mark.parametrize(
    ("by", "line"),
    [
        (
            signal.SIGKILL,
            "killed: most likely memory ran out and the system ended it; lower workers=1 or batch_size=6, and start",
        ),
        (signal.SIGXCPU, "ended by SIGXCPU; start"),
    ],
)
def test_a_killed_loader_names_its_end_and_that_the_run_continues(
    spkd: Callable, corpus: Path, monkeypatch: pytest.MonkeyPatch, by: signal.Signals, line: str
) -> None:
    """The loader is killed after a step: as the kernel does where memory ran out, or as a library does."""

    def killing(run: object, done: int, *_: object) -> bool:
        os.kill(multiprocessing.active_children()[0].pid, by)  # type: ignore[arg-type]
        return False

    monkeypatch.setattr(trainer, "_after_step", killing)
    given = ["workers=1", f"manifest={corpus / 'manifest.csv'}", "augment.noise=synthetic"]
    done = spkd("train", "--loss", "cosine", *SMALL, *given)
    again = "the same command again, which continues from what was saved last"
    assert (done.code, done.err) == (1, f"error: a process that loads audio was {line} {again}\n")


def test_class_means_need_labels(spkd: Callable, corpus: Path, teacher: Path) -> None:
    rows = tuple(Utterance(u.id, u.path, None, u.duration) for u in Manifest.load(corpus / "manifest.csv"))
    Manifest(rows).save("unlabelled.csv")
    given = ["teacher=checkpoint", f"teacher.weights={teacher}", "manifest=unlabelled.csv", "fbank=true"]
    spkd("extract", *given).ok()
    done = spkd("train", "--loss", "cosine", *SMALL, "class_means=true")
    assert done.code == 2
    assert "class_means=true has no effect: it needs one teacher's embeddings, and speaker labels" in done.err


@pytest.mark.usefixtures("cached")
def test_the_last_line_of_progress_is_of_the_last_step(spkd: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spkd.progress.LINE_EVERY", 0.0)
    out = spkd("train", "--loss", "mse", *SMALL, "steps=3").out
    last = [line for line in out.splitlines() if line.startswith("training: ")][-1]
    state = json.loads(Path("student/model.json").read_text())["training"]["last_terms"]["mse"]
    assert re.fullmatch(rf"training: 18/18 utterances, .* s in all  mse {state:.3f}", last)


@pytest.mark.usefixtures("cached")
def test_training_lowers_the_loss(spkd: Callable) -> None:
    spkd("train", "--loss", "cosine", *SMALL[:-1], "steps=150", "optim.warmup=10", "optim.lr=0.01").ok()
    first = json.loads(Path("student/log.jsonl").read_text().splitlines()[0])["cosine"]
    assert load_student("student").training.last_terms["cosine"] < 0.5 * first


@pytest.mark.usefixtures("cached")
@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
def test_a_killed_run_continues_to_the_same_weights(spkd: Callable, tmp_path: Path, optimiser: str) -> None:
    arguments = [
        "train",
        "--loss",
        "contrastive",
        "--loss",
        "aam",
        *SMALL[:-1],
        "steps=40",
        "save_every=5",
        f"optim={optimiser}",
    ]
    spkd(*arguments, "out=whole").ok()
    kill_after_saving([*arguments, "out=killed"], tmp_path / "killed")
    spkd(*arguments, "out=killed").ok()
    whole, killed = load_file("whole/model.safetensors"), load_file("killed/model.safetensors")
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    steps = [json.loads(line)["step"] for line in Path("killed/log.jsonl").read_text().splitlines()]
    assert steps == [0, 20]
    assert "finished already" in spkd(*arguments, "out=killed").out


@pytest.mark.usefixtures("cached")
def test_a_folder_with_another_run_is_not_overwritten(spkd: Callable) -> None:
    spkd("train", "--loss", "mse", *SMALL).ok()
    done = spkd("train", "--loss", "cosine", *SMALL[1:], "student.channels=8", "mask.bands=4")
    assert done.code == 2
    assert done.err == (
        "error: student: holds a student with other settings (loss: [mse] there, [cosine] now; student.channels: 16 "
        "there, 8 now; mask.bands: 10 there, 4 now); choose another folder with out=FOLDER\n"
    )
    done = spkd("train", "--loss", "mse", *SMALL, "loss.weights.mse=0.5", "seed=3")
    assert "(loss.weights.mse: 1.0 there, 0.5 now; seed: 0 there, 3 now)" in done.err
    # The state of such a run is kept, so that it can be continued with more steps.
    spkd("train", "--loss", "mse", *SMALL, "optim.schedule=constant", "out=s").ok()
    done = spkd("train", "--loss", "mse", *SMALL, "optim.schedule=constant", "out=s", "seed=3")
    assert done.err.startswith("error: s: holds a student with other settings (seed: 0 there, 3 now)"), done.err


def test_audio_is_loaded_where_no_features_are_cached(spkd: Callable, corpus: Path, teacher: Path) -> None:
    extract = [
        "extract",
        "teacher=checkpoint",
        f"teacher.weights={teacher}",
        f"manifest={corpus / 'manifest.csv'}",
        "view=crops:2,0.6",
    ]
    spkd(*extract).ok()
    spkd(*extract, "cache=with", "fbank=true", "storage.codec=float32").ok()
    spkd(*extract, "cache=without", "storage.codec=float32").ok()
    done = spkd("train", "--loss", "mse", *SMALL)
    assert (done.code, "give manifest=FILE, or extract with fbank=true" in done.err) == (2, True)
    spkd("train", "--loss", "mse", *SMALL, "cache=with", "out=a").ok()
    spkd("train", "--loss", "mse", *SMALL, "cache=without", "out=b", f"manifest={corpus / 'manifest.csv'}").ok()
    a, b = load_file("a/model.safetensors"), load_file("b/model.safetensors")
    assert all(torch.allclose(a[name], b[name], atol=2e-2) for name in a if "num_batches" not in name)
    Path("other.csv").write_text("utt,path,speaker,duration\nx,x.wav,s,1\n")
    done = spkd("train", "--loss", "mse", *SMALL, "cache=without", "out=c", "manifest=other.csv")
    error = "extracted from another manifest than other.csv, which lacks 18 of 18 utterances"
    assert (done.code, error in done.err) == (1, True)


def test_missing_targets_are_refused_with_the_command_that_makes_them(spkd: Callable, corpus: Path) -> None:
    spkd("extract", "teacher=none", f"manifest={corpus / 'manifest.csv'}").ok()
    done = spkd("train", "--loss", "contrastive", *SMALL)
    assert done.code == 1
    assert "needs the target embedding" in done.err
    assert "spkd extract teacher=NAME " in done.err
    assert "teacher.targets=[embedding]" in done.err
    spkd("train", "--loss", "aam", *SMALL).ok()


def test_labels_are_asked_for_only_where_needed(spkd: Callable, corpus: Path, teacher: Path) -> None:
    text = (corpus / "manifest.csv").read_text().splitlines()
    rows = [line.split(",") for line in text]
    Path("unlabelled.csv").write_text(
        "\n".join(",".join([r[0], str(corpus / r[1]) if i else r[1], r[3]]) for i, r in enumerate(rows))
    )
    spkd("extract", "teacher=checkpoint", f"teacher.weights={teacher}", "manifest=unlabelled.csv", "fbank=true").ok()
    done = spkd("train", "--loss", "aam", *SMALL)
    assert (done.code, "needs speaker labels" in done.err) == (1, True)
    spkd("train", *SMALL).ok()
    assert list(load_student("student").training.settings["losses"]) == ["contrastive"]


def test_a_classifier_learns_from_the_labelled_part(spkd: Callable, corpus: Path, teacher: Path) -> None:
    text = (corpus / "manifest.csv").read_text().splitlines()
    rows = [text[0].split(","), *([r[0], str(corpus / r[1]), *r[2:]] for r in (line.split(",") for line in text[1:]))]
    which = rows[0].index("speaker")
    for row in rows[1::2]:
        row[which] = ""
    Path("partly.csv").write_text("\n".join(map(",".join, rows)))
    given = ("teacher=checkpoint", f"teacher.weights={teacher}", "manifest=partly.csv", "fbank=true")
    spkd("extract", *given).ok()
    done = spkd("train", "--loss", "contrastive", "--loss", "aam", *SMALL).ok()
    assert "views have a speaker label; it learns from those" in done.out
    done = spkd("train", "--loss", "nontarget", *SMALL, "out=other")
    assert (done.code, "needs speaker labels" in done.err) == (1, True)


@pytest.mark.usefixtures("cached")
@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (["cache=none"], "no teacher cache"),
        (["--loss", "kosine"], "did you mean 'cosine'"),
        (["student.channels=30", "student=ecapa"], "multiple of 8"),
        (["batch_size=1"], "at least 2"),
        (["out=file/x"], "cannot be written"),
        (["optim.lr=1e9", "optim.warmup=0", "optim.clip=0"], "diverged"),
    ],
)
def test_one_line_errors(spkd: Callable, extra: list[str], expected: str) -> None:
    Path("file").touch()
    done = spkd("train", "--loss", "mse", *SMALL[2:], "student.channels=16", *extra)
    assert done.code in (1, 2)
    assert expected in done.err
    assert len(done.err.splitlines()) == 1


def test_the_schedule_warms_up_and_decays_to_its_end() -> None:
    config = OptimConfig(lr=1.0, final_lr=0.1, warmup=10)
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[0] == 0.1
    assert rates[9] == rates[10] == 1.0
    assert abs(rates[-1] - 0.1) < 1e-12
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_only_matrices_are_decayed() -> None:
    network = build("xvector", channels=16, embedding=8)
    decayed, free = make_optimiser(OptimConfig(), network).param_groups
    assert decayed["weight_decay"] > 0 == free["weight_decay"]
    assert all(p.ndim > 1 for p in decayed["params"])
    assert all(p.ndim == 1 for p in free["params"])


@pytest.mark.parametrize("nesterov", [True, False])
def test_a_parameter_may_have_its_first_gradient_after_others(nesterov: bool) -> None:
    """SGD with momentum (Sutskever et al., ICML 2013) by its formula, in float64."""
    module = torch.nn.ParameterDict({name: torch.nn.Parameter(torch.randn(3, 2)) for name in ("first", "later")})
    settings = OptimConfig(name="sgd", lr=0.1, weight_decay=0.01, settings=SGDSettings(nesterov))
    optimiser = make_optimiser(settings, module)
    expected = {name: p.detach().double() for name, p in module.items()}
    momentum = {name: torch.zeros(3, 2).double() for name in module}
    for step in range(5):
        optimiser.zero_grad(set_to_none=True)
        for name, parameter in module.items():
            if name == "later" and step < 2:
                continue
            parameter.grad = torch.randn(3, 2)
            gradient = parameter.grad.double() + 0.01 * expected[name]
            momentum[name] = 0.9 * momentum[name] + gradient
            expected[name] = expected[name] - 0.1 * (gradient + 0.9 * momentum[name] if nesterov else momentum[name])
        optimiser.step()
        for name, parameter in module.items():
            assert torch.allclose(parameter.double(), expected[name], atol=1e-6), (step, name)


@pytest.mark.usefixtures("cached")
def test_the_last_weights_are_averaged(spkd: Callable) -> None:
    settings = [*SMALL[:-1], "steps=6", "save_every=1"]
    module = TrainingModule(build("tiny", channels=8, embedding=4), WeightedSum({}, LossContext({}, {}, 1)), 0.5)
    seen = []
    for step in range(6):
        with torch.no_grad():
            for values in module.network.state_dict().values():
                values.copy_(torch.randn(values.shape) if values.is_floating_point() else values + 1)
        module.after_step((step + 1) / 6, (step + 1) / 6)
        seen.append({k: v.double().clone() for k, v in module.network.state_dict().items()})
        if step < 4:  # those of validation, of which none or one is averaged yet
            kept = module.trained_network().state_dict()
            assert all(torch.equal(values.double(), seen[-1][name]) for name, values in kept.items())
    for name, values in module.trained_network().state_dict().items():
        if values.is_floating_point():
            assert torch.allclose(values.double(), sum(s[name] for s in seen[3:]) / 3, atol=1e-6), name
        else:
            assert int(values) == 6, name
    spkd("train", "--loss", "cosine", *settings, "optim.swa_fraction=0.5").ok()
    assert (
        "moving average of its own" in spkd("train", "--loss", "memo", *settings, "optim.swa_fraction=0.5", "out=m").err
    )


def test_exponential_decay_begins_with_the_run() -> None:
    config = OptimConfig(lr=0.1, final_lr=1e-4, warmup=10, schedule="exponential")
    rates = [learning_rate(config, step, 101) for step in range(101)]
    assert rates[0] == pytest.approx(0.01)
    assert rates[50] == pytest.approx(0.1 * (1e-3) ** 0.5)
    assert rates[100] == pytest.approx(1e-4)


@pytest.mark.parametrize("name", config.recipes())
def test_recipes_are_valid_settings(name: str) -> None:
    settings = config.load(TrainConfig, base=name)
    assert settings.loss.names
    assert chosen_losses(settings.loss)
    config.load(ExtractConfig, base=name)
    tree = yaml.safe_load(config.recipe(name).read_text())
    assert set(tree) == {"extract", "train"}
    assert settings.steps == tree["train"]["steps"]
    assert config.load(TrainConfig, ["steps=5"], base=name).steps == 5
    if settings.student.init is None:
        assert make_student(settings.student)


@pytest.mark.usefixtures("cached")
@pytest.mark.parametrize(("typed", "weight"), [((), 0.3), (("loss.weights.aam=0.5",), 0.5)])
def test_without_any_choice_labels_are_learnt_besides(spkd: Callable, typed: tuple[str, ...], weight: float) -> None:
    done = spkd("train", *SMALL[:-1], "steps=2", *typed).ok()
    assert "--loss is not given: contrastive and aam by default" in done.out + done.err
    assert list(load_student("student").training.settings["losses"]) == ["contrastive", "aam"]
    resolved = config.load(TrainConfig, file="student/run.yaml")
    assert (resolved.loss.names, resolved.loss.weights) == (["contrastive", "aam"], {"aam": weight})


@pytest.mark.parametrize(
    "name",
    [
        *("best-mini", "memo-mini"),
        *(
            pytest.param(n, marks=pytest.mark.slow)
            for n in ("label-free-mini", "enskd-mini", "os-kdft-mini", "multilevel-mini")
        ),
    ],
)
def test_recipes_train(spkd: Callable, corpus: Path, name: str) -> None:
    spkd("extract", "--recipe", name, "teacher=dvector", *dvector(), f"manifest={corpus / 'manifest.csv'}").ok()
    spkd("train", "--recipe", name, "steps=2", "batch_size=6").ok()
    found = load_student("student").training.settings
    assert list(found["losses"]) == config.load(TrainConfig, base=name).loss.names
    assert "did you mean" in spkd("train", "--recipe", "memmo").err


def test_a_recipe_whose_views_the_cache_lacks_is_noted(spkd: Callable, corpus: Path) -> None:
    given = ["teacher=dvector", *dvector()[:2], f"manifest={corpus / 'manifest.csv'}", "fbank=true"]
    train = ["train", "--recipe", "best-mini", "steps=2", "batch_size=6"]
    spkd("extract", *given, "cache=full").ok()
    done = spkd(*train, "cache=full", "out=a").ok()
    (note,) = (line for line in done.out.splitlines() if line.startswith("note: full"))
    assert note.startswith("note: full has view.plan=full, view.speeds=[1], view.formants=[1]; the recipe is for ")
    assert "view.plan=full:16, view.speeds=[0.75,0.8," in note
    assert "its pseudo-speakers are not there; extract them with the same --recipe" in note
    spkd("extract", "--recipe", "label-free-mini", *given, "cache=same", "view.speeds=[0.9,1.0]").ok()
    train[2] = "label-free-mini"
    assert "note: same has view.speeds=[0.9,1]; the recipe is for view.speeds=[0.85," in spkd(*train, "cache=same").out


def dvector() -> list[str]:
    """Untrained weights of the d-vector's shape, and the targets of all the recipes."""
    torch.manual_seed(0)
    lstm, linear = torch.nn.LSTM(40, 256, 3, batch_first=True), torch.nn.Linear(256, 256)
    tensors = {f"lstm.{k}": v for k, v in lstm.state_dict().items()}
    tensors |= {f"linear.{k}": v for k, v in linear.state_dict().items()}
    save_file(tensors, "dvector.safetensors")
    return [
        "teacher.weights=dvector.safetensors",
        "teacher.targets=[embedding,stats,frames.layer3]",
        "view.speeds=[1.0]",
        "view.formants=[1.0]",
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("cached")
def test_a_torn_log_never_forbids_resuming(spkd: Callable, tmp_path: Path) -> None:
    command = ["train", "--loss", "mse", *SMALL[:4], "steps=300", "save_every=25", "out=run"]
    kill_after_saving(command, tmp_path / "run")
    path = tmp_path / "run" / "log.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 20, "lo\xff')
    done = spkd(*command).ok()
    assert "continuing" in done.out + done.err
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == sorted(set(steps))
    assert steps[-1] == 280


@pytest.mark.slow
@pytest.mark.usefixtures("cached")
def test_a_state_with_odd_values_is_a_line(spkd: Callable, tmp_path: Path) -> None:
    command = ["train", "--loss", "mse", *SMALL[:4], "steps=300", "save_every=5", "out=run"]
    kill_after_saving(command, tmp_path / "run")
    path = tmp_path / "run" / "state.json"
    good = json.loads(path.read_text())

    def sealed(tree: dict[str, object]) -> dict[str, object]:
        return FORMAT.seal({name: value for name, value in tree.items() if name not in ("spkd_state", "digest")})

    odd: list[dict[str, object]] = [{"step": value} for value in (10**6, -3, True, "x", None, 1.5)]
    odd += [{"tensors": value} for value in ("../x", "state.9.safetensors", 1)]
    for change in odd:
        path.write_text(json.dumps(sealed(good | change)))
        done = spkd(*command)
        assert (done.code, "damaged training state" in done.err) == (1, True), (change, done.err)
    file = tmp_path / "run" / good["tensors"]
    tensors = load_file(file)
    name = next(n for n in tensors if n.startswith("optimiser.") and tensors[n].ndim == 2)
    changed = [{name: tensors[name][:1]}, {name: torch.full_like(tensors[name], float("nan"))}]
    kept = {n: v for n, v in tensors.items() if not n.startswith("optimiser.")}
    for bad in [tensors | change for change in changed] + [kept]:
        save_file(bad, file)
        path.write_text(json.dumps(sealed(good | {"sha256": digest.of_file(file)})))
        done = spkd(*command)
        assert (done.code, "damaged training state" in done.err) == (1, True), done.err
        assert "is not the file" not in done.err


@pytest.mark.slow
@pytest.mark.usefixtures("cached")
def test_a_flipped_bit_in_a_state_is_a_line(spkd: Callable, tmp_path: Path) -> None:
    command = ["train", "--loss", "mse", *SMALL[:4], "steps=300", "save_every=5", "out=run"]
    kill_after_saving(command, tmp_path / "run")
    for path in (tmp_path / "run").glob("state.*"):
        good = path.read_bytes()
        at = good.index(b'"step": ') + 8 if path.suffix == ".json" else len(good) - 3
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        done = spkd(*command)
        assert (done.code, len(done.err.splitlines())) == (1, 1)
        assert "run: damaged training state" in done.err
        path.write_bytes(good)
    spkd(*command).ok()


def on(file_system: str, *command: str) -> None:
    """A command on a file system with these locks."""
    fcntl.flock = FLOCK[file_system]
    processes.command(*command)


@pytest.mark.usefixtures("cached")
@pytest.mark.parametrize("file_system", ["local", "missing"])
def test_two_trainings_into_one_folder(
    spkd: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_system: str
) -> None:
    """The second names the first and touches nothing; also where its seed is another. A killed one blocks nobody."""
    first = processes.Running(on, file_system, "train", "--loss", "mse", *SMALL[:4], "steps=3000", "out=run")
    while not (tmp_path / "run" / "log.jsonl").is_file():
        time.sleep(0.05)
    monkeypatch.setattr(fcntl, "flock", FLOCK[file_system])
    done = spkd("train", "--loss", "mse", *SMALL[:4], "steps=3000", "out=run", "seed=5")
    assert (done.code, f"another training is at work there, process {first.pid} on " in done.err) == (1, True), done.err
    first.kill()
    spkd("train", "--loss", "mse", *SMALL[:4], "steps=2", "out=run", "seed=5").ok()
    assert not list(tmp_path.glob("run/run.lock*"))


def test_no_steps_are_refused(spkd: Callable) -> None:
    done = spkd("train", "--loss", "mse", "steps=0")
    assert (done.code, "steps" in done.err) == (2, True)


@pytest.mark.parametrize("clip_by", ["network", "tensor"])
def test_gradients_are_clipped_as_asked(clip_by: str) -> None:
    torch.manual_seed(0)
    settings = OptimConfig(clip_by=clip_by, clip=0.5)
    module = TrainingModule(build("xvector", channels=16, embedding=8), WeightedSum({}, {}))
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    clip_gradients(settings, module)
    after = [p.grad for p in module.parameters() if p.grad is not None]
    total = torch.cat([g.flatten() for g in before]).norm()
    for old, new in zip(before, after, strict=True):
        norm = old.norm() if clip_by == "tensor" else total
        assert torch.allclose(new, old * min(1.0, 0.5 / float(norm)), rtol=1e-4)


@pytest.mark.parametrize("nesterov", [True, False])
def test_momentum_is_plain_or_nesterovs(nesterov: bool) -> None:
    """By the formulas of Sutskever et al., ICML 2013, as torch has them."""
    linear = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(linear.weight)
    settings = OptimConfig(name="sgd", lr=0.1, weight_decay=0.0, settings=SGDSettings(nesterov))
    optimiser = make_optimiser(settings, linear)
    weight, velocity = 1.0, 0.0
    for gradient in (1.0, -0.5, 2.0):
        linear.weight.grad = torch.tensor([[gradient]])
        optimiser.step()
        velocity = 0.9 * velocity + gradient
        weight -= 0.1 * (gradient + 0.9 * velocity if nesterov else velocity)
        assert linear.weight.item() == pytest.approx(weight)


def test_recipes_have_the_values_of_the_authors() -> None:
    """enskd: the margin rises over epochs 20 to 40 of 150, counted from 0 as the authors' code does; memo: its SGD."""
    enskd = chosen_losses(config.load(TrainConfig, base="enskd").loss)["nontarget"].settings
    assert enskd.margin_warmup == pytest.approx([19 / 150, 39 / 150], abs=1e-4)  # type: ignore[attr-defined]
    memo = config.load(TrainConfig, base="memo").optim
    assert (memo.lr, memo.clip, memo.clip_by, memo.settings.nesterov) == (0.1875, 3.0, "tensor", False)
