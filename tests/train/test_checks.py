"""Settings that have no effect on a run: refused where they are typed, left out with a note where a file gives them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from spkd import config
from spkd.errors import UsageError
from spkd.train.losses.chosen import chosen_losses
from spkd.train.optim import learning_rate
from spkd.train.settings import TrainConfig
from spkd.train.trainer import Task, checked
from tests.conftest import save_teacher

SMALL = ["student=xvector", "student.channels=16", "student.embedding=8", "batch_size=6", "crop=0.6", "steps=2"]


@pytest.fixture(scope="module")
def folder(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cache of embeddings, frames and fbank, and one of fbank and samples."""
    from spkd.extract.launch import extract_all
    from spkd.extract.settings import ExtractConfig

    root = tmp_path_factory.mktemp("checks")
    save_teacher(root / "teacher")
    common = [f"manifest={corpus / 'manifest.csv'}", "fbank=true"]
    teacher = ["teacher=checkpoint", f"teacher.weights={root / 'teacher'}", "teacher.targets=[embedding,frames]"]
    for name, keys in {"cache": teacher, "features": ["teacher=none", "wave=true"]}.items():
        extract_all([config.load(ExtractConfig, [*common, *keys, f"cache={root / name}"], environ={})])
    return root


@pytest.fixture
def check(folder: Path, tmp_path: Path) -> Callable[..., Task]:
    """Inputs of a run with typed keys, and with the settings of a file."""

    def task(*typed: str, file: dict[str, Any] | None = None, cache: str = "cache") -> Task:
        path = tmp_path / "lab.yaml"
        path.write_text(yaml.safe_dump({"train": file or {}}))
        small = SMALL[:-1] if any("epochs" in key for key in typed) else SMALL
        return checked(config.load(TrainConfig, [*small, f"cache={folder / cache}", *typed], path, {}))

    return task


FRAMES = "loss.multilevel.levels={frames: frames}"
MEMO = ["loss=memo", "loss.memo.partner=tiny"]


@pytest.mark.parametrize(
    ("run", "key", "value", "reason"),
    [
        (["loss=cosine"], "mining.negatives", 4, "only contrastive takes hard negatives"),
        (["loss=cosine"], "mining.positives", 4, "only ntxent and memo take further crops"),
        (["loss=aam"], "class_means", True, "aam learns nothing from the teacher's embeddings"),
        (MEMO, "optim.swa_fraction", 0.5, "memo keeps a moving average of its own"),
        (["loss=multilevel", FRAMES], "augment.speeds", [0.9, 1.0], "frames of the teacher do not follow"),
        (["loss=aam"], "loss.aam.sharded", True, "one rank has all classes"),
        (["loss=cosine"], "channels_last", True, "student=xvector has no 2-d convolutions"),
        (["loss=cosine", "large_margin.steps=2"], "large_margin.margin", 0.4, "cosine has no angular margin"),
        (["loss=cosine", "steps=9", "optim.warmup=8"], "optim.final_lr", 0.1, "9 steps with a warm-up of 8 have no"),
        (["loss=cosine", "steps=1", "optim.schedule=exponential"], "optim.final_lr", 0.1, "1 step with a warm-up of"),
        (["loss=cosine", "steps=9"], "optim.swa_fraction", 0.11, "no more than the last of 9 steps"),
        (["loss=cosine", "epochs=1"], "optim.swa_fraction", 0.33, "no more than the last of 3 steps"),
        (
            ["loss=aam", "large_margin.steps=9"],
            "optim.swa_fraction",
            0.11,
            "no more than the last of large_margin.steps",
        ),
        (["loss=aam", "large_margin.steps=1"], "large_margin.final_lr", 0.1, "large_margin.steps=1 has"),
        (["loss=multilevel"], "loss.multilevel.level_weights.concat", 2.0, "'concat' is not compared"),
        (["loss=multilevel"], "loss.multilevel.level_weights.frames", 2.0, "'frames' is not compared"),
    ],
)
def test_settings_without_effect(
    check: Callable, capsys: pytest.CaptureFixture, run: list[str], key: str, value: Any, reason: str
) -> None:
    with pytest.raises(UsageError) as error:
        check(*run, f"{key}={str(value).lower()}")
    assert f"{key}={str(value).lower()} has no effect: " in str(error.value)
    assert reason in str(error.value)
    tree: Any = value
    for part in reversed(key.split(".")):
        tree = {part: tree}
    assert check(*run, file=tree).config == check(*run).config
    assert f"left out {key}: " in (note := capsys.readouterr().out)
    assert reason in note


