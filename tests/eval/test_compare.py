"""`spkd report` through the real command line."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from spkd.corpus.manifest import Manifest
from spkd.eval.compare import latex, markdown, separated
from spkd.eval.metrics import curve, eer
from spkd.eval.trials import read_scores
from spkd.students import Checkpoint, Training, build, save_student
from spkd.students.curves import log_line

SCORES, FEWER = ("one/scores.txt", "two/scores.txt"), ("fewer/scores.txt", "two/scores.txt")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which the first test leaves its evaluations for the others."""
    return tmp_path_factory.mktemp("evaluations")


@pytest.fixture
def evaluations(spkd: Callable, corpus: Path, tmp_path: Path, made: Path) -> None:
    """Folders one and two: two students on one list; other: one of them on a part of it."""
    if any(made.iterdir()):
        shutil.copytree(made, tmp_path, dirs_exist_ok=True)
        return
    for seed, name in ((0, "one"), (1, "two")):
        torch.manual_seed(seed)
        network = build("xvector", channels=16, embedding=8).eval()
        training = Training({"losses": {"cosine": {}}, "caches": ["f"]}, 3)
        save_student(tmp_path / f"s{name}", Checkpoint(network, training=training))
        lines = [{"step": step, "values": {"loss": 1.0 / (step + 1) + seed}} for step in range(3)]
        (tmp_path / f"s{name}" / "log.jsonl").write_text("".join(log_line(**line) for line in lines))
        common = [f"manifest={corpus / 'manifest.csv'}", f"model=s{name}", "bootstrap=20"]
        spkd("eval", corpus / "trials.txt", *common, f"out={name}").ok()
    lines = (corpus / "trials.txt").read_text().splitlines(True)
    Path("part.txt").write_text("".join(lines[:100]))
    spkd("eval", "part.txt", *common, "out=other").ok()
    shutil.copytree(tmp_path, made, dirs_exist_ok=True)


@pytest.mark.usefixtures("evaluations")
def test_a_name_is_of_one_system(spkd: Callable) -> None:
    pairs = (("a=one", "a=two"), ("one", "./one/"), ("two", "two=one"), ("a=one", "a=other"))
    for pair, name in zip(pairs, ("a", "one", "two", "a"), strict=True):  # the last are two models on two lists
        done = spkd("report", *pair, "--out", "twins")
        assert (done.code, done.err.startswith(f"error: {name}: a name of several systems (")) == (2, True), done.err
        assert "give each its own name (NAME=FOLDER)" in done.err
        assert not Path("twins").exists()
    spkd("report", "a=two", "a=other", "--out", "row", "--bootstrap", 0).ok()  # one system on two lists
    assert [row["system"] for row in csv.DictReader(Path("row/comparison.csv").open())] == ["a"]


def systems_of(folder: str) -> list[str]:
    """Names of the rows of a comparison."""
    return [row["system"] for row in csv.DictReader(Path(folder, "comparison.csv").open())]


@pytest.mark.usefixtures("evaluations")
def test_folders_of_one_name_are_one_system_where_weights_and_back_end_are(spkd: Callable, corpus: Path) -> None:
    given = [f"manifest={corpus / 'manifest.csv'}", "bootstrap=0"]
    # Scores from files, which tell no system: two lists with other scores.
    for name, number, trials in (("A", 0, "part.txt"), ("B", 1, corpus / "trials.txt")):
        spkd("eval", trials, "--scores", SCORES[number], f"out={name}/eval", *given).ok()
    # One student, on another list by another back-end; and by the same.
    Path("other").rename("C")
    Path("C/eval").mkdir()
    for path in [path for path in Path("C").iterdir() if path.is_file()]:
        path.rename(path.parent / "eval" / path.name)
    lines = (corpus / "trials.txt").read_text().splitlines(True)
    Path("few.txt").write_text("".join(line for line in lines if not any(f"spk{s}/" in line for s in (3, 4, 5))))
    Manifest(tuple(u for u in Manifest.load(corpus / "manifest.csv") if u.speaker in ("spk3", "spk4", "spk5"))).save(
        "o.csv"
    )
    for name, keys in (("D", ["subtract_mean=true", "cohort.source=o.csv"]), ("E", [])):
        spkd("eval", "few.txt", "model=stwo", f"out={name}/eval", *given, *keys).ok()
    for pair, rows in ((("A", "B"), ["A/eval", "B/eval"]), (("C", "D"), ["C/eval", "D/eval"]), (("C", "E"), ["eval"])):
        spkd("report", *(f"{name}/eval" for name in pair), "--out", "cmp", "--bootstrap", 0).ok()
        assert systems_of("cmp") == rows


