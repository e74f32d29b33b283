from __future__ import annotations

import gzip
import io
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from spkd.errors import SpkdError, UsageError
from spkd.eval.run import as_text
from spkd.eval.trials import Trials, in_order_of, pairs, read, read_scores
from tests.conftest import Outcome


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "trials.txt"
    path.write_text(text)
    return path


def sides(trials: Trials) -> tuple[list[str], list[str]]:
    enrolment, test = zip(*pairs(trials), strict=True)
    return list(enrolment), list(test)


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("1 a b\n0 a c\n", [1, 0]),
        ("a b target\n\na c nontarget\n", [1, 0]),
        ("a b 1\na c 0\n", [1, 0]),
        ("a b\na c\n", None),
        ("1 a 1\n0 a 0\n", [1, 0]),  # VoxCeleb's where both fit
    ],
)
def test_formats_are_detected(tmp_path: Path, text: str, labels: list[int] | None) -> None:
    trials = read(write(tmp_path, text))
    assert (None if trials.label is None else trials.label.tolist()) == labels
    assert sides(trials)[0] == ["a", "a"]


def test_a_named_format_wins(tmp_path: Path) -> None:
    trials = read(write(tmp_path, "1 a 1\n0 a 0\n"), "kaldi")
    assert sides(trials) == (["1", "0"], ["a", "a"])
    with pytest.raises(UsageError, match="did you mean 'kaldi'"):
        read(write(tmp_path, "a b\n"), "kldi")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1 a b\n2 a b\n", r"trials.txt:2: '2 a b' is not `1 enrolment test`"),
        ("a b target\na b maybe\n", "trials.txt:2: 'a b maybe' is not `enrolment test target`"),
        ("a b\na b\n\na\n", "trials.txt:4: 'a' is not `enrolment test`"),
        ("\n", "holds no trials"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(SpkdError, match=expected):
        read(write(tmp_path, text))


def test_utterances_are_listed_once_in_order(tmp_path: Path) -> None:
    assert read(write(tmp_path, "b a\na c\n")).names == ["b", "a", "c"]


@pytest.mark.parametrize(
    ("name", "labelled"),
    [("voxceleb.txt", True), ("kaldi.txt", True), ("nist.tsv", True), ("unlabelled.txt", False)],
)
def test_the_documented_examples_load(name: str, labelled: bool) -> None:
    examples = Path(__file__).parents[2] / "manifests" / "examples"
    trials = read(examples / f"trials-{name}")
    assert sides(trials) == (["ann-1", "ann-1"], ["ann-2", "guest"])
    assert (trials.label is not None) == labelled


@pytest.mark.parametrize(
    "data",
    [
        b"\xef\xbb\xbf1 a b\r\n0 a c\r\n",
        gzip.compress(b"1 a b\n0 a c\n", mtime=0),
        b"# made by us\n1 a b\n\n0 a c",
        b"1,a,b\n0, a, c\n",
        b"label;enrol;test\n1;a;b\n0;a;c\n",
        b"1\ta\tb\r0\ta\tc\r",
        b"a b Target\na c NonTarget\n",
        b"enrolment test target\na b TRUE\na c False\n",
    ],
)
def test_lists_as_other_tools_write_them(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "t").write_bytes(data)
    trials = read(tmp_path / "t")
    assert trials.label is not None
    assert trials.label.tolist() == [1, 0]
    assert sides(trials) == (["a", "a"], ["b", "c"])


def test_tabs_separate_ids_with_spaces(tmp_path: Path) -> None:
    assert sides(read(write(tmp_path, "1\ta b\tc d\n0\ta b\te\n"))) == (["a b", "a b"], ["c d", "e"])


def test_the_lines_of_trials_are_kept(tmp_path: Path) -> None:
    assert read(write(tmp_path, "# x\n1 a b\n\n0 a c\n")).line.tolist() == [2, 4]


def test_a_long_malformed_line_is_shortened(tmp_path: Path) -> None:
    with pytest.raises(SpkdError) as caught:
        read(write(tmp_path, "1 a b\n" + "x" * 10**6))
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("a b 0.5\na c -1e-3\n", None),
        ("a b 0.5 target\na c -1e-3 nontarget\n", [1, 0]),
        ("a b 1 0.5\na c 0 -1e-3\n", [1, 0]),
        ("1 a b 0.5\n0 a c -1e-3\n", [1, 0]),
        ("modelid\tsegmentid\tside\tLLR\n", None),
        ("enrol\ttest\tscore\na\tb\t0.5\na\tc\t-1e-3\n", None),
    ],
)
def test_scores_of_other_toolkits(tmp_path: Path, text: str, labels: list[int] | None) -> None:
    path = write(tmp_path, text)
    if "side" in text:
        with pytest.raises(SpkdError, match="is not"):
            read_scores(path)
        return
    trials, scores = read_scores(path)
    assert scores.tolist() == [0.5, -1e-3]
    assert (None if trials.label is None else trials.label.tolist()) == labels
    assert sides(trials) == (["a", "a"], ["b", "c"])