@pytest.mark.parametrize("key", ["distance=mse", "cosine=2.0", "time_reduction=sum", "linear_decay=true"])
def test_a_distillation_of_weight_0_has_no_settings(key: str) -> None:
    given = ["loss=one-step", "loss.one_step.weight=0", f"loss.one_step.{key}"]
    with pytest.raises(UsageError, match="the distillation has the weight 0"):
        config.load(TrainConfig, given, environ={})


@pytest.mark.parametrize(
    ("given", "expected"),
    [([], True), (["loss.one_step.classifier=softmax"], False), (["loss.one_step.finetune_weight=0"], False)],
)
def test_only_an_angular_classifier_has_a_margin(given: list[str], expected: bool) -> None:
    losses = chosen_losses(config.load(TrainConfig, ["loss=one-step", *given], environ={}).loss)
    assert losses["one-step"].settings.has_margin() == expected


@pytest.mark.parametrize(
    "given",
    [
        ["steps=9", "optim.warmup=7", "optim.final_lr=0.1"],
        ["steps=2", "optim.schedule=exponential", "optim.final_lr=0.1"],
        ["steps=9", "optim.swa_fraction=0.12"],
        ["steps=9", "optim.swa_fraction=0.11", "large_margin.steps=10"],
        ["epochs=1", "optim.swa_fraction=0.34"],
    ],
)
def test_what_acts_on_one_step_more_is_taken(check: Callable, given: list[str]) -> None:
    check("loss=aam", *given)


@pytest.mark.parametrize(("given", "steps"), [(["steps=9"], 9), (["epochs=2"], 6)])
def test_a_warm_up_longer_than_the_run_is_noted(
    check: Callable, capsys: pytest.CaptureFixture, given: list[str], steps: int
) -> None:
    config = check("loss=cosine", *given, "optim.lr=0.1", f"optim.warmup={steps + 1}").config
    highest = max(learning_rate(config.optim, step, steps) for step in range(steps))
    assert f"the learning rate rises to {highest:.3g}, not to optim.lr=0.1" in capsys.readouterr().out
    check("loss=cosine", *given, f"optim.warmup={steps}")
    assert "warmup" not in capsys.readouterr().out


def test_audio_is_not_decoded_where_its_augmentation_is_left_out(check: Callable, corpus: Path) -> None:
    given = {"augment": {"speeds": [0.9, 1.0]}, "manifest": str(corpus / "manifest.csv")}
    assert check("loss=multilevel", FRAMES, file=given).config.manifest is None


def test_graphs_need_fixed_shapes_and_a_gpu(check: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="fixed shapes, which sampler=lengths changes"):
        check("loss=cosine", "compile=reduce-overhead", "sampler=lengths")
    for setting in ("true", "reduce-overhead"):
        check("loss=cosine", f"compile={setting}", "device=cpu")
        printed = "".join(capsys.readouterr())
        assert ("on cpu it is compile=true" in printed) == (setting == "reduce-overhead")


def test_networks_with_2d_convolutions_take_channels_last(check: Callable) -> None:
    assert check("loss=cosine", "student=resnet34", "student.channels=8", "channels_last=true").config.channels_last


def test_an_empty_list_of_losses_names_none(check: Callable) -> None:
    assert list(check("loss=[]").losses) == list(check().losses) == ["contrastive", "aam"]


@pytest.mark.parametrize(("student", "target"), [("ssl", "wave"), ("xvector", "fbank")])
def test_the_input_of_the_student_is_no_target(check: Callable, student: str, target: str) -> None:
    learn = {"wave": ["loss=one-step", "loss.one_step.targets=[wave]"], "fbank": ["loss=multilevel", FRAMES[:-7]]}
    given = [learn[target][0], learn[target][1] + ("fbank}" if target == "fbank" else "")]
    with pytest.raises(UsageError, match=f"{target} is the student's own input; choose targets of the teacher"):
        check(*given, f"student={student}", cache="features")


@pytest.mark.parametrize("key", ["noise=noise", "rir=rir"])
def test_folders_that_no_view_used_are_refused(check: Callable, corpus: Path, key: str) -> None:
    given = [f"manifest={corpus / 'manifest.csv'}", "augment.coders=[g711]", key]
    with pytest.raises(UsageError, match=f"{key} has no effect: the cache's views have no"):
        check("loss=cosine", *given)


CODED = ["--loss", "codebook", "loss.codebook.levels={frames: frames, embedding: embedding}"]


