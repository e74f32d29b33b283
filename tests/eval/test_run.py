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
    done = spkd("eval", corpus / "trials.txt", f"manifest={corpus / 'manifest.csv'}")
    assert done.code == 0, done.err
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


@pytest.mark.usefixtures("student")
def test_the_batch_size_changes_no_score(spkd: Callable, corpus: Path) -> None:
    for size in (1, 7):
        assert (
            spkd(
                "eval",
                corpus / "trials.txt",
                f"manifest={corpus / 'manifest.csv'}",
                f"batch_size={size}",
                f"out=e{size}",
            ).code
            == 0
        )
    one, seven = (np.loadtxt(f"e{size}/scores.txt", usecols=2) for size in (1, 7))
    assert np.abs(one - seven).max() < 1e-4


def test_any_teacher_can_be_scored(spkd: Callable, corpus: Path, tiny_wavlm: Path) -> None:
    done = spkd(
        "eval",
        corpus / "trials.txt",
        f"manifest={corpus / 'manifest.csv'}",
        "model=wavlm",
        f"model.weights={tiny_wavlm}",
        "model.wavlm.layer=1",
    )
    assert done.code == 0, done.err
    assert json.loads(Path("eval/report.json").read_text())["models"][0]["embedding"].endswith("layer 1")


@pytest.mark.usefixtures("student")
def test_an_unlabelled_list_gives_scores_only(spkd: Callable, corpus: Path) -> None:
    names = [u.id for u in Manifest.load(corpus / "manifest.csv")][:4]
    Path("t.txt").write_text("".join(f"{a} {b}\n" for a, b in itertools.combinations(names, 2)))
    done = spkd("eval", "t.txt", f"manifest={corpus / 'manifest.csv'}")
    assert done.code == 0, done.err
    assert "EER" not in done.out
    assert len(Path("eval/scores.txt").read_text().splitlines()) == 6


@pytest.mark.usefixtures("student")
def test_trials_with_bad_audio_are_left_out_and_listed(spkd: Callable, corpus: Path) -> None:
    good = Manifest.load(corpus / "manifest.csv").utterances
    Manifest((*good, Utterance("gone", "/none.wav", "spk0", 1.0))).save("m.csv")
    Path("t.txt").write_text((corpus / "trials.txt").read_text() + f"1 gone {good[0].id}\n")
    done = spkd("eval", "t.txt", "manifest=m.csv")
    assert done.code == 0
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
    done = spkd("eval", "t.txt", f"manifest={corpus / 'manifest.csv'}")
    assert done.code == 0, done.err
    assert done.out.startswith("note: t.txt holds only target trials")
    assert len(Path("eval/scores.txt").read_text().splitlines()) == 1
    assert json.loads(Path("eval/report.json").read_text())["results"] == {}


@pytest.mark.usefixtures("student")
def test_trials_with_a_folder_in_front_are_matched(spkd: Callable, corpus: Path) -> None:
    lines = [line.split() for line in (corpus / "trials.txt").read_text().splitlines()]
    Path("t.txt").write_text("".join(f"{x} wav/{a} wav/{b}\n" for x, a, b in lines))
    done = spkd("eval", "t.txt", f"manifest={corpus / 'manifest.csv'}")
    assert done.code == 0, done.err
    assert "are matched with the manifest's without the folder `wav/`" in done.out


