"""`spkd calibrate`, and what `spkd eval` makes of it."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from spkd.config import load
from spkd.corpus.manifest import Manifest
from spkd.eval.calibration import Calibration
from spkd.eval.score import how_embedded
from spkd.eval.settings import EvalConfig
from tests.eval.students import save_untrained


@pytest.fixture
def lists(corpus: Path, tmp_path: Path) -> None:
    """dev.csv and test.csv of three speakers each, with trials; a student."""
    every = Manifest.load(corpus / "manifest.csv").utterances
    for name, some in (("dev", every[:9]), ("test", every[9:])):
        Manifest(some).save(tmp_path / f"{name}.csv")
        pairs = itertools.combinations(some, 2)
        (tmp_path / f"{name}.txt").write_text(
            "".join(f"{int(a.speaker == b.speaker)} {a.id} {b.id}\n" for a, b in pairs)
        )
    save_untrained(tmp_path / "student", corpus)


def scores_of(folder: str) -> np.ndarray:
    return np.loadtxt(Path(folder, "scores.txt"), usecols=2)


@pytest.mark.usefixtures("lists")
def test_a_students_calibration_stays_with_it_and_is_applied(spkd: Callable) -> None:
    done = spkd("calibrate", "dev.txt", "manifest=dev.csv", "force=true")
    kept = json.loads(Path("student/calibration.json").read_text())["thresholds"]
    shown = ", ".join(f"{name} {value:.4g}" for name, value in kept.items())
    assert done.out.endswith(f"\nthresholds of the log-likelihood ratio: {shown}\n")
    assert done.code == 0, done.err
    assert done.out.startswith("student/calibration.json: score ")
    found = Calibration.load("student/calibration.json")
    assert set(found.trained_on.speakers) == {"spk0", "spk1", "spk2"}
    assert set(found.thresholds) == {"eer", "min_dcf_0.01", "min_dcf_0.05"}  # 27 non-targets: no false-alarm rates
    spkd("eval", "test.txt", "manifest=test.csv", "out=raw").ok()
    done = spkd("eval", "test.txt", "manifest=test.csv", "calibration=student/calibration.json", "out=llr").ok()
    assert np.abs(scores_of("llr") - (found.weights[0] * scores_of("raw") + found.offset)).max() < 1e-3
    report = json.loads(Path("llr/report.json").read_text())
    assert {"cllr", "act_dcf_0.05"} <= set(report["results"])
    for label, key in (("Cllr", "cllr"), ("actDCF(0.01)", "act_dcf_0.01"), ("actDCF(0.05)", "act_dcf_0.05")):
        assert f"   {label} {report['results'][key]:.4f}" in done.out
    assert report["calibration"]["trials"] == "dev.txt"
    assert report["results"]["eer_percent"] == json.loads(Path("raw/report.json").read_text())["results"]["eer_percent"]


@pytest.mark.slow
@pytest.mark.usefixtures("lists")
def test_the_list_of_a_replaced_calibration_is_noted(spkd: Callable) -> None:
    replaced = "the calibration on dev.txt (9 target and 27 non-target trials) is replaced"
    other = "holds another calibration than the student"
    exported = [Path("student/mine.onnx"), Path("student/model.onnx"), Path("student/model.ort")]
    assert "note" not in spkd("calibrate", "dev.txt", "manifest=dev.csv", "force=true").ok().out
    spkd("export", "student").ok()
    spkd("export", "student", "to=ort").ok()
    for suffix in ("", ".json"):
        shutil.copy(f"student/model.onnx{suffix}", f"student/mine.onnx{suffix}")
    about = json.loads(Path("student/model.onnx.json").read_text())
    own = {"calibration": about["calibration"] | {"offset": 1.5}, "calibration_of": "other"}  # as of 8-bit integers
    Path("student/model.int8.onnx").write_bytes(b"")
    Path("student/model.int8.onnx.json").write_text(json.dumps(about | own))
    assert "note" not in spkd("calibrate", "dev.txt", "manifest=dev.csv", "force=true").ok().out
    out = spkd("calibrate", "test.txt", "manifest=test.csv", "force=true").ok().out
    assert out.startswith(f"note: student/calibration.json: {replaced}\n")
    earlier = [f"note: {path}: {other}; export the student again" for path in exported]
    assert [line for line in out.splitlines() if "export" in line] == earlier
    spkd("export", "student").ok()
    spkd("export", "student", "to=ort").ok()
    again = spkd("calibrate", "test.txt", "manifest=test.csv", "force=true").ok().out
    assert [line for line in again.splitlines() if line.startswith("note")] == earlier[:1]
    onnx = ["model=onnx", "model.weights=student/mine.onnx", "manifest=test.csv", "force=true"]
    out = spkd("calibrate", "test.txt", *onnx).ok().out
    assert "note: student/mine.onnx: the calibration on another list (9 target and 27 non-target trials) is" in out


@pytest.mark.usefixtures("lists")
def test_a_missing_student_is_named(spkd: Callable) -> None:
    done = spkd("calibrate", "dev.txt", "manifest=dev.csv", "model=later")
    assert done.code == 2
    assert (
        "later: no spkd checkpoint (model.json, model.safetensors); train one with `spkd train out=later`" in done.err
    )
    Path("later").mkdir()
    Path("later/run.yaml").touch()  # of a run that was killed
    done = spkd("calibrate", "dev.txt", "manifest=dev.csv", "model=later")
    assert (done.code, "its training has not finished: run the same `spkd train` again" in done.err) == (2, True)


@pytest.mark.usefixtures("lists")
def test_the_speakers_that_are_tested_must_not_calibrate(spkd: Callable, corpus: Path) -> None:
    spkd("calibrate", "dev.txt", "manifest=dev.csv", "out=c.json", "force=true").ok()
    done = spkd("eval", "dev.txt", "manifest=dev.csv", "calibration=c.json")
    assert (done.code, "3 of whose speakers are tested here (spk0, spk1, spk2)" in done.err) == (1, True)
    save_untrained(Path("student"), corpus, seed=1)
    done = spkd("eval", "test.txt", "manifest=test.csv", "calibration=c.json")
    assert (done.code, "trained on the scores of another system" in done.err) == (1, True)


@pytest.mark.usefixtures("lists")
def test_speakers_of_a_calibration_without_names_are_not_known(spkd: Callable) -> None:
    spkd("calibrate", "dev.txt", "manifest=dev.csv", "out=c.json", "force=true").ok()
    Calibration.load("c.json").public().save(Path("public.json"))
    Path("other.txt").write_text("".join(Path("dev.txt").read_text().splitlines(True)[1:]))
    Path("unlabelled.txt").write_text("".join(" ".join(line.split()[1:]) + "\n" for line in open("other.txt")))
    for trials in ("other.txt", "unlabelled.txt"):
        done = spkd("eval", trials, "manifest=dev.csv", "calibration=public.json", "out=e").ok()
        report = json.loads(Path("e/report.json").read_text())
        note = f"Whether the calibration was trained on speakers of {trials} is not known"
        for where in (done.out, " ".join(report["notes"])):
            assert where.count(note) == 1
        assert "other speaker" not in " ".join(report["backend"])
        assert "on 36 trials (its list)." in report["backend"][-1]
    done = spkd("eval", "test.txt", "manifest=test.csv", "calibration=c.json", "out=t").ok()
    assert ("is not known" in done.out, "3 other speakers" in Path("t/report.json").read_text()) == (False, True)


@pytest.mark.usefixtures("lists")
def test_what_changes_a_models_scores_makes_another_system(spkd: Callable) -> None:
    assert spkd("calibrate", "dev.txt", "manifest=dev.csv", "out=c.json", "force=true").code == 0
    lower = ["manifest=test.csv", "model.precision=bf16"]
    done = spkd("eval", "test.txt", *lower, "calibration=c.json")
    assert (done.code, "Embeddings are computed with model.precision=bf16." in done.err) == (1, True)
    done = spkd("calibrate", "dev.txt", "manifest=dev.csv", "model.precision=bf16", "force=true")
    assert (done.code, "name the file to write (out=FILE)" in done.err) == (2, True)
    given = ["model.precision=bf16", "out=d.json", "force=true"]
    assert spkd("calibrate", "dev.txt", "manifest=dev.csv", *given).code == 0
    assert spkd("eval", "test.txt", *lower, "calibration=d.json").code == 0


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["model=wavlm", "model.compile=true", "model.weights=x"], ""),
        (["model=wavlm", "model.wavlm.layer=7"], "model.wavlm.layer=7"),
        (["model=s", "enrol.model=onnx", "enrol.model.onnx.input=sherpa"], "enrol.model.onnx.input=sherpa"),
    ],
)
def test_settings_of_a_family_are_part_of_the_system(given: list[str], words: str) -> None:
    how = [sentence for sentence in how_embedded(load(EvalConfig, given, environ={})) if "computed with" in sentence]
    assert how == ([f"Embeddings are computed with {words}."] if words else [])


@pytest.mark.usefixtures("lists")
def test_quality_measures_are_features(spkd: Callable, cohort: Path) -> None:
    names = [u.id for file in ("dev.csv", "test.csv") for u in Manifest.load(file)]
    Path("map").write_text("".join(f"{name} {' '.join(names[i : i + 1 + i % 2])}\n" for i, name in enumerate(names)))
    more = ["norm=as-norm", f"cohort={cohort}", "cohort.top=11", "enrol.map=map"]
    given = ["quality=[duration,magnitude,cohort,enrolments]", "force=true", *more]
    spkd("calibrate", "dev.txt", "manifest=dev.csv", "out=q.json", *given).ok()
    pairs = [f"{name}.{side}" for name in ("duration", "magnitude", "cohort") for side in ("low", "high")]
    assert Calibration.load("q.json").features == ("score", *pairs, "enrolments")
    spkd("eval", "test.txt", "manifest=test.csv", "calibration=q.json", *more).ok()
    assert "quality measures (duration, magnitude, cohort, enrolments)" in Path("eval/report.html").read_text()
    done = spkd("calibrate", "dev.txt", "manifest=dev.csv", "out=q.json", "quality=[enrolments]", "force=true")
    assert (done.code, "without an enrolment map (enrol.map=FILE)" in done.err) == (2, True)
    done = spkd("calibrate", "dev.txt", "manifest=dev.csv", "quality=[duration]")
    assert (done.code, "name the file to write (out=FILE)" in done.err) == (2, True)


@pytest.mark.usefixtures("lists")
def test_a_cohort_is_known_by_its_utterances_wherever_it_is(spkd: Callable, cohort: Path) -> None:
    """Two cohorts of as many speakers have one name in two folders, and one of them another name in a third."""
    others = Manifest.load(cohort)
    halves = [[u for u in others if u.speaker in others.speakers[part]] for part in (slice(0, 10), slice(2, 12))]
    assert len(halves[0]) == len(halves[1])
    for folder, name, some in (("a", "c.csv", halves[0]), ("b", "c.csv", halves[1]), ("moved", "d.csv", halves[0])):
        Path(folder).mkdir()
        Manifest(tuple(some)).save(f"{folder}/{name}")
    given = ["norm=as-norm", "cohort.top=10"]
    spkd("calibrate", "dev.txt", "manifest=dev.csv", *given, "cohort=a/c.csv", "out=cal.json", "force=true").ok()
    test = ["eval", "test.txt", "manifest=test.csv", *given, "calibration=cal.json"]
    for path in ("a/c.csv", "moved/d.csv"):
        spkd(*test, f"cohort={path}").ok()
        assert any(f"is {path}." in text for text in json.loads(Path("eval/report.json").read_text())["how"])
    shutil.copy("b/c.csv", "a/c.csv")
    done = spkd(*test, "cohort=a/c.csv")
    assert (done.code, "trained on the scores of another system (how: AS-norm: " in done.err) == (1, True)


@pytest.mark.usefixtures("lists")
def test_scores_that_spkd_wrote_are_fused_in_the_same_order(spkd: Callable, corpus: Path) -> None:
    save_untrained(Path("other"), corpus, seed=5)
    for model in ("student", "other"):
        for name in ("dev", "test"):
            given = [f"manifest={name}.csv", f"model={model}", "bootstrap=0", f"out={model}.{name}"]
            spkd("eval", f"{name}.txt", *given).ok()
    scores = {name: [f"{model}.{name}/scores.txt" for model in ("student", "other")] for name in ("dev", "test")}
    first, second = scores["test"]
    dev = [word for path in scores["dev"] for word in ("--scores", path)]
    spkd("calibrate", "dev.txt", *dev, "out=f.json", "force=true").ok()
    test = ["eval", "test.txt", "calibration=f.json", "bootstrap=0"]
    spkd(*test, "--scores", first, "--scores", second).ok()
    done = spkd(*test, "--scores", second, "--scores", first)
    assert (done.code, "the report beside score file 1 is of another model" in done.err) == (1, True)
    shutil.copy(first, "copy.txt")  # nobody knows whose scores these are
    spkd(*test, "--scores", "copy.txt", "--scores", second).ok()


@pytest.mark.usefixtures("lists")
def test_what_cannot_be_used_is_counted(spkd: Callable) -> None:
    head, first, *rest = Path("dev.csv").read_text().splitlines()
    gone = first.replace(first.split(",")[1], "gone.wav")
    Path("dev.csv").write_text("\n".join([head, gone, *rest]) + "\n")
    done = spkd("calibrate", "dev.txt", "manifest=dev.csv", "force=true").ok()
    assert "note: dev.txt: 1 utterance cannot be used (spk0/u0.flac: " in done.out
    assert "; trials left out: 8\n" in done.out  # of 36 pairs of nine


@pytest.mark.usefixtures("lists")
def test_systems_are_fused_from_their_scores(spkd: Callable) -> None:
    """The worse of two systems gets the smaller weight, and the fusion is no worse than the better one."""
    random = np.random.RandomState(0)
    for name in ("dev", "test"):
        labels = [line.split() for line in Path(f"{name}.txt").read_text().splitlines()]
        for system, noise in (("good", 0.5), ("poor", 3.0)):
            lines = [f"{a} {b} {int(label) + noise * random.normal()}\n" for label, a, b in labels]
            random.shuffle(lines)
            Path(f"{name}.{system}").write_text("".join(lines))
    given = ["--scores", "dev.good", "--scores", "dev.poor", "quality=[duration]", "out=fusion.json", "force=true"]
    spkd("calibrate", "dev.txt", "manifest=dev.csv", *given).ok()
    fusion = Calibration.load("fusion.json")
    assert fusion.features == ("score.1", "score.2", "duration.low", "duration.high")
    assert fusion.weights[0] > abs(fusion.weights[1])
    both = ["--scores", "test.good", "--scores", "test.poor"]
    spkd("eval", "test.txt", "manifest=test.csv", *both, "calibration=fusion.json").ok()
    assert "several --scores are fused by a calibration" in spkd("eval", "test.txt", *both).err
    done = spkd("eval", "test.txt", "manifest=test.csv", "--scores", "test.good", "calibration=fusion.json")
    assert "trained on the scores of another system (scores: 2; here 1)" in done.err


@pytest.mark.usefixtures("lists")
def test_a_calibration_needs_labels_of_both_kinds(spkd: Callable) -> None:
    Path("t.txt").write_text("spk0/u0.flac spk0/u1.flac\n")
    done = spkd("calibrate", "t.txt", "manifest=dev.csv")
    assert (done.code, "needs labelled trials of both kinds" in done.err) == (1, True)
    Path("t.txt").write_text("1 spk0/u0.flac spk0/u1.flac\n")
    done = spkd("calibrate", "t.txt", "manifest=dev.csv")  # no scores are written
    assert (done.code, done.out) == (1, ""), done.out
    assert done.err == "error: t.txt: a calibration needs labelled trials of both kinds\n"
    assert not Path("student/calibration.json").exists()


@pytest.mark.usefixtures("lists")
def test_few_trials_are_refused_unless_forced(spkd: Callable) -> None:
    done = spkd("calibrate", "dev.txt", "manifest=dev.csv", "out=c.json")
    assert done.code == 1
    assert "dev.txt: 9 target and 27 non-target trials; a calibration takes at least 30 of each kind" in done.err
    assert not Path("c.json").exists()
    spkd("calibrate", "dev.txt", "manifest=dev.csv", "out=c.json", "force=true").ok()
    for counts, code in (((30, 29), 1), ((29, 30), 1), ((30, 30), 0)):
        random = np.random.RandomState(0)
        lines = [
            f"{word}{i} b{i} {random.normal() + (word == 'target'):.4f} {word}\n"
            for word, count in zip(("target", "nontarget"), counts, strict=True)
            for i in range(count)
        ]
        Path("s.txt").write_text("".join(lines))
        assert spkd("calibrate", "--scores", "s.txt", "out=s.json").code == code
    assert "note: force=true was not needed" in spkd("calibrate", "--scores", "s.txt", "out=s.json", "force=true").out


def test_scores_too_large_to_compute_with_are_a_line(spkd: Callable) -> None:
    lines = [f"a{i} b{i} {(-1) ** i * 1e308 + i} {('target', 'nontarget')[i % 2]}\n" for i in range(80)]
    Path("s.txt").write_text("".join(lines))
    done = spkd("calibrate", "--scores", "s.txt", "out=c.json")
    assert (done.code, "s.txt: a calibration takes scores and quality measures below 1e+100" in done.err) == (1, True)


def test_the_list_of_a_calibration_is_known_in_another_order(spkd: Callable) -> None:
    """Also with the sides of its trials exchanged, and where no manifest says who the speakers are."""
    rows = [
        ("a", "b", 0.9, "target"),
        ("c", "d", 0.2, "target"),
        ("a", "d", 0.4, "nontarget"),
        ("b", "c", 0.1, "nontarget"),
    ]
    lines = [f"{a} {b} {score} {label}\n" for a, b, score, label in rows]
    Path("s.txt").write_text("".join(lines))
    spkd("calibrate", "--scores", "s.txt", "out=c.json", "force=true").ok()
    Path("reversed.txt").write_text("".join(lines[::-1]))
    Path("part.txt").write_text("".join(f"{b} x {score} {label}\n" for _, b, score, label in rows))
    for name in ("s.txt", "reversed.txt", "part.txt"):
        done = spkd("eval", "--scores", name, "calibration=c.json")
        assert (done.code, "tested here" in done.err) == (1, True), done.err
