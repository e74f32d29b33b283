"""`spkd train labels=FILE`: the labels of a file in the place of those of the manifests."""

from __future__ import annotations

import csv
import hashlib
import json
import pickle
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from spkd import config
from spkd.corpus.manifest import Manifest, Utterance
from spkd.students import load_student
from spkd.train.caches import open_caches
from spkd.train.label_file import put_labels
from spkd.train.settings import TrainConfig
from tests.conftest import save_teacher

SMALL = ["student=tiny", "student.channels=8", "student.embedding=6", "batch_size=4", "crop=0.5", "steps=3"]
SMALL += ["loggers=[]", "optim.warmup=0", "optim.lr=0.05"]


def renamed(number: int) -> str:
    """Another speaker for each utterance of the corpus than the one that spoke it."""
    return f"other{number % 4}"


@pytest.fixture
def utterances(corpus: Path) -> list[Utterance]:
    return list(Manifest.load(corpus / "manifest.csv"))


def write(path: str, rows: list[tuple[str, str]], header: tuple[str, ...] = ("utt", "speaker")) -> None:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def extract(spkd: Callable, utterances: list[Utterance], cache: str, speakers: list[str | None], *more: str) -> None:
    """A cache of these utterances by a manifest that names these speakers."""
    save_teacher(Path("teacher"), 8)
    lines = [f"{u.id},{u.path},{who or ''}" for u, who in zip(utterances, speakers, strict=True)]
    Path(f"{cache}.csv").write_text("\n".join(["utt,path,speaker", *lines]))
    given = ["teacher=checkpoint", "teacher.weights=teacher", "view.speeds=[0.9,1.0]", "fbank=true"]
    spkd.once(cache, "extract", *given, *more, f"manifest={cache}.csv", f"cache={cache}")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "given",
    [
        ["loss=aam", "labelled in part"],
        *(
            pytest.param(given, marks=pytest.mark.slow)
            for given in (
                ["loss=aam"],
                ["loss=contrastive", "mining.negatives=2", "mining.neighbours=2"],
                ["loss=kld", "loss.kld.logits=prototypes"],
                ["loss=nontarget", "sampler=speakers"],
                ["loss=cosine", "class_means=true"],
                [],
            )
        ),
    ],
    ids=" ".join,
)
def test_training_is_that_from_a_manifest_with_these_speakers(
    spkd: Callable, utterances: list[Utterance], given: list[str]
) -> None:
    """Whatever the manifest of the cache says: true speakers, some or none."""
    speakers: list[str | None] = [renamed(n) for n in range(len(utterances))]
    if in_part := "labelled in part" in given:
        given = [item for item in given if item != "labelled in part"]
        speakers[3::5] = [None] * len(speakers[3::5])
    extract(spkd, utterances, "expected", speakers)
    extract(spkd, utterances, "true", [u.speaker for u in utterances])
    extract(spkd, utterances, "nobody", [None] * len(utterances))
    rows = [(u.id, who) for u, who in zip(utterances, speakers, strict=True) if who is not None]
    write("labels.csv", rows[::-1])
    spkd("train", *given, *SMALL, "cache=expected", "out=expected-student").ok()
    for cache in ("true", "nobody"):
        done = spkd("train", *given, *SMALL, f"cache={cache}", "labels=labels.csv", f"out={cache}-student").ok()
        missing = f"; {18 - len(rows)} of 18 in {cache} have no label there" * in_part
        assert f"labels=labels.csv: {len(rows)} utterances of 4 speakers{missing}\n" in done.out
        ours, expected = (load_file(f"{name}-student/model.safetensors") for name in (cache, "expected"))
        assert {k: v.tolist() for k, v in ours.items()} == {k: v.tolist() for k, v in expected.items()}
        assert load_student(f"{cache}-student").classes == load_student("expected-student").classes
    spkd("train", *given, *SMALL, "cache=true", "out=true-labels").ok()
    ours, other = (load_file(f"{name}/model.safetensors") for name in ("true-student", "true-labels"))
    assert any(ours[k].tolist() != other.get(k, ours[k]).tolist() for k in ours), "labels make no difference here"