def test_codes_are_learnt_from_caches_of_one_codebook(spkd: Callable, folder: Path, corpus: Path) -> None:
    extract = ["extract", "teacher=checkpoint", f"teacher.weights={folder / 'teacher'}", "fbank=true"]
    extract += ["teacher.targets=[embedding,frames]"]
    codecs = "storage.codecs={frames: rq4x4, embedding: lsq4x2}"
    head, *rows = (corpus / "manifest.csv").read_text().splitlines()
    for name, kept in {"coded": rows[::2], "other": rows[1::2]}.items():
        Path(f"{name}.csv").write_text("\n".join([head, *kept]).replace(",audio/", f",{corpus}/audio/"))
        spkd(*extract, f"manifest={name}.csv", f"cache={name}", codecs).ok()
    save_teacher(Path("second"), seed=1)
    spkd(*extract, "manifest=coded.csv", "cache=again", codecs, "teacher.weights=second").ok()
    spkd(*extract, "manifest=coded.csv", "cache=plain").ok()
    done = spkd("train", *SMALL, *CODED, "cache=coded", "out=s").ok()
    assert "mean of the last steps: codebook" in done.out
    for cache, reason in (
        ("plain", "needs codes, and plain has frames as float16; extract it with a codec that stores codes"),
        ("[coded,other]", "needs codes of one codebook, and the caches have several of frames; train on one of them"),
        ("[coded,again]", "needs codes of one codebook"),
        (str(folder / "cache"), "'storage.codecs={frames: rq8x8}'"),
    ):
        done = spkd("train", *SMALL, *CODED, f"cache={cache}", "out=t")
        assert (done.code, reason in done.err, len(done.err.splitlines())) == (1, True, 1), done.err
    spkd("train", *SMALL, *CODED, "cache=[coded,again]", "teachers=separate", "out=u").ok()
    # Codes are no vectors, and a loss on codes takes the name of the target itself.
    for loss, setting, reason in (
        ("multilevel", "levels={frames: frames.codes}", "frames.codes are numbers of entries in codebooks, no vectors"),
        ("multilevel", "concat=[embedding.codes]", "name embedding, or take --loss codebook"),
        ("codebook", "levels={frames: frames.codes}", "name the target itself, frames"),
    ):
        done = spkd("train", *SMALL, "--loss", loss, f"loss.{loss}.{setting}", "cache=coded", "out=v")
        assert (done.code, reason in done.err, len(done.err.splitlines())) == (2, True, 1), done.err


def test_an_embedding_that_no_loss_trains_is_noted(spkd: Callable, folder: Path, corpus: Path) -> None:
    given = ["extract", "teacher=checkpoint", f"teacher.weights={folder / 'teacher'}", "fbank=true", "cache=coded"]
    given += ["teacher.targets=[embedding,frames]", "storage.codecs={frames: rq4x4, embedding: lsq4x2}"]
    spkd(*given, f"manifest={corpus / 'manifest.csv'}").ok()
    note = "note: {} on other levels alone: the student's embedding is not trained"
    levels = ["--loss", "multilevel", "loss.multilevel.levels={stats: embedding}"]
    frames, vectors = (
        ["--loss", "codebook", f"loss.codebook.levels={{{name}: {name}}}"] for name in ("frames", "embedding")
    )
    for number, (losses, phrase) in enumerate(
        (
            (frames, "codebook acts"),
            ([*frames, *levels], "codebook and multilevel act"),
            ([*frames, "--loss", "cosine"], ""),
            (vectors, ""),
            (["--loss", "multilevel"], ""),
        )
    ):
        run = ["train", *SMALL, *losses, "cache=coded", f"out=s{number}"]
        out = spkd(*run).ok().out
        assert ("on other levels alone" in out, note.format(phrase) in out) == (bool(phrase), bool(phrase)), out
    done = spkd("train", *SMALL, *vectors, "loss.codebook.hop=0.1", "cache=coded", "out=t")
    assert (done.code, "loss.codebook.hop=0.1 has no effect: loss.codebook.levels names no frames" in done.err) == (
        2,
        True,
    ), done.err


def test_a_refused_run_leaves_no_folder(spkd: Callable, folder: Path) -> None:
    refused = [
        ["--loss", "kosine"],
        ["--loss", "cosine", "augment.coders=[g711]"],
        ["--loss", "cosine", "precision=fp16", "device=cpu"],
        ["--loss", "multilevel", "loss.multilevel.levels={frame: frames}"],
    ]
    for given in refused:
        assert spkd("train", *SMALL, *given, f"cache={folder / 'cache'}", "out=new/folder").code == 2
        assert not Path("new").exists()