@pytest.mark.usefixtures("evaluations")
def test_folders_may_have_equals_signs(spkd: Callable) -> None:
    """As those of a sweep."""
    shutil.copytree("one", "sweep/optim.lr=0.001")
    given = ("sweep/optim.lr=0.001", "lr=0.1=two", "slow=sweep/optim.lr=0.001")
    for item, name in zip(given, ("optim.lr=0.001", "lr=0.1", "slow"), strict=True):
        spkd("report", item, "--out", "cmp").ok()
        assert systems_of("cmp") == [name]
    assert "nowhere: no evaluation" in spkd("report", "x=nowhere").err


@pytest.mark.usefixtures("evaluations")
def test_systems_are_compared_on_one_page(spkd: Callable) -> None:
    done = spkd("report", "first=one", "two", "other", "--out", "cmp", "--bootstrap", 50).ok()
    tree = json.loads(Path("cmp/comparison.json").read_text())
    results = {s["label"]: s["results"]["eer_percent"] for s in tree["systems"]}
    difference = tree["differences"]["trials.txt"]["two"]
    one, two = (100 * eer(curve(scores, trials.label))[0] for trials, scores in map(read_scores, SCORES))
    assert difference["value"] == pytest.approx(two - one)
    assert difference["low"] <= difference["high"]
    assert 0 < difference["p"] <= 1
    assert tree["differences"]["part.txt"] == {}
    assert f"{difference['value']:+.3f} %" in done.out
    rows = list(csv.DictReader(Path("cmp/comparison.csv").open()))
    assert [row["system"] for row in rows] == ["first", "two", "other"]
    assert rows[0]["EER (%), trials.txt"].startswith(f"{results['first']:.3f} (")
    assert rows[0]["EER (%), part.txt"] == ""
    page = Path("cmp/comparison.html").read_text()
    assert page.count("<svg") == 3  # two lists, one training curve
    assert r"\toprule" in Path("cmp/comparison.tex").read_text()
    assert Path("cmp/comparison.md").read_text().startswith("| system | parameters |")


@pytest.mark.usefixtures("evaluations")
def test_lists_that_differ_are_compared_on_what_they_share(spkd: Callable, corpus: Path) -> None:
    """A system that could not use an utterance scored fewer trials of the same list."""
    every = Manifest.load(corpus / "manifest.csv").utterances
    Manifest((replace(every[0], path="gone.flac"), *every[1:])).save("m.csv")
    spkd("eval", corpus / "trials.txt", "manifest=m.csv", "model=sone", "bootstrap=20", "out=fewer").ok()
    spkd("report", "two", "fewer", "--out", "cmp", "--bootstrap", 20).ok()
    scores = [{tuple(line.split()[:2]): line.split()[2:] for line in Path(f).read_text().splitlines()} for f in FEWER]
    shared = [pair for pair in scores[0] if pair in scores[1]]
    assert (len(shared), len(scores[1])) == (136, 153)
    labels = np.array([scores[0][pair][1] == "target" for pair in shared], int)
    fewer, two = (100 * eer(curve(np.array([float(s[pair][0]) for pair in shared]), labels))[0] for s in scores)
    found = json.loads(Path("cmp/comparison.json").read_text())["differences"]["trials.txt"]["fewer"]
    assert found["value"] == pytest.approx(fewer - two)


