"""Label-level distillation through the real commands: the teacher's own head, and prototypes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from spkd import config
from spkd.cache import Cache
from spkd.corpus.manifest import Manifest, Utterance
from spkd.students import load_student
from spkd.train.checks import unused_margins
from spkd.train.labels import Labels
from spkd.train.losses.chosen import chosen_losses
from spkd.train.losses.contrastive import CEILING
from spkd.train.settings import TrainConfig
from spkd.train.teacher_logits import TeacherLogits, teacher_logits
from tests.conftest import CommandLine, save_teacher

SMALL = ["steps=6", "batch_size=6", "student.channels=8", "student.embedding=6", "crop=0.5"]


@pytest.fixture
def extract(spkd: CommandLine, extraction: list[str]) -> Callable:
    """Extract from a checkpoint whose head knows the given speakers."""

    def run(cache: str, speakers: list[str], *more: str) -> Cache:
        save_teacher(Path("teacher"), speakers=speakers)
        given = [*extraction, "teacher.targets=[embedding,logits]", f"cache={cache}", "fbank=true", *more]
        spkd.once(cache, *given)
        return Cache.open(cache)

    return run


SPEAKERS = [f"spk{i}" for i in (5, 3, 1, 0, 2, 4)]  # in another order than the manifest's


@pytest.mark.parametrize("loss", ["kld", "nontarget"])
@pytest.mark.parametrize("stored", [False, True])
def test_a_student_learns_from_the_teachers_own_head(
    spkd: Callable, extract: Callable, loss: str, stored: bool
) -> None:
    cache = extract("c", SPEAKERS, *(["storage.codecs={logits: float32}"] if stored else []))
    labels = Labels.of(cache)
    losses = chosen_losses(config.load(TrainConfig, [f"loss=[{loss}]"]).loss)
    logits = teacher_logits(cache, labels, losses)
    assert logits is not None
    assert (logits.source, logits.scale, logits.classes) == ("logits", 20.0, SPEAKERS)
    assert [SPEAKERS[i] for i in logits.label] == [labels.names[i] for i in labels.label]
    spkd("train", "--loss", loss, "cache=c", "out=s", *SMALL).ok()
    student = load_student(Path("s"))
    assert student.classes == SPEAKERS
    assert student.head is not None
    assert student.head.shape == (6, 6)


def test_prototypes_are_the_mean_of_each_class(spkd: Callable, extract: Callable) -> None:
    cache = extract("c", SPEAKERS, "view.speeds=[0.9,1.0]")
    labels = Labels.of(cache)
    losses = chosen_losses(config.load(TrainConfig, ["loss=[kld]", "loss.kld.scale=15"]).loss)
    logits = teacher_logits(cache, labels, losses)
    assert logits is not None
    logits = logits.with_prototypes(cache)
    assert logits.source == "embedding"
    assert logits.classes == labels.names
    embedding = cache.batch(cache.usable_views, ["embedding"])["embedding"].double().numpy()
    unit = embedding / np.linalg.norm(embedding, axis=1, keepdims=True)
    mean = np.stack([unit[labels.label == k].mean(0) for k in range(len(labels.names))])
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    outputs = logits.of(torch.from_numpy(embedding[:5]).float())
    assert np.allclose(outputs, 15.0 * unit[:5] @ mean.T, atol=1e-4)
    assert torch.allclose(normalize(logits.prototypes, dim=1), logits.prototypes)
    for loss in ("kld", "nontarget"):
        spkd("train", "--loss", loss, "cache=c", f"out={loss}", *SMALL).ok()
        assert load_student(Path(loss)).classes == labels.names


def test_a_speed_without_a_class_is_refused_before_training(spkd: Callable, extract: Callable) -> None:
    extract("c", SPEAKERS, "view.speeds=[0.9,1.0]")
    train = ["train", "cache=c", "out=s", *SMALL]
    done = spkd(*train, "--loss", "nontarget", "loss.nontarget.logits=head")
    assert done.code == 1
    assert "the teacher's head has no class for 6 of 12 classes (spk0@0.90)" in done.err
    assert "loss.nontarget.logits=prototypes" in done.err
    assert not Path("s").exists()
    spkd(
        *train, "--loss", "kld", "loss.kld.logits=head"
    ).ok()  # learns from those views what the teacher says of its own speakers


@pytest.mark.parametrize("classes", [[str(i) for i in range(6)], ["0", "1", "2", "3", "3", "5"]])
def test_numbered_classes_are_nobodys_names(
    spkd: Callable, extract: Callable, corpus: Path, classes: list[str]
) -> None:
    """Class 3 of a teacher that keeps no names is not the manifest's speaker `3`; nor is one of two classes `3`."""
    named = Manifest.load(corpus / "manifest.csv")
    numbers = tuple(replace(u, speaker=str(int(str(u.speaker)[-1]))) for u in named)
    Manifest(numbers).save("numbers.csv")
    cache = extract("c", classes, "manifest=numbers.csv")
    labels = Labels.of(cache)
    losses = chosen_losses(config.load(TrainConfig, ["loss=[trkd]"]).loss)
    logits = teacher_logits(cache, labels, losses)
    assert logits is not None
    assert (logits.source, logits.classes) == ("embedding", labels.names)
    printed = spkd("train", "--loss", "trkd", "cache=c", "out=s", *SMALL).ok().out
    assert ("the teacher's head are numbers, not names: prototypes are taken" in printed) == (classes[4] == "4")
    done = spkd("train", "--loss", "trkd", "cache=c", "out=t", "loss.trkd.logits=head", *SMALL)
    assert (done.code, "head has no class for" in done.err) == (1, True)
    spkd("train", "--loss", "kld", "cache=c", "out=u", "loss.kld.logits=head", *SMALL).ok()
    assert load_student(Path("u")).classes == classes