@pytest.mark.usefixtures("student")
def test_scores_of_another_system_give_the_same_numbers(spkd: Callable, corpus: Path) -> None:
    audio = f"manifest={corpus / 'manifest.csv'}"
    assert spkd("eval", corpus / "trials.txt", audio, "out=ours", "bootstrap=30").code == 0
    ours = json.loads(Path("ours/report.json").read_text())
    for given in (["--scores", "ours/scores.txt"], [corpus / "trials.txt", "--scores", "ours/scores.txt", audio]):
        done = spkd("eval", *given, "out=theirs", "bootstrap=30")
        assert done.code == 0, done.err
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
    done = spkd("eval", corpus / "trials.txt", *given)
    assert done.code == 0, done.err
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
def test_trials_come_from_standard_input(spkd: Callable, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = gzip.compress((corpus / "trials.txt").read_bytes())
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(text)))
    done = spkd("eval", "-", f"manifest={corpus / 'manifest.csv'}", "bootstrap=0")
    assert done.code == 0, done.err
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
    done = spkd(command, "--scores", "s.txt", *more)
    assert done.code == 0, done.err
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
    assert spkd("extract", "teacher=checkpoint", "teacher.weights=student", "manifest=train.csv", "cache=c").code == 0
    loss = "aam" if labelled else "contrastive"
    assert spkd("train", "--loss", loss, "cache=c", "out=a", "manifest=train.csv", *small).code == 0
    models = ["a"]
    if labelled:  # and one that began as the first, trained on others
        assert spkd("extract", "teacher=none", "manifest=others.csv", "cache=d").code == 0
        assert spkd("train", "--loss", "aam", "cache=d", "out=b", "student.init=a", *small).code == 0
        models.append("b")
    pairs = list(itertools.combinations([u.id for u in every[:9]], 2))
    Path("t.txt").write_text("".join(f"{int(a[:4] == b[:4])} {a} {b}\n" for a, b in pairs))
    word = "3 of the 3 speakers of t.txt (spk0, spk1, spk2)" if labelled else "9 of the 9 utterances of t.txt"
    for model in models:
        done = spkd("eval", "t.txt", "manifest=test.csv", f"model={model}", "bootstrap=0")
        assert done.code == 0, done.err
        assert f"note: The student was trained on {word}" in done.out
        assert word in json.loads(Path("eval/report.json").read_text())["notes"][0]
        assert word in Path("eval/report.html").read_text()
    Manifest(tuple(replace(u, speaker=None) for u in every)).save("nameless.csv")
    done = spkd("eval", "t.txt", "manifest=nameless.csv", "model=a", "bootstrap=0")
    assert "note: The student was trained on 9 of the 9 utterances of t.txt" in done.out
    description = Path("a/model.json").read_text()
    assert "spk0/u0" not in description
    if not labelled:
        return
    names = [u.id for u in every[9:]]
    Path("t.txt").write_text("".join(f"{int(a[:4] == b[:4])} {a} {b}\n" for a, b in itertools.combinations(names, 2)))
    assert "trained on" not in spkd("eval", "t.txt", "manifest=test.csv", "model=a", "bootstrap=0").out
    done = spkd("calibrate", "t.txt", "manifest=test.csv", "model=b", "force=true")
    assert "note: The student was trained on 3 of the 3 speakers of t.txt" in done.out


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
        done = spkd("eval", "--scores", "s.txt", "bootstrap=5")
        assert done.code == 0, done.err
        assert np.isfinite(list(json.loads(Path("eval/report.json").read_text())["results"].values())).all()
        assert Path("eval/report.html").read_text().count("<svg") == 2


@pytest.mark.parametrize(("target", "is_noted"), [(2.5, True), (0.5, False)])
def test_intervals_that_rest_on_few_errors_are_noted(spkd: Callable, target: float, is_noted: bool) -> None:
    """30 speakers of two utterances, as of whose intervals too few hold the true value."""
    random = np.random.RandomState(0)
    lines = [f"s{i}a s{i}b {target + random.randn():.4f} target\n" for i in range(30)]
    lines += [f"s{i}a s{j}b {random.randn() - 1:.4f} nontarget\n" for i in range(30) for j in range(30) if i != j]
    Path("s.txt").write_text("".join(lines))
    done = spkd("eval", "--scores", "s.txt", "bootstrap=50")
    assert done.code == 0, done.err
    note = "The intervals are too narrow: they rest on "
    assert (f"note: {note}" in done.out) == is_noted
    assert (note in Path("eval/report.html").read_text()) == is_noted
    assert any(note in kept for kept in json.loads(Path("eval/report.json").read_text())["notes"]) == is_noted