@pytest.mark.slow
def test_fine_tuning_learns_the_labels_of_the_file(spkd: Callable, utterances: list[Utterance]) -> None:
    """Of the views of `finetune_cache`, and of those of the cache where it is not given."""
    speakers: list[str | None] = [renamed(n) for n in range(len(utterances))]
    extract(spkd, utterances, "expected", speakers, "wave=true", "teacher.targets=[embedding,frames]")
    extract(
        spkd, utterances, "true", [u.speaker for u in utterances], "wave=true", "teacher.targets=[embedding,frames]"
    )
    write("labels.csv", [(u.id, str(who)) for u, who in zip(utterances, speakers, strict=True)])
    given = [*SMALL[1:], "student=ssl", "student.channels=16", "student.ssl.adapters=2", "loss=one-step"]
    given += ["loss.one_step.targets=[frames]"]
    spkd("train", *given, "cache=expected", "out=e").ok()
    spkd("train", *given, "cache=true", "labels=labels.csv", "out=a").ok()
    spkd("train", *given, "cache=true", "finetune_cache=[true]", "labels=labels.csv", "out=b").ok()
    expected = load_file("e/model.safetensors")
    for out in "ab":
        assert {k: v.tolist() for k, v in load_file(f"{out}/model.safetensors").items()} == {
            k: v.tolist() for k, v in expected.items()
        }
        assert load_student(out).classes == load_student("e").classes


@pytest.mark.slow
def test_a_stream_takes_the_labels_of_the_file(spkd: Callable, utterances: list[Utterance]) -> None:
    speakers: list[str | None] = [renamed(n) for n in range(len(utterances))]
    extract(spkd, utterances, "expected", speakers)
    extract(spkd, utterances, "true", [u.speaker for u in utterances])
    write("labels.csv", [(u.id, str(who)) for u, who in zip(utterances, speakers, strict=True)])
    for cache, labels in (("expected", []), ("true", ["labels=labels.csv"])):
        spkd("cache", "export", cache, f"{cache}-tars").ok()
        spkd("train", "loss=aam", *SMALL, f"cache={cache}-tars", *labels, f"out={cache}-s").ok()
    ours, expected = (load_file(f"{name}-s/model.safetensors") for name in ("true", "expected"))
    assert {k: v.tolist() for k, v in ours.items()} == {k: v.tolist() for k, v in expected.items()}


@pytest.fixture
def halves(spkd: Callable, utterances: list[Utterance]) -> None:
    """Two caches, of which the second has no labels."""
    extract(spkd, utterances[:9], "first", [u.speaker for u in utterances[:9]])
    extract(spkd, utterances[9:], "second", [None] * 9)


@pytest.mark.usefixtures("halves")
def test_a_speaker_of_several_caches_is_one_class(spkd: Callable, utterances: list[Utterance]) -> None:
    write("labels.csv", [(u.id, renamed(n)) for n, u in enumerate(utterances[:12])] + [("nobody's", "other9")])
    done = spkd("train", "loss=aam", *SMALL, "cache=[first,second]", "labels=labels.csv").ok()
    assert "aam: 24 of 36 views have a speaker label" in done.out
    counts = (
        "12 utterances of 4 speakers; 6 of 18 in first + second have no label there; 1 of its utterances are not in"
    )
    assert f"labels=labels.csv: {counts} first + second\n" in done.out
    assert sorted(load_student("student").classes) == sorted(f"other{n}{at}" for n in range(4) for at in ("", "@0.90"))


@pytest.mark.usefixtures("halves")
def test_a_loader_in_another_process_has_the_labels_too(utterances: list[Utterance]) -> None:
    """One that is spawned gets a copy of the cache."""
    write("labels.csv", [(u.id, renamed(n)) for n, u in enumerate(utterances)])
    for cache in (open_caches(["first"]), open_caches(["first", "second"])):
        put_labels("labels.csv", [cache])
        again, views = pickle.loads(pickle.dumps(cache)), cache.usable_views[:]
        names = [again.plan.speakers[n] for n in again.speaker(views).tolist()]
        assert names == [renamed(n) for n in cache.plan.views.utterance[views].tolist()]
        assert again.plan.tables.classes.tolist() == cache.plan.tables.classes.tolist()