@pytest.mark.parametrize("text", ["a b nan\n", "a b inf 1\n", "a b\n", "", "a b 1 maybe\n"])
def test_scores_that_are_none_are_a_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(SpkdError, match="trials.txt"):
        read_scores(write(tmp_path, text))


def test_scores_of_names_with_spaces_are_read_again(spkd: Callable[..., Outcome], tmp_path: Path) -> None:
    rows = [("ann lee 1", "ann lee 2", 2.5, 1), ("ann lee 1", "bob 3", -1.0, 0), ("#4", "ann lee 2", 0.5, 0)]
    text = "".join(f'"{a}"\t{b}\t{score}\t{("nontarget", "target")[label]}\n' for a, b, score, label in rows)
    (tmp_path / "theirs").write_text(text)
    for source, out in (("theirs", "e"), ("e/scores.txt", "again")):
        spkd("eval", "--scores", source, f"out={out}", "bootstrap=0").ok()
        trials, scores = read_scores(tmp_path / out / "scores.txt")
        assert trials.label is not None
        assert [
            (*pair, score, label)
            for pair, score, label in zip(pairs(trials), scores.tolist(), trials.label.tolist(), strict=True)
        ] == rows
    spkd("report", "a=e", "b=again", "--out", "r", "--bootstrap", "20").ok()


def test_scores_lose_no_digit(spkd: Callable[..., Outcome], tmp_path: Path) -> None:
    """Of any size: a report is computed from the file."""
    random = np.random.default_rng(0)
    scores = random.standard_normal(400) * 10.0 ** random.integers(-12, 6, 400)
    rows = [f"e{i} t{i} {s!r} {i % 2}\n" for i, s in enumerate(scores.tolist())]
    (tmp_path / "theirs").write_text("".join(rows))
    spkd("eval", "--scores", "theirs", "out=e", "bootstrap=0").ok()
    assert np.array_equal(np.loadtxt("e/scores.txt", usecols=2), scores)
    worst = json.loads(Path("e/report.json").read_text())["worst"]
    assert worst["targets"][0]["score"] == scores[1::2].min()
    singles = random.integers(0, 0x7F800000, 4000, np.uint32).view(np.float32)  # all finite ones, from denormals on
    assert np.array_equal(np.array(as_text(singles)).astype(np.float32), singles)


def test_a_list_in_the_place_of_scores_is_noted(spkd: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "list").write_text("".join(f"e{i} t{i} {i % 2}\n" for i in range(20)))
    (tmp_path / "scores").write_text("".join(f"e{i} t{i} {i % 3}\n" for i in range(20)))
    done = spkd("eval", "list", "--scores", "list", "bootstrap=0").ok()
    assert "note: list: every score is 0 or 1, as are the labels of a trial list\n" in done.out
    assert "every score" not in spkd("eval", "list", "--scores", "scores", "bootstrap=0").ok().out


def test_labels_of_a_score_file_that_contradict_the_list_are_counted(
    spkd: Callable[..., Outcome], tmp_path: Path
) -> None:
    random = np.random.default_rng(0)
    labels, theirs = random.integers(0, 2, (2, 60))
    (tmp_path / "list").write_text("".join(f"{label} e{i} t{i}\n" for i, label in enumerate(labels)))
    lines = [f"e{i} t{i} {i} {('nontarget', 'target')[label]}\n" for i, label in enumerate(theirs)]
    (tmp_path / "scores").write_text("".join(["x y 3 target\n", *lines]))
    wrong = np.flatnonzero(labels != theirs)
    done = spkd("eval", "list", "--scores", "scores", "bootstrap=0").ok()
    note = f"scores: labels that are not those of list, which count: {len(wrong)} of 61 (first: line {wrong[0] + 2})"
    assert f"note: {note}\n" in done.out
    assert note in json.loads(Path("eval/report.json").read_text())["notes"]
    (tmp_path / "right").write_text("".join(f"e{i} t{i} {i} {label}\n" for i, label in enumerate(labels)))
    assert "which count" not in spkd("eval", "list", "--scores", "right", "bootstrap=0").ok().out


def test_the_first_trial_may_have_words_of_a_header_as_names(spkd: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "trials").write_text("utt1 utt2 target\nx y nontarget\n")
    (tmp_path / "scores").write_text("utt1 utt2 1\nx y 0\n")
    done = spkd("eval", "trials", "--scores", "scores", "out=e", "bootstrap=0")
    assert "(2 trials)" in done.out, done.err