def test_a_linear_head_has_no_margin() -> None:
    losses = chosen_losses(config.load(TrainConfig, ["loss=[kld,cosine]"], environ={}).loss)
    label, names = np.array([0, -1]), ["a", "b"]
    assert list(unused_margins(losses, TeacherLogits(names, label, None))) == ["loss.kld.teacher_margin"]
    assert not unused_margins(losses, TeacherLogits(names, label, 20.0))


def test_speech_without_labels_teaches_through_the_head_alone(spkd: Callable, extract: Callable, corpus: Path) -> None:
    unlabelled = tuple(Utterance(u.id, u.path, None, u.duration) for u in Manifest.load(corpus / "manifest.csv"))
    Manifest(unlabelled).save("unlabelled.csv")
    extract("c", SPEAKERS, "manifest=unlabelled.csv")
    spkd("train", "--loss", "kld", "cache=c", "out=s", *SMALL).ok()
    for margin in ("margin=0.3", "margin_warmup=[0.1,0.2]", "teacher_margin=0.1"):
        done = spkd("train", "--loss", "kld", "cache=c", "out=t", *SMALL, f"loss.kld.{margin}")
        assert (done.code, "no view has a label among the teacher's classes" in done.err) == (2, True)
    # In a sweep it is said once: before the first run where it acts in none.
    sweep = ["train", "-m", "cache=c", *SMALL, "loss.kld.margin=0.3"]
    done = spkd(*sweep, "loss=kld", "seed=1,2")
    assert (done.code, "loss.kld.margin=0.3 has no effect: no view has a label" in done.err) == (2, True)
    assert not Path("sweep").exists()
    extract("labelled", SPEAKERS)
    done = spkd(*sweep, "loss=kld", "cache=c,labelled")
    assert done.code == 0, done.err
    assert "note: loss.kld.margin=0.3 acts in 1 of 2 runs; in the others no view has a label" in done.out
    done = spkd("train", "--loss", "nontarget", "cache=c", "out=t", *SMALL)
    assert (done.code, "needs speaker labels" in done.err) == (1, True)
    done = spkd("train", "--loss", "kld", "cache=c", "out=t", "loss.kld.logits=prototypes", *SMALL)
    assert (done.code, "the speaker of every utterance" in done.err) == (2, True)


def test_a_teacher_without_a_head_and_without_labels(spkd: Callable, corpus: Path, extract: Callable) -> None:
    unlabelled = tuple(Utterance(u.id, u.path, None, u.duration) for u in Manifest.load(corpus / "manifest.csv"))
    Manifest(unlabelled).save("unlabelled.csv")
    extract("c", SPEAKERS, "manifest=unlabelled.csv", "teacher.targets=[embedding]")
    done = spkd("train", "--loss", "kld", "cache=c", *SMALL)
    assert (done.code, "holds no logits" in done.err) == (1, True)
    extract("d", SPEAKERS, "teacher.targets=[embedding]")
    spkd("train", "--loss", "nontarget", "cache=d", "out=s", *SMALL).ok()


def test_stored_logits_that_the_card_calls_wrong_are_warned_of(spkd: Callable, extract: Callable) -> None:
    extract("c", SPEAKERS, "storage.codecs={logits: topk1}")
    errors = Cache.open("c").card.errors["logits"]
    done = spkd("train", "--loss", "kld", "cache=c", "out=s", "loss.kld.temperature=4", *SMALL).ok()
    assert ("warning: c: the stored logits are wrong by" in done.out) == (errors["kl_t4"] > 0.05)
    assert errors["kl_t4"] > 0.05


