"""`spkd report` through the real command line."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from spkd.eval.compare import latex, markdown, separated
from spkd.eval.metrics import curve, eer
from spkd.eval.trials import read_scores
from spkd.students import Checkpoint, build, save_student

SCORES = ("one/scores.txt", "two/scores.txt")


@pytest.fixture
def evaluations(spkd: Callable, corpus: Path, tmp_path: Path) -> None:
    """Folders one and two: two students on one list; other: one of them on a part of it."""
    for seed, name in ((0, "one"), (1, "two")):
        torch.manual_seed(seed)
        network = build("xvector", channels=16, embedding=8).eval()
        training = {"settings": {"losses": {"cosine": {}}, "caches": ["f"]}, "steps": 3}
        save_student(tmp_path / f"s{name}", Checkpoint(network, training=training))
        lines = [{"step": step, "loss": 1.0 / (step + 1) + seed} for step in range(3)]
        (tmp_path / f"s{name}" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        common = [f"manifest={corpus / 'manifest.csv'}", f"model=s{name}", "bootstrap=20"]
        assert spkd("eval", corpus / "trials.txt", *common, f"out={name}").code == 0
    lines = (corpus / "trials.txt").read_text().splitlines(True)
    Path("part.txt").write_text("".join(lines[:100]))
    assert spkd("eval", "part.txt", *common, "out=other").code == 0


@pytest.mark.usefixtures("evaluations")
def test_systems_are_compared_on_one_page(spkd: Callable) -> None:
    done = spkd("report", "first=one", "two", "other", "--out", "cmp", "--bootstrap", 50)
    assert done.code == 0, done.err
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
    lines = Path("two/scores.txt").read_text().splitlines(True)
    Path("two/scores.txt").write_text("".join(lines[5:]))
    done = spkd("report", "one", "two", "--bootstrap", 20)
    assert done.code == 0, done.err
    first = np.loadtxt("one/scores.txt", usecols=2)
    assert len(first) == 153


@pytest.mark.usefixtures("evaluations")
def test_folders_that_are_no_evaluation_are_a_line(spkd: Callable) -> None:
    assert "sone: no evaluation (report.json)" in spkd("report", "sone").err
    Path("one/report.json").write_text('{"spkd_report": 1}')
    assert "not a report of format 2" in spkd("report", "one").err
    Path("two/utt2spk").write_text("")
    done = spkd("report", "two", "again=two", "--bootstrap", 20)
    assert "two/utt2spk: no speaker of" in done.err


def test_tables_are_escaped() -> None:
    header, rows = ["a|b", "c"], [["=1+1", "50 %_x"]]
    assert markdown(header, rows) == "| a\\|b | c |\n|---|---|\n| =1+1 | 50 %_x |\n"
    assert separated(header, rows) == "a|b,c\n'=1+1,50 %_x\n"
    assert r"50 \%\_x" in latex(header, rows)