@pytest.mark.usefixtures("halves")
def test_the_file_is_recorded_by_its_digest(spkd: Callable, utterances: list[Utterance]) -> None:
    write("labels.csv", [(u.id, renamed(n)) for n, u in enumerate(utterances[:9])])
    given = ["train", "loss=aam", *SMALL, "cache=first", "labels=labels.csv"]
    spkd(*given).ok()
    settings = json.loads(Path("student/model.json").read_text())["training"]["settings"]
    assert settings["contents"] == {"labels": hashlib.sha256(Path("labels.csv").read_bytes()).hexdigest()}
    assert config.load(TrainConfig, file="student/run.yaml", environ={}).labels == "labels.csv"
    assert json.loads(Path("student/run.json").read_text())["contents"] == settings["contents"]
    assert settings["contents"]["labels"] in Path("student/train.html").read_text()
    assert "is finished already" in spkd(*given).ok().out
    # Other labels are another run.
    write("labels.csv", [(u.id, renamed(n // 2)) for n, u in enumerate(utterances[:9])])
    done = spkd(*given)
    assert (done.code, "content of labels" in done.err) == (2, True), done.err
    assert "note: labels=labels.csv has another content" in spkd("train", "--from", "student", "out=again").ok().out
    # The same of a run that was interrupted, and has no model yet.
    Path("student/model.json").unlink()
    assert "note: labels=labels.csv has another content" in spkd("train", "--from", "student", "out=third").ok().out


@pytest.mark.usefixtures("halves")
def test_the_speakers_of_the_manifest_are_trained_on_all_the_same(
    spkd: Callable, corpus: Path, utterances: list[Utterance]
) -> None:
    write("labels.csv", [(u.id, renamed(n)) for n, u in enumerate(utterances[:9])])
    given = ["train", "loss=aam", *SMALL, "cache=first", "labels=labels.csv"]
    here, others = utterances[:9], utterances[9:]
    lines = [f"{u.id}-again,{u.path},{u.speaker}" for u in here]
    Path("again.csv").write_text("\n".join(["utt,path,speaker", *lines]))
    a, b, c = f"{here[0].id}-again", f"{here[1].id}-again", f"{here[4].id}-again"
    Path("trials.txt").write_text(f"1 {a} {b}\n0 {a} {c}\n")
    done = spkd(*given, "valid.trials=trials.txt", "valid.manifest=again.csv")
    assert (done.code, "of its speakers are trained on" in done.err) == (2, True), done.err
    spkd(*given).ok()
    done = spkd("eval", "trials.txt", "manifest=again.csv", "bootstrap=0").ok()
    assert "The student was trained on 2 of the 2 speakers of trials.txt (spk0, spk1)" in done.out
    Path("trials.txt").write_text(f"1 {others[0].id} {others[1].id}\n0 {others[0].id} {others[4].id}\n")
    done = spkd("eval", "trials.txt", f"manifest={corpus / 'manifest.csv'}", "bootstrap=0", "out=e2").ok()
    assert "was trained on" not in done.out


@pytest.mark.usefixtures("halves")
@pytest.mark.parametrize(
    ("text", "given", "code", "message"),
    [
        (None, [], 2, "labels=labels.csv: no such file; `spkd cache cluster CACHE --out labels.csv` makes one"),
        ("FOLDER", [], 2, "labels=labels.csv: a folder; name a file with the columns utt,speaker"),
        ("", [], 1, "labels.csv:1: expected the columns utt,speaker"),
        ("a,b\nc,d\n", [], 1, "labels.csv:1: expected the columns utt,speaker"),
        ("utt,speaker\n", [], 2, "labels=labels.csv: holds no labels"),
        ("utt,speaker\nx,y\n", [], 2, "labels=labels.csv: names no utterance of first (it has 'x')"),
        ("utt,speaker\nFIRST,y,z\n", [], 1, "labels.csv:2: expected 2 columns"),
        ("utt,speaker\n,y\n", [], 1, "labels.csv:2: expected an id"),
        ("utt,speaker\nFIRST,y\nFIRST,y\n", [], 1, "labels.csv:3: 'FIRST' has a label already"),
        ('utt,speaker\n"FIRST,y\n', [], 1, "labels.csv:2: not a table"),
        ("utt,speaker\nFIRST,y\n", ["loss=nontarget"], 1, "labels=labels.csv has none for some utterances"),
        ("utt,speaker\nFIRST,y\n", ["loss=cosine"], 2, "labels=labels.csv has no effect: cosine learns from no labels"),
        ("utt,speaker\nFIRST,<unk>\n", [], 2, "labels=labels.csv: holds no labels"),
    ],
)
def test_a_file_of_no_use_is_refused(
    spkd: Callable, utterances: list[Utterance], text: str | None, given: list[str], code: int, message: str
) -> None:
    message = message.replace("FIRST", utterances[0].id)
    if text == "FOLDER":
        Path("labels.csv").mkdir()
    elif text is not None:
        Path("labels.csv").write_text(text.replace("FIRST", utterances[0].id))
    done = spkd("train", *(given or ["loss=aam"]), *SMALL, "cache=first", "labels=labels.csv")
    assert (done.code, message in done.err, len(done.err.splitlines())) == (code, True, 1), done.err
    assert not Path("student").exists()


@pytest.mark.usefixtures("halves")
def test_a_manifest_serves_as_labels(spkd: Callable, utterances: list[Utterance]) -> None:
    """With its other columns, and accents in another form."""
    rows = [(u.id, u.path, who) for u, who in zip(utterances[:9], ["Ren\u00e9", "Rene\u0301", "Ada"] * 3, strict=True)]
    write("m.csv", rows, ("utt", "path", "speaker"))  # type: ignore[arg-type]
    done = spkd("train", "loss=aam", *SMALL, "cache=first", "labels=m.csv").ok()
    assert "note: m.csv: columns not used: 'path'" in done.out
    assert sorted(load_student("student").classes) == ["Ada", "Ada@0.90", "Ren\u00e9", "Ren\u00e9@0.90"]


@pytest.mark.usefixtures("halves")
def test_drawn_pseudo_speakers_are_noted(spkd: Callable, utterances: list[Utterance]) -> None:
    given = ["extract", "teacher=checkpoint", "teacher.weights=teacher", "manifest=first.csv", "fbank=true"]
    spkd(*given, "cache=drawn", "view=full:2", "view.speeds=[0.9,1.1]").ok()
    write("labels.csv", [(u.id, renamed(n)) for n, u in enumerate(utterances[:9])])
    note = "note: drawn: view.plan=full:2 draws pseudo-speakers for each speaker of the manifest"
    assert note in spkd("train", "loss=aam", *SMALL, "cache=drawn", "labels=labels.csv", "out=a").ok().out
    assert note not in spkd("train", "loss=aam", *SMALL, "cache=drawn", "out=b").ok().out
    assert "draws pseudo-speakers" not in (
        spkd("train", "loss=aam", *SMALL, "cache=first", "labels=labels.csv", "out=c").ok().out
    )


@pytest.mark.slow
def test_the_rounds_of_the_docs_run_as_they_stand(spkd: Callable, utterances: list[Utterance]) -> None:
    """On speech without speakers; another teacher, and sizes from spkd.yaml."""
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text().split("## Labels from nobody")[1]
    commands = [shlex.split(line, comments=True)[1:] for line in text.splitlines() if line.startswith("    spkd ")]
    save_teacher(Path("teacher"), 8)
    Path("manifest.csv").write_text("\n".join(["utt,path", *(f"{u.id},{u.path}" for u in utterances)]))
    Path("spkd.yaml").write_text(
        "device: cpu\ntrain: {steps: 3, batch_size: 6, crop: 0.5, student: {channels: 8, embedding: 6}, loggers: []}\n"
    )
    assert [command[0] for command in commands] == ["extract", "train", *("extract", "cache", "train") * 2]
    for command in commands:
        given = [
            w
            for word in command
            for w in ("teacher=checkpoint teacher.weights=teacher" if word == "teacher=wavlm" else word).split()
        ]
        spkd(*given).ok()
    for number in (1, 2):
        with open(f"labels{number}.csv", newline="") as file:
            names = {row["speaker"] for row in csv.DictReader(file)}
        classes = load_student(f"round{number}").classes
        assert {name.partition("@")[0] for name in classes} == names
        assert len(classes) == 12 * len(names)  # each in all voices of the recipe
        settings = load_student(f"round{number}").training.settings
        assert list(settings["losses"]) == ["contrastive", "ntxent", "aam"]
        assert settings["labels"] == f"labels{number}.csv"
    # What was trained before is not given: the recipe's own name of the file is missing here.
    done = spkd("train", "--recipe", "pseudo-label-mini", "out=round3")
    assert (done.code, "labels=labels.csv: no such file" in done.err) == (2, True), done.err