@pytest.mark.usefixtures("evaluations")
def test_folders_that_are_no_evaluation_are_a_line(spkd: Callable) -> None:
    assert "sone: no evaluation (report.json)" in spkd("report", "sone").err
    Path("one/report.json").write_text('{"spkd_report": 1}')
    assert "not a report of format 3" in spkd("report", "one").err


@pytest.mark.usefixtures("evaluations")
def test_a_flipped_bit_of_an_evaluation_is_an_error_that_names_the_file(spkd: Callable) -> None:
    command = ["report", "two", "again=two", "--bootstrap", 5]
    for name in ("scores.txt", "utt2spk"):
        whole = Path("two", name).read_bytes()
        Path("two", name).write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])
        done = spkd(*command)
        assert (done.code, f"two/{name}: damaged" in done.err) == (1, True)
        Path("two", name).unlink()
        assert f"two/{name}: missing" in spkd(*command).err
        Path("two", name).write_bytes(whole)
    spkd(*command).ok()


def rates(folder: str, places: slice) -> tuple[float, float]:
    """EER (%) of the scores in a folder at some trials, and their minDCF at a prior of 0.1 by its definition."""
    rows = [line.split() for line in Path(folder, "scores.txt").read_text().splitlines()[places]]
    scores, target = np.array([float(row[2]) for row in rows]), np.array([row[3] == "target" for row in rows])
    at = np.append(np.unique(scores), np.inf)[:, None]
    miss, false_alarm = (scores[target] < at).mean(1), (scores[~target] >= at).mean(1)
    return 100 * eer(curve(scores, target.astype(int)))[0], float((0.1 * miss + 0.9 * false_alarm).min() / 0.1)


@pytest.mark.usefixtures("evaluations")
def test_systems_and_lists_of_one_name_are_told_apart(spkd: Callable, corpus: Path) -> None:
    lines = (corpus / "trials.txt").read_text().splitlines(True)
    expected = {}
    for place, part in (("p", slice(0, 90)), ("q", slice(60, None))):
        Path(place).mkdir()
        Path(place, "trials.txt").write_text("".join(lines[part]))
        for system, point in (("one", "0.2"), ("two", "0.1")):
            given = [f"{place}/trials.txt", "--scores", f"{system}/scores.txt", f"out={system}/{place}/eval"]
            spkd("eval", *given, f"points=[{point}]", "bootstrap=20").ok()
            expected[f"{system}/{place}/eval"] = rates(system, part)
    done = spkd("report", *expected, "--out", "cmp", "--bootstrap", 20).ok()
    tree = json.loads(Path("cmp/comparison.json").read_text())
    found = {s["label"]: s["results"]["eer_percent"] for s in tree["systems"]}
    assert found == pytest.approx({name: rate for name, (rate, _) in expected.items()})
    for place in "pq":
        ((label, difference),) = tree["differences"][f"{place}/trials.txt"].items()
        assert label == f"two/{place}/eval"
        assert difference["value"] == pytest.approx(expected[label][0] - expected[f"one/{place}/eval"][0])
        assert f"{place}/trials.txt: EER of {label} less" in done.out
    # Every headline metric of any system has a column; the first evaluation has other points.
    row = next(row for row in csv.DictReader(Path("cmp/comparison.csv").open()) if row["system"] == "two/q/eval")
    assert float(row["minDCF(0.1), q/trials.txt"].split()[0]) == pytest.approx(expected["two/q/eval"][1], abs=5e-5)
    assert row["minDCF(0.2), q/trials.txt"] == row["minDCF(0.1), p/trials.txt"] == ""


def test_tables_are_escaped() -> None:
    header, rows = ["a|b", "c"], [["=1+1", "50 %_x"]]
    assert markdown(header, rows) == "| a\\|b | c |\n|---|---|\n| =1+1 | 50 %_x |\n"
    assert separated(header, rows) == "a|b,c\n'=1+1,50 %_x\n"
    assert r"50 \%\_x" in latex(header, rows)