def test_a_list_with_oddities_is_scored_and_noted(spkd: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "scores").write_text("a b 1 target\na b 1 nontarget\na a 2 target\na c 0 nontarget\n")
    done = spkd("eval", "--scores", "scores", "out=e", "bootstrap=0")
    noted = [line.removeprefix("note: ") for line in done.out.splitlines() if line.startswith("note: ")]
    assert noted == [
        "scores: trials of an utterance with itself: 1 (first: line 3)",
        "scores: trials that repeat a pair: 1 (first: line 2)",
        "scores: pairs that are target and non-target trials: 1 (first: line 1)",
    ]
    assert json.loads((tmp_path / "e" / "report.json").read_text())["notes"] == noted


def test_scores_of_no_trial_are_counted(spkd: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "trials").write_text("1 a b\n0 a c\n")
    (tmp_path / "scores").write_text("a c 0\nz z 9\na b 1\nb a 5\n")
    done = spkd("eval", "trials", "--scores", "scores", "out=e", "bootstrap=0")
    assert "note: scores: scores of pairs that are no trials of trials: 2\n" in done.out
    assert json.loads((tmp_path / "e" / "report.json").read_text())["notes"] == [
        "scores: scores of pairs that are no trials of trials: 2"
    ]


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    for data in (b"1 a b\n0 a c\n", gzip.compress(b"1 a b\n0 a c\n", mtime=0)):
        monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(data)))
        trials = read("-")
        assert trials.source == "standard input"
        assert sides(trials) == (["a", "a"], ["b", "c"])
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(b"1 a b\nx\n")))
    with pytest.raises(SpkdError, match="standard input:2: 'x' is not"):
        read("-")


def test_scores_are_put_into_the_order_of_a_list(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("a c 3\nb a 2\na b 1\nz z 9\na b 1\n")
    scored, scores = read_scores(tmp_path / "s")
    trials = read(write(tmp_path, "1 a b\n0 a c\n1 a b\n"))
    assert in_order_of(trials, scored, scores).tolist() == [1.0, 3.0, 1.0]
    assert in_order_of(scored, scored, scores) is scores
    with pytest.raises(SpkdError, match=r"s: no score of 'c b' \(.*trials.txt:2\), one of 1 trial without"):
        in_order_of(read(write(tmp_path, "1 a b\n0 c b\n")), scored, scores)
    (tmp_path / "s").write_text("a b 1\na b 2\n")
    with pytest.raises(SpkdError, match="s:2: a trial that has another score before"):
        in_order_of(read(write(tmp_path, "1 a b\n")), *read_scores(tmp_path / "s"))


def test_no_more_than_one_line_is_held_as_text(tmp_path: Path) -> None:
    path = tmp_path / "t"
    with gzip.open(path, "wt") as file:
        file.writelines(f"{i % 2} u{i % 50} u{(i * 7) % 50}\n" for i in range(200_000))
    trials = read(path)
    assert len(trials) == 200_000
    assert trials.enrolment.dtype == np.int32
    assert len(trials.names) == 50


@pytest.mark.parametrize("separator", ["\t", " ", ","])
def test_nist_tables(tmp_path: Path, separator: str) -> None:
    """Columns are taken by the names that the first line gives them."""
    rows = ["modelid segmentid side", "1001_sre x.sph a", "1002_sre y.sph b"]
    plain = read(write(tmp_path, "".join(row.replace(" ", separator) + "\n" for row in rows)))
    assert sides(plain) == (["1001_sre", "1002_sre"], ["x.sph", "y.sph"])
    assert plain.label is None
    key = ["segmentid modelid partition targettype gender", "x.sph 1001_sre 3 target f", "y.sph 1001_sre 3 nontarget m"]
    keyed = read(write(tmp_path, "".join(row.replace(" ", separator) + "\n" for row in key)))
    assert sides(keyed) == (["1001_sre", "1001_sre"], ["x.sph", "y.sph"])
    assert keyed.label is not None
    assert keyed.label.tolist() == [1, 0]
    output = ["modelid segmentid side LLR", "1001_sre x.sph a -1.5", "1001_sre y.sph a 2e3"]
    path = write(tmp_path, "".join(row.replace(" ", separator) + "\n" for row in output))
    scored, scores = read_scores(path)
    assert sides(scored) == (["1001_sre", "1001_sre"], ["x.sph", "y.sph"])
    assert scores.tolist() == [-1.5, 2000.0]
    for wrong in ("1001_sre x.sph", "1001_sre x.sph a b"):
        with pytest.raises(SpkdError, match=r":2: .* is not `modelid segmentid .*, as line 1 names the columns`"):
            read(write(tmp_path, f"modelid segmentid side\n{wrong}\n"))