def test_prototypes_of_a_stream(spkd: Callable, extract: Callable) -> None:
    extract("c", SPEAKERS)
    spkd("cache", "export", "c", "tars").ok()
    spkd("train", "--loss", "kld", "cache=tars", "loss.kld.logits=prototypes", *SMALL).ok()


def test_the_ceiling_rises_where_even_different_speakers_are_alike(
    spkd: Callable, corpus: Path, tiny_wavlm: Path
) -> None:
    wavlm = ("teacher=wavlm", f"teacher.weights={tiny_wavlm}")
    spkd("extract", *wavlm, f"manifest={corpus / 'manifest.csv'}", "cache=c", "fbank=true").ok()
    cache = Cache.open("c")
    outputs = normalize(cache.batch(cache.usable_views, ["embedding"])["embedding"].double(), dim=-1).numpy()
    speaker = cache.speaker(cache.usable_views)
    cosines = [outputs[i] @ outputs[j] for i in range(18) for j in range(18) if speaker[i] != speaker[j]]
    assert min(cosines) > CEILING  # a fixed ceiling would leave no negative at all

    def trained(*more: str) -> tuple[float, str]:
        done = spkd("train", *more, "cache=c", *SMALL).ok()
        return load_student(more[-1].removeprefix("out=")).training.settings["losses"]["contrastive"][
            "ceiling"
        ], done.out

    found, printed = trained("--loss", "contrastive", "out=a")
    assert found == pytest.approx(np.quantile(cosines, 0.99), abs=1e-6)
    assert f"the ceiling of negatives is {found:.4f}" in printed
    assert load_student("a").training.last_terms["contrastive"] > 0.1
    assert trained("--loss", "contrastive", "loss.contrastive.ceiling=0.9", "out=b")[0] == 0.9
    assert load_student("b").training.last_terms["contrastive"] == 0


def test_separate_teachers_give_no_logits(spkd: Callable, extract: Callable, corpus: Path) -> None:
    extract("a", SPEAKERS)
    save_teacher(Path("other"), seed=4)
    more = ["extract", "teacher=checkpoint", "teacher.weights=other", f"manifest={corpus / 'manifest.csv'}", "cache=b"]
    spkd(*more).ok()
    done = spkd("train", "--loss", "kld", "cache=[a,b]", "teachers=separate", *SMALL)
    assert (done.code, "need one teacher; concatenate or average them" in done.err) == (2, True)
    for loss in (
        ["one-step", "loss.one_step.targets=[embedding]"],
        ["memo", "loss.memo.teacher_weight=1", "loss.memo.locals=0"],
    ):
        done = spkd("train", "--loss", *loss, "cache=[a,b]", "teachers=separate", *SMALL)
        assert (done.code, "needs one teacher; concatenate or average them" in done.err) == (2, True)
    spkd("train", "--loss", "kld", "cache=[a,b]", "out=s", *SMALL).ok()  # prototypes of both together


@pytest.mark.parametrize("distance", ["cosine", "mse"])
def test_a_student_learns_at_several_levels(spkd: Callable, corpus: Path, extract: Callable, distance: str) -> None:
    extract("c", SPEAKERS, "teacher.targets=[frames,stats,segment.a,embedding]", "view=crops:2,0.7")
    levels = "loss.multilevel.levels={frames: frames, stats: stats, segment.a: segment.a, embedding: embedding}"
    done = spkd(
        *("train", "--loss", "multilevel", "cache=c", "out=s", f"loss.multilevel.distance={distance}"),
        *(levels, "loss.multilevel.concat=[stats,segment.a]", "loss.multilevel.level_weights.frames=0.5", *SMALL),
    ).ok()
    assert "multilevel " in done.out
    done = spkd(
        "train", "--loss", "multilevel", "cache=c", "out=t", "loss.multilevel.levels={frames: frames.layer3}", *SMALL
    )
    assert (done.code, "needs the target frames.layer3" in done.err) == (1, True)
    done = spkd("train", "--loss", "multilevel", "cache=c", "out=t", "loss.multilevel.levels={frame: frames}", *SMALL)
    assert (done.code, "did you mean 'frames'" in done.err) == (2, True)


def test_frames_of_another_rate_teach_too(spkd: Callable, corpus: Path, tiny_wavlm: Path) -> None:
    spkd(
        *("extract", "teacher=wavlm", f"teacher.weights={tiny_wavlm}", "teacher.targets=[frames.layer2,embedding]"),
        *(f"manifest={corpus / 'manifest.csv'}", "cache=c", "fbank=true"),
    ).ok()
    levels = "loss.multilevel.levels={frames: frames.layer2, embedding: embedding}"
    spkd("train", "--loss", "multilevel", "cache=c", "out=s", levels, *SMALL).ok()
