"""`spkd eval` through the real command line."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from spkd.corpus.manifest import Manifest, Utterance
from spkd.outputs.features import fbank
from spkd.students import load_student
from tests.eval.students import save_untrained


@pytest.fixture
def student(tmp_path: Path, corpus: Path) -> Path:
    return save_untrained(tmp_path / "student", corpus)


@pytest.mark.usefixtures("student")
def test_scores_are_cosines_of_whole_utterances(spkd: Callable, corpus: Path) -> None:
    done = spkd("eval", corpus / "trials.txt", f"manifest={corpus / 'manifest.csv'}").ok()
    network = load_student("student").network
    embeddings = {}
    for u in Manifest.load(corpus / "manifest.csv"):
        wave = torch.from_numpy(soundfile.read(u.path, dtype="float32")[0])
        with torch.no_grad():
            e = network(fbank(wave[None]))["embedding"][0].double().numpy()
        embeddings[u.id] = e / np.linalg.norm(e)
    trials = [line.split() for line in (corpus / "trials.txt").read_text().splitlines()]
    scores = [line.split() for line in Path("eval/scores.txt").read_text().splitlines()]
    assert len(scores) == len(trials)
    for (label, a, b), (x, y, score, word) in zip(trials, scores, strict=True):
        assert (a, b) == (x, y)
        assert word == ("target" if label == "1" else "nontarget")
        assert abs(float(score) - embeddings[a] @ embeddings[b]) < 1e-4
    report = json.loads(Path("eval/report.json").read_text())
    assert report["trials"]["scored"] == 153
    assert report["trials"]["targets"] == 18
    assert f"EER {report['results']['eer_percent']:.3f} %" in done.out
    page = Path("eval/report.html").read_text()
    assert page.count("<svg") == 2
    assert "http" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )


def test_another_evaluation_is_not_overwritten_in_silence(spkd: Callable, corpus: Path, student: Path) -> None:
    command = ["eval", corpus / "trials.txt", f"manifest={corpus / 'manifest.csv'}", "bootstrap=0"]
    done = spkd(*command, "bootstrap=100")
    limits = json.loads(Path("eval/report.json").read_text())["intervals"]["eer_percent"]
    assert f" % (95 % interval {limits[0]:.3f} to {limits[1]:.3f})" in done.out
    # Another model is refused before the work; the same one, under any spelling of its folder, is not.
    save_untrained(Path("other"), corpus, seed=1)
    kept = Path("eval/report.json").read_bytes()
    done = spkd(*command, "model=other")
    assert (done.code, done.err) == (
        2,
        "error: eval: holds the evaluation of student, not of other; choose another folder (out=FOLDER)\n",
    )
    assert spkd("eval", "--scores", "eval/scores.txt").code == 2
    assert Path("eval/report.json").read_bytes() == kept
    done = spkd(*command, "model=./student/")
    assert (done.code, "is replaced" in done.out) == (0, False), done.err
    # Other weights and other trials are noted.
    save_untrained(student, corpus, seed=2)
    assert "note: eval: the evaluation of other weights is replaced\n" in spkd(*command).out
    Path("some.txt").write_text("".join((corpus / "trials.txt").read_text().splitlines(keepends=True)[:99]))
    done = spkd("eval", "some.txt", *command[2:])
    assert f"note: eval: the evaluation on {corpus / 'trials.txt'} is replaced\n" in done.out


@pytest.mark.usefixtures("student")
def test_the_batch_size_changes_no_score(spkd: Callable, corpus: Path) -> None:
    for size in (1, 7):
        spkd(
            "eval",
            corpus / "trials.txt",
            f"manifest={corpus / 'manifest.csv'}",
            f"batch_size={size}",
            f"out=e{size}",
        ).ok()
    one, seven = (np.loadtxt(f"e{size}/scores.txt", usecols=2) for size in (1, 7))
    assert np.abs(one - seven).max() < 1e-4


def test_any_teacher_can_be_scored(spkd: Callable, corpus: Path, tiny_wavlm: Path) -> None:
    spkd(
        "eval",
        corpus / "trials.txt",
        f"manifest={corpus / 'manifest.csv'}",
        "model=wavlm",
        f"model.weights={tiny_wavlm}",
        "model.wavlm.layer=1",
    ).ok()
    assert json.loads(Path("eval/report.json").read_text())["models"][0]["embedding"].endswith("layer 1")


@pytest.mark.usefixtures("student")
def test_an_unlabelled_list_gives_scores_only(spkd: Callable, corpus: Path) -> None:
    names = [u.id for u in Manifest.load(corpus / "manifest.csv")][:4]
    Path("t.txt").write_text("".join(f"{a} {b}\n" for a, b in itertools.combinations(names, 2)))
    done = spkd("eval", "t.txt", f"manifest={corpus / 'manifest.csv'}").ok()
    assert "EER" not in done.out
    assert len(Path("eval/scores.txt").read_text().splitlines()) == 6


@pytest.mark.usefixtures("student")
def test_trials_with_bad_audio_are_left_out_and_listed(spkd: Callable, corpus: Path) -> None:
    good = Manifest.load(corpus / "manifest.csv").utterances
    Manifest((*good, Utterance("gone", "/none.wav", "spk0", 1.0))).save("m.csv")
    Path("t.txt").write_text((corpus / "trials.txt").read_text() + f"1 gone {good[0].id}\n")
    done = spkd("eval", "t.txt", "manifest=m.csv").ok()
    assert "rejected gone: no such file" in done.err
    report = json.loads(Path("eval/report.json").read_text())
    assert (report["trials"]["scored"], report["trials"]["left_out"], report["rejected"]) == (
        153,
        1,
        {"gone": "no such file"},
    )
    assert "no such file" in Path("eval/report.html").read_text()
    assert spkd("eval", "t.txt", "manifest=m.csv", "--strict").code == 1


@pytest.mark.usefixtures("student")
@pytest.mark.parametrize(
    ("trials", "extra", "expected"),
    [
        ("1 spk0/u0.flac nobody\n", [], "trials.txt:1: utterance 'nobody' is not in"),
        ("1 spk0/u0.falc spk0/u1.falc\n", [], "(2 such of 2); the manifest is of other recordings, or has other ids"),
        ("1 spk0/u0.flac spk0/u1.flac\n0 a\n", [], "trials.txt:2: '0 a' is not `1 enrolment test`"),
        ("1 spk0/u0.flac spk0/u1.flac\n", ["model=nowhere"], "no spkd checkpoint"),
        ("1 spk0/u0.flac spk0/u1.flac\n", ["out=trials.txt/x"], "cannot be written"),
        ("1 spk0/u0.flac spk0/u1.flac\n", ["min_seconds=60"], "none of its 2 utterances can be used"),
    ],
)
def test_one_line_errors(spkd: Callable, corpus: Path, trials: str, extra: list[str], expected: str) -> None:
    Path("trials.txt").write_text(trials)
    done = spkd("eval", "trials.txt", f"manifest={corpus / 'manifest.csv'}", *extra)
    assert done.code in (1, 2)
    assert expected in done.err
    assert len(done.err.splitlines()) == 1


@pytest.mark.usefixtures("student")
def test_a_list_of_one_class_gives_scores_and_says_so_before_the_work(spkd: Callable, corpus: Path) -> None:
    Path("t.txt").write_text("1 spk0/u0.flac spk0/u1.flac\n")
    done = spkd("eval", "t.txt", f"manifest={corpus / 'manifest.csv'}").ok()
    assert done.out.startswith("note: t.txt holds only target trials")
    assert len(Path("eval/scores.txt").read_text().splitlines()) == 1
    assert json.loads(Path("eval/report.json").read_text())["results"] == {}


@pytest.mark.usefixtures("student")
def test_trials_with_a_folder_in_front_are_matched(spkd: Callable, corpus: Path) -> None:
    lines = [line.split() for line in (corpus / "trials.txt").read_text().splitlines()]
    Path("t.txt").write_text("".join(f"{x} wav/{a} wav/{b}\n" for x, a, b in lines))
    done = spkd("eval", "t.txt", f"manifest={corpus / 'manifest.csv'}").ok()
    assert "are matched with the manifest's without the folder `wav/`" in done.out


@pytest.mark.usefixtures("student")
def test_scores_of_another_system_give_the_same_numbers(spkd: Callable, corpus: Path) -> None:
    audio = f"manifest={corpus / 'manifest.csv'}"
    spkd("eval", corpus / "trials.txt", audio, "out=ours", "bootstrap=30").ok()
    ours = json.loads(Path("ours/report.json").read_text())
    for given in (["--scores", "ours/scores.txt"], [corpus / "trials.txt", "--scores", "ours/scores.txt", audio]):
        spkd("eval", *given, "out=theirs", "bootstrap=30").ok()
        theirs = json.loads(Path("theirs/report.json").read_text())
        for key, value in ours["results"].items():
            assert theirs["results"][key] == pytest.approx(value, abs=2e-6)
        assert theirs["intervals"]["eer_percent"] == pytest.approx(ours["intervals"]["eer_percent"], abs=1e-6)
        assert theirs["models"] == []
    Path("manifest.csv").write_text("utt,path,speaker\nother,other.wav,x\n")  # of something else, by chance
    Path("other.wav").write_bytes((corpus / "audio/spk0/u2.wav").read_bytes())
    done = spkd("eval", "out=theirs", "--scores", "ours/scores.txt", "llr=true")
    assert "manifest.csv lacks utterances of ours/scores.txt: it is not used" in done.out
    assert "cllr" in json.loads(Path("theirs/report.json").read_text())["results"]


@pytest.mark.usefixtures("student")
def test_results_are_broken_down_and_the_worst_trials_can_be_played(spkd: Callable, corpus: Path) -> None:
    rows = ["utt,path,speaker,duration,gender"]
    rows += [
        f"{u.id},{u.path},{u.speaker},{u.duration},{'fm'[int(u.speaker[-1]) % 2]}"
        for u in Manifest.load(corpus / "manifest.csv")
    ]
    Path("m.csv").write_text("\n".join(rows))
    given = ["manifest=m.csv", "by=[gender,duration]", "worst=3", "audio=true", "bootstrap=0"]
    spkd("eval", corpus / "trials.txt", *given).ok()
    report = json.loads(Path("eval/report.json").read_text())
    assert [(g["name"], g["targets"]) for g in report["breakdown"]["gender"]] == [("f", 9), ("f / m", 0), ("m", 9)]
    assert sum(g["targets"] + g["non_targets"] for g in report["breakdown"]["duration"]) == 153
    scores = [line.split() for line in Path("eval/scores.txt").read_text().splitlines()]
    lowest = sorted((float(s), a, b) for a, b, s, word in scores if word == "target")[:3]
    assert [(w["enrolment"], w["test"]) for w in report["worst"]["targets"]] == [(a, b) for _, a, b in lowest]
    page = Path("eval/report.html").read_text()
    assert page.count("<audio") == 12
    assert "data:audio/flac;base64,ZkxhQ" in page
    assert report["intervals"] == {}


@pytest.mark.usefixtures("student")
@pytest.mark.parametrize("labels", ["", "1 "])
def test_settings_of_error_rates_are_refused_without_labels_of_both_kinds(
    spkd: Callable, corpus: Path, labels: str
) -> None:
    Path("t.txt").write_text(f"{labels}spk0/u0.flac spk0/u1.flac\n")
    Path("scores.txt").write_text("spk0/u0.flac spk0/u1.flac 0.5" + " target" * bool(labels) + "\n")
    audio = f"manifest={corpus / 'manifest.csv'}"
    reason = "the list has trials of one kind alone" if labels else "the list has no labels"
    for given in ("bootstrap=5", "worst=3", "points=[0.1]", "false_accept=[0.1]", "by=[speaker]", "audio=true"):
        for source in (("t.txt",), ("--scores", "scores.txt")):
            done = spkd("eval", *source, audio, given)
            assert (done.code, f"{given} has no effect: {reason}" in done.err) == (2, True), done.err
    Path("spkd.yaml").write_text("eval: {worst: 3}\n")
    done = spkd("eval", "t.txt", audio)
    assert (done.code, f"left out worst: {reason}" in done.out) == (0, True), done.err


@pytest.mark.usefixtures("student")
def test_trials_come_from_standard_input(spkd: Callable, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = gzip.compress((corpus / "trials.txt").read_bytes())
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(text)))
    spkd("eval", "-", f"manifest={corpus / 'manifest.csv'}", "bootstrap=0").ok()
    trials = json.loads(Path("eval/report.json").read_text())["trials"]
    assert (trials["file"], trials["scored"]) == ("standard input", 153)


@pytest.mark.parametrize("command", ["eval", "calibrate"])
@pytest.mark.parametrize(
    "given",
    [
        *("model=x", "model.precision=fp16", "enrol.model=x", "norm=as-norm", "cohort=c", "cohort.top=20"),
        *("backend=plda", "subtract_mean=true", "device=cpu", "batch_size=2", "workers=3", "min_seconds=1"),
        *("format=plain", "enrol.map=map", "by=[gender]", "audio=true"),
    ],
)
def test_settings_without_effect_on_scores_of_files_are_refused(spkd: Callable, command: str, given: str) -> None:
    """Typed, they are an error; in a settings file, which several runs share, they are left out with a note."""
    key, _, value = given.partition("=")
    if command == "calibrate" and key in ("by", "audio"):
        return
    Path("s.txt").write_text("a b 0.5 target\na c 0.7 target\nb d 0.1 nontarget\nc d 0.6 nontarget\n")
    more = [] if command == "eval" else ["force=true", "out=cal.json"]
    done = spkd(command, "--scores", "s.txt", *more, given)
    assert (done.code, f"{given} has no effect: " in done.err, len(done.err.splitlines())) == (2, True, 1)
    Path("spkd.yaml").write_text(f"{command}: {{{key}: {value}}}\n")
    done = spkd(command, "--scores", "s.txt", *more).ok()
    assert f"note: spkd.yaml: left out {key}" in done.out + done.err


def test_a_manifest_that_is_named_must_exist(spkd: Callable) -> None:
    Path("s.txt").write_text("a b 0.5 target\na c 0.7 nontarget\n")
    done = spkd("eval", "--scores", "s.txt", "manifest=manifest.csv")
    assert (done.code, "no manifest manifest.csv" in done.err) == (2, True)


@pytest.mark.usefixtures("student")
def test_a_calibration_of_score_files_does_not_go_into_a_students_folder(spkd: Callable) -> None:
    Path("s.txt").write_text("a b 0.5 target\na c 0.7 nontarget\n")
    done = spkd("calibrate", "--scores", "s.txt", "force=true")
    assert (done.code, "name the file to write (out=FILE)" in done.err) == (2, True)


def test_an_output_folder_that_holds_something_else_is_refused(spkd: Callable, corpus: Path, student: Path) -> None:
    """A student, an evaluation, a comparison and an extraction, each into the folders of the others."""
    audio = f"manifest={corpus / 'manifest.csv'}"
    spkd("extract", "teacher=none", audio, "cache=cache").ok()
    spkd("eval", corpus / "trials.txt", audio, "out=evaluation", "bootstrap=0").ok()
    spkd("report", "evaluation", "--out", "comparison").ok()
    small = ["--loss", "aam", "student=tiny", "student.channels=8", "steps=1", "batch_size=4", "crop=0.5"]
    commands = {
        "student": ["train", "cache=cache", *small, "out="],
        "evaluation": ["eval", corpus / "trials.txt", audio, "bootstrap=0", "out="],
        "cache": ["extract", "teacher=none", audio, "cache="],
        "comparison": ["report", "evaluation", "--out="],
    }
    held = {"cache": "a teacher cache", "student": "a student", "evaluation": "an evaluation"}
    for own, (*command, option) in commands.items():
        for folder, what in held.items():
            if folder == own:
                continue
            before = {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}
            done = spkd(*command, f"{option}{folder}")
            expected = "holds no teacher cache" if own == "cache" else f"{folder}: holds {what} ("
            assert (done.code, expected in done.err, len(done.err.splitlines())) == (2, True, 1), done.err
            assert {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()} == before
    done = spkd("cache", "export", "cache", "student")
    assert (done.code, "student: holds a student (model.json)" in done.err) == (2, True)


@pytest.mark.usefixtures("student")
def test_nothing_is_written_where_no_utterance_can_be_embedded(spkd: Callable) -> None:
    Path("m.csv").write_text("utt,path\na,gone.wav\nb,gone.wav\n")
    done = spkd("embed", "m.csv", "out=e.npy")
    assert (done.code, done.err) == (1, "error: m.csv: none of 2 utterances can be used; a: no such file\n")
    assert not Path("e.npy").exists()


@pytest.mark.parametrize("command", ["eval", "calibrate", "embed"])
@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["model=studnet"], "studnet: no spkd checkpoint"),
        (["enrol.model=studnet"], "studnet: no spkd checkpoint"),
        (["model=student/m.onnx"], "m.onnx: an ONNX model; write model=onnx model.weights=student/m.onnx"),
        (["--scores", "gone.txt"], "no score file gone.txt"),
    ],
)
def test_a_missing_input_is_told_before_the_output(
    spkd: Callable, student: Path, command: str, typed: list[str], expected: str
) -> None:
    if command == "embed" and not typed[0].startswith("model="):
        return
    (student / "m.onnx").touch()
    Path("t.txt").write_text("1 a b\n")
    done = spkd(command, "t.txt", *typed, "out=t.txt/x.npy")
    assert (done.code, expected in done.err, len(done.err.splitlines())) == (2, True, 1), done.err


def test_neither_trials_nor_scores_is_a_line(spkd: Callable) -> None:
    done = spkd("eval", "model=x")
    assert (done.code, "name a trial list, or score files with --scores" in done.err) == (2, True)


@pytest.mark.usefixtures("student")
@pytest.mark.parametrize("labelled", [True, False])
def test_a_student_that_was_trained_on_what_is_tested_is_noted(spkd: Callable, corpus: Path, labelled: bool) -> None:
    """By speakers, or by utterances where training had no labels; in print, JSON and HTML; students of it as well."""
    every = Manifest.load(corpus / "manifest.csv").utterances
    trained = every[:9] if labelled else tuple(replace(u, speaker=None) for u in every[:9])
    for name, some in (("train", trained), ("test", every), ("others", every[9:])):
        Manifest(some).save(f"{name}.csv")
    small = ["student=tiny", "student.channels=8", "student.embedding=8", "steps=2", "batch_size=4", "crop=0.5"]
    spkd("extract", "teacher=checkpoint", "teacher.weights=student", "manifest=train.csv", "cache=c").ok()
    loss = "aam" if labelled else "contrastive"
    spkd("train", "--loss", loss, "cache=c", "out=a", "manifest=train.csv", *small).ok()
    models = ["a"]
    if labelled:  # and one that began as the first, trained on others
        spkd("extract", "teacher=none", "manifest=others.csv", "cache=d").ok()
        spkd("train", "--loss", "aam", "cache=d", "out=b", "student.init=a", *small).ok()
        models.append("b")
    pairs = list(itertools.combinations([u.id for u in every[:9]], 2))
    Path("t.txt").write_text("".join(f"{int(a[:4] == b[:4])} {a} {b}\n" for a, b in pairs))
    word = "3 of the 3 speakers of t.txt (spk0, spk1, spk2)" if labelled else "9 of the 9 utterances of t.txt"
    for model in models:
        done = spkd("eval", "t.txt", "manifest=test.csv", f"model={model}", "bootstrap=0", f"out={model}/eval").ok()
        assert f"note: The student was trained on {word}" in done.out
        assert word in json.loads(Path(f"{model}/eval/report.json").read_text())["notes"][0]
        assert word in Path(f"{model}/eval/report.html").read_text()
    Manifest(tuple(replace(u, speaker=None) for u in every)).save("nameless.csv")
    done = spkd("eval", "t.txt", "manifest=nameless.csv", "model=a", "bootstrap=0")
    assert "note: The student was trained on 9 of the 9 utterances of t.txt" in done.out
    description = Path("a/model.json").read_text()
    assert "spk0/u0" not in description
    if not labelled:
        return
    # One whose teacher the first was; training on other speakers, it may be validated on those, with a note.
    spkd("extract", "teacher=checkpoint", "teacher.weights=a", "manifest=others.csv", "cache=e", "fbank=true").ok()
    valid = ["valid.trials=t.txt", "valid.manifest=test.csv"]
    done = spkd("train", "--loss", "cosine", "cache=e", "out=c2", *valid, *small).ok()
    assert "note: valid.trials: a teacher was trained on 3 of its speakers (spk0, spk1, spk2)" in done.out
    for model in ("c2", "c2/best"):
        done = spkd("eval", "t.txt", "manifest=test.csv", f"model={model}", "bootstrap=0", f"out={model}/eval").ok()
        assert f"note: A teacher of the student was trained on {word}" in done.out
    names = [u.id for u in every[9:]]
    Path("t.txt").write_text("".join(f"{int(a[:4] == b[:4])} {a} {b}\n" for a, b in itertools.combinations(names, 2)))
    assert "trained on" not in spkd("eval", "t.txt", "manifest=test.csv", "model=a", "bootstrap=0").out
    done = spkd("calibrate", "t.txt", "manifest=test.csv", "model=b", "force=true")
    assert "note: The student was trained on 3 of the 3 speakers of t.txt" in done.out


@pytest.mark.usefixtures("student")
@pytest.mark.parametrize(
    "command",
    [
        ["eval", "t.txt", "manifest=none.csv"],
        ["calibrate", "t.txt", "manifest=none.csv"],
        ["embed", "none.csv"],
    ],
)
@pytest.mark.parametrize("place", ["t.txt/x", "/proc/nope/x"])
def test_an_output_that_cannot_be_written_is_found_before_the_work(
    spkd: Callable, command: list[str], place: str
) -> None:
    """Even before the manifest, which is not there, is looked at."""
    Path("t.txt").write_text("1 a b\n")
    out = f"{place}.npy" if command[0] == "embed" else place
    done = spkd(*command, f"out={out}")
    assert (done.code, f"{out}" in done.err, "cannot be written" in done.err) == (1, True, True)


def test_scores_near_the_largest_double_are_drawn(spkd: Callable) -> None:
    largest = float(np.finfo(np.float64).max)
    for high, low in ((1e308, -1e308), (largest, -largest), (largest, largest), (5e-324, 0.0)):
        lines = [f"a{i} b{i} {high if i % 2 else low!r} {i % 2}\n" for i in range(6)]
        Path("s.txt").write_text("".join(lines))
        spkd("eval", "--scores", "s.txt", "bootstrap=5").ok()
        assert np.isfinite(list(json.loads(Path("eval/report.json").read_text())["results"].values())).all()
        assert Path("eval/report.html").read_text().count("<svg") == 2


def test_thresholds_that_a_list_does_not_tell_are_left_out(spkd: Callable) -> None:
    """The threshold at 10 % is the tenth highest of 100 non-target scores; that at 1 % would be the highest, which in
    one list of ten a fraction of 2.3 % of other scores exceeds: (1 - 0.023)^100 = 0.1."""
    scores = np.random.RandomState(0).randn(200) + 2 * (np.arange(200) % 2)
    Path("s.txt").write_text("".join(f"a{i} b{i} {score!r} {i % 2}\n" for i, score in enumerate(scores.tolist())))
    for given, is_typed in (([], False), (["false_accept=[0.1,0.01]"], True)):
        done = spkd("eval", "--scores", "s.txt", "bootstrap=0", *given).ok()
        report = json.loads(Path("eval/report.json").read_text())
        note = "No threshold is given at a false-alarm rate of 1 %"
        assert (note in done.out) == is_typed
        assert any(text.startswith(note) for text in report["how"])
        assert "miss_percent_at_fa_0.01" in report["results"]
        assert "threshold_at_fa_0.01" not in report["results"]
    assert report["results"]["threshold_at_fa_0.1"] == pytest.approx(np.sort(scores[::2])[-10])


@pytest.mark.parametrize(("target", "is_noted"), [(2.5, True), (0.5, False)])
def test_intervals_that_rest_on_few_errors_are_noted(spkd: Callable, target: float, is_noted: bool) -> None:
    """30 speakers of two utterances, as of whose intervals too few hold the true value."""
    random = np.random.RandomState(0)
    lines = [f"s{i}a s{i}b {target + random.randn():.4f} target\n" for i in range(30)]
    lines += [f"s{i}a s{j}b {random.randn() - 1:.4f} nontarget\n" for i in range(30) for j in range(30) if i != j]
    Path("s.txt").write_text("".join(lines))
    done = spkd("eval", "--scores", "s.txt", "bootstrap=50").ok()
    note = "The intervals are too narrow: they rest on "
    assert (f"note: {note}" in done.out) == is_noted
    assert (note in Path("eval/report.html").read_text()) == is_noted
    assert any(note in kept for kept in json.loads(Path("eval/report.json").read_text())["notes"]) == is_noted
