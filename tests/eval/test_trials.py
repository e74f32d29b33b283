from __future__ import annotations

from pathlib import Path

import pytest

from spkd.errors import SpkdError, UsageError
from spkd.eval.trials import read


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "trials.txt"
    path.write_text(text)
    return path


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
    assert trials.enrolment == ["a", "a"]


def test_a_named_format_wins(tmp_path: Path) -> None:
    trials = read(write(tmp_path, "1 a 1\n0 a 0\n"), "kaldi")
    assert (trials.enrolment, trials.test) == (["1", "0"], ["a", "a"])
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


def test_utterances_stand_once_in_order(tmp_path: Path) -> None:
    assert read(write(tmp_path, "b a\na c\n")).utterances == ["b", "a", "c"]


@pytest.mark.parametrize(("name", "labelled"), [("voxceleb", True), ("kaldi", True), ("unlabelled", False)])
def test_the_documented_examples_load(name: str, labelled: bool) -> None:
    examples = Path(__file__).parents[2] / "manifests" / "examples"
    trials = read(examples / f"trials-{name}.txt")
    assert (trials.enrolment, trials.test) == (["ann-1", "ann-1"], ["ann-2", "guest"])
    assert (trials.label is not None) == labelled
