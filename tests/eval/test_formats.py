"""Trial lists, score files and enrolment maps exactly as challenges and toolkits write them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from spkd.errors import SpkdError, UsageError
from spkd.eval.enrolment import read_map
from spkd.eval.trials import Trials, notes_on, pairs, read, read_scores, trials_of_enrolled
from spkd.registry import SCORE_FORMATS, TRIAL_FORMATS

Expected = list[tuple[str, str, int | None]]


def write(tmp_path: Path, text: str) -> Path:
    (tmp_path / "list").write_text(text)
    return tmp_path / "list"


def rows(trials: Trials) -> Expected:
    labels = [None] * len(trials) if trials.label is None else trials.label.tolist()
    return [(a, b, label) for (a, b), label in zip(pairs(trials), labels, strict=True)]


TWO: Expected = [("e1", "t1", 1), ("e1", "t2", 0)]
UNLABELLED: Expected = [("e1", "t1", None), ("e1", "t2", None)]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("voxceleb", "1 e1 t1\n0 e1 t2\n", TWO),  # veri_test2.txt, VoxSRC's validation
        ("kaldi", "e1 t1 target\ne1 t2 nontarget\n", TWO),
        ("kaldi", "e1 t1 1\ne1 t2 0\n", TWO),  # CN-Celeb's trials.lst
        ("kaldi", "e1 t1 tgt\ne1 t2 imp\n", TWO),  # SITW's keys
        ("plain", "e1 t1\ne1 t2\n", UNLABELLED),  # SITW's trial lists
        ("espnet", "e1*t1 1\ne1*t2 0\n", TWO),
        ("sdsv", "model-id evaluation-file-id\ne1 t1\ne1 t2\n", UNLABELLED),
        ("sdsv", "model-id evaluation-file-id trial-type\ne1 t1 TC\ne1 t2 IW\n", TWO),  # TdSV
        ("nist", "modelid\tsegmentid\tside\ne1\tt1\ta\ne1\tt2\ta\n", UNLABELLED),  # SRE16 and later
        (
            "nist",
            "modelid\tsegmentid\tside\ttargettype\tgender\ne1\tt1\ta\ttarget\tm\ne1\tt2\ta\tnontarget\tm\n",
            TWO,
        ),
        ("nist", "modelid,segmentid,targettype\ne1,t1,target\ne1,t2,nontarget\n", TWO),  # hyperion
        (
            "nist",  # a table made of SRE08's key
            "model_id,test_id,channel,trial_status,is_1,is_2\ne1,t1,a,target,Y,N\ne1,t2,b,nontarget,N,Y\n",
            TWO,
        ),
        (
            "nist-key",  # coreext-coreext.trialkey.csv of SRE10
            "e1,t1,a,target,Y,N,N,Y\ne1,t2,b,nontarget,N,N,N,N\n",
            [("e1", "t1:a", 1), ("e1", "t2:b", 0)],
        ),
        (
            "nist",  # the label's column has a name of its own
            "Model,Segment,Channel,Kind\ne1,t1,a,target\ne1,t1,b,nontarget\n",
            [("e1", "t1:a", 1), ("e1", "t1:b", 0)],
        ),
        (
            "nist-key",  # SRE08
            "Model ID,Test ID,Channel,Target/nontarget\ne1,t1,a,target\ne1,t1,b,nontarget\n",
            [("e1", "t1:a", 1), ("e1", "t1:b", 0)],
        ),
        (
            "nist-ndx",
            "e1 m data/t1.sph:A\ne1 m data/t1.sph:B\n",
            [("e1", "data/t1.sph:a", None), ("e1", "data/t1.sph:b", None)],
        ),
    ],
)
def test_trial_lists(tmp_path: Path, name: str, text: str, expected: Expected) -> None:
    """Detected, and read under the format's name."""
    for form in ("auto", name):
        assert rows(read(write(tmp_path, text), form)) == expected


@pytest.mark.parametrize("name", TRIAL_FORMATS)
def test_every_format_refuses_a_line_that_is_none(tmp_path: Path, name: str) -> None:
    with pytest.raises(SpkdError, match=r"list:1: 'no such line, at all, is it' is not `") as caught:
        read(write(tmp_path, "no such line, at all, is it\n"), name)
    assert TRIAL_FORMATS[name].shape in str(caught.value)


def test_a_line_of_no_format_lists_all_shapes(tmp_path: Path) -> None:
    for formats, reader in ((TRIAL_FORMATS, read), (SCORE_FORMATS, read_scores)):
        with pytest.raises(SpkdError, match=r"list:1: ") as caught:
            reader(write(tmp_path, "some words that are no trial\n1 e1 t1\n"))  # type: ignore[operator]
        assert [form.shape for form in formats.values() if form.shape not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("e1 t1 0.5\ne1 t2 -0.25\n", None),
        ("e1*t1 0.5 1\ne1*t2 -0.25 0\n", [1, 0]),  # ESPnet
        ("e1 t1 0.50000 target\ne1 t2 -0.25000 nontarget\n", [1, 0]),  # WeSpeaker's score.py
        (  # score_norm.py
            "e1 t1 0.50000 target 11.2000 12.1000 0.2000 0.2100\ne1 t2 -0.25000 nontarget 11.2 12.2 0.2 0.22\n",
            [1, 0],
        ),
        (  # gather_calibration_factors
            f"e1 t1 target 0.50000 {'1.0000 ' * 12}\ne1 t2 nontarget -0.25000 {'2.0000 ' * 12}\n",
            [1, 0],
        ),
        ("e1 t1 1 0.5\ne1 t2 0 -0.25\n", [1, 0]),  # SpeechBrain
        ("e1 t1 target 0.50000\ne1 t2 nontarget -0.25000\n", [1, 0]),  # 3D-Speaker
        ("0.5 e1 t1\n-0.25 e1 t2\n", None),  # VoxSRC's submissions
        ("modelid\tsegmentid\tside\tLLR\ne1\tt1\ta\t0.5\ne1\tt2\ta\t-0.25\n", None),
    ],
)
def test_score_files(tmp_path: Path, text: str, labels: list[int] | None) -> None:
    trials, scores = read_scores(write(tmp_path, text))
    assert scores.tolist() == [0.5, -0.25]
    assert list(pairs(trials)) == [("e1", "t1"), ("e1", "t2")]
    assert (None if trials.label is None else trials.label.tolist()) == labels


def test_columns_that_are_not_used_are_counted(tmp_path: Path) -> None:
    text = "modelid segmentid side targettype gender source_type\ne1 t1 a target m cts\ne1 t2 b nontarget m afv\n"
    assert read(write(tmp_path, text)).notes == (
        "the side is not used, as each segment has one; segments whose side is not `a`: 1",
        "columns not used: gender, source_type",
    )
    (note,) = read(write(tmp_path, "e1,t1,a,target,Y,N\n")).notes
    assert note.endswith("every condition are scored: 2")
    trials, _ = read_scores(write(tmp_path, "e1 t1 0.5 target 11 12 0.2 0.2\n"))
    assert trials.notes == ("further columns of numbers, not used: 4",)


def test_both_sides_of_a_recording_are_two_segments(tmp_path: Path) -> None:
    table = "modelid segmentid side\ne1 t1 a\ne1 t1 b\ne1 t2 a\n"
    assert [b for _, b, _ in rows(read(write(tmp_path, table)))] == ["t1:a", "t1:b", "t2:a"]


# The first line (M6).


@pytest.mark.parametrize(
    ("text", "known", "first"),
    [
        ("utt1 utt2 target\nutt1 utt3 nontarget\n", (), "utt1"),  # its utterance is in another trial
        ("utt1 utt2\nutt1 utt3\n", (), "utt1"),
        ("utt1 utt2 target\nutt3 utt4 nontarget\n", ("utt1",), "utt1"),  # or in the manifest
        ("utt1 utt2 target\nutt3 utt4 nontarget\n", ("wav/utt1.flac",), "utt1"),
        ("utt1 utt2 target\n", (), "utt1"),  # there is nothing else
        ("utt1 utt2 target\na b nontarget\n", ("a", "b"), "a"),
        ("label utt1 utt2\n1 a b\n", ("a", "b"), "a"),
        ("# made by us\nenrol test target\na b target\n", (), "a"),
    ],
)
def test_a_header_is_told_from_a_trial(tmp_path: Path, text: str, known: tuple[str, ...], first: str) -> None:
    assert rows(read(write(tmp_path, text), known=known))[0][0] == first


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("test,enrol,label\nt1,e1,1\nt2,e1,0\n", TWO),
        ("utt2 utt1 target\nt1 e1 target\nt2 e1 nontarget\n", TWO),
        ("label segment model\n1 t1 e1\n0 t2 e1\n", TWO),
        ("test enrol\nt1 e1\nt2 e1\n", UNLABELLED),
        ("utt2 utt1 target\nutt1 t2 nontarget\n", [("utt2", "utt1", 1), ("utt1", "t2", 0)]),  # no header
    ],
)
def test_a_header_decides_the_columns(tmp_path: Path, text: str, expected: Expected) -> None:
    assert rows(read(write(tmp_path, text))) == expected


@pytest.mark.parametrize(
    ("text", "labels", "scores"),
    [
        ("enrol test score label\ne1 t1 1 0\ne1 t2 0 1\n", [0, 1], [1, 0]),
        ("test label score model\nt1 0 1 e1\nt2 1 0 e1\n", [0, 1], [1, 0]),
        ("test,model,score\nt1,e1,0.5\nt2,e1,-0.25\n", None, [0.5, -0.25]),
    ],
)
def test_a_header_decides_the_columns_of_scores(
    tmp_path: Path, text: str, labels: list[int] | None, scores: list[float]
) -> None:
    trials, found = read_scores(write(tmp_path, text))
    assert list(pairs(trials)) == [("e1", "t1"), ("e1", "t2")]
    assert found.tolist() == scores
    assert (None if trials.label is None else trials.label.tolist()) == labels


@pytest.mark.parametrize(
    "header", ["enrol enroll label", "enrol test score", "enrol score target", "model label test test"]
)
def test_a_header_whose_columns_contradict_is_refused(tmp_path: Path, header: str) -> None:
    row = "a b 1" if header.count(" ") == 2 else "a 1 b c"
    with pytest.raises(SpkdError, match=r"list:1: .*its words name columns that no trial list has together"):
        read(write(tmp_path, f"{header}\n{row}\n"))
    with pytest.raises(SpkdError, match=r"list:1: .*its words name columns that no score file has together"):
        read_scores(write(tmp_path, "enrol test label\na b 1\nc d 0\n"))


def test_a_first_line_that_could_be_a_trial_is_named(tmp_path: Path) -> None:
    (note,) = read(write(tmp_path, "utt1 utt2 target\na b nontarget\n"), known=("a", "b")).notes
    assert note == "line 1, 'utt1 utt2 target', is taken for a header"
    assert read(write(tmp_path, "label utt1 utt2\n1 a b\n")).notes == ()  # that is no trial


@pytest.mark.parametrize("header", ["enrolment_utterance test_utterance is_target", "a,few,names,of,columns"])
def test_a_header_that_is_not_known_is_named(tmp_path: Path, header: str) -> None:
    with pytest.raises(SpkdError, match="list:1: .* looks like a header that is not known, leave it out"):
        read(write(tmp_path, f"{header}\na b target\na c nontarget\n"))
    with pytest.raises(SpkdError, match="list:1: .* looks like a header that is not known, leave it out"):
        read_scores(write(tmp_path, f"{header}\na b 0.5\na c -0.5\n"))


# Notes on lists that no one meant (E4).


def test_notes_are_those_of_brute_force(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        listed = [
            (f"u{a}", f"u{b}", int(label)) for a, b, label in zip(*rng.integers(0, (6, 6, 2), (9, 3)).T, strict=True)
        ]
        text = "".join(f"{label} {a} {b}\n" for a, b, label in listed)
        itself = [n for n, (a, b, _) in enumerate(listed, 1) if a == b]
        seen: dict[frozenset[str], set[int]] = {}
        again = []
        for n, (a, b, label) in enumerate(listed, 1):
            if frozenset((a, b)) in seen:
                again.append(n)
            seen.setdefault(frozenset((a, b)), set()).add(label)
        both = [pair for pair, labels in seen.items() if len(labels) == 2]
        first_of_both = [n for n, (a, b, _) in enumerate(listed, 1) if frozenset((a, b)) in both]
        path = write(tmp_path, text)
        assert list(notes_on(read(path, "voxceleb"))) == [
            f"{path}: {what}: {count} (first: line {first[0]})"
            for what, count, first in (
                ("trials of an utterance with itself", len(itself), itself),
                ("trials that repeat a pair", len(again), again),
                ("pairs that are target and non-target trials", len(both), first_of_both),
            )
            if count
        ]


def test_trials_of_a_models_own_utterances(tmp_path: Path) -> None:
    trials = read(write(tmp_path, "m a target\nm b target\nn a nontarget\nn c target\n"))
    assert trials_of_enrolled(trials, {"m": ["a", "x"], "n": ["c"]}).tolist() == [0, 3]
    assert trials_of_enrolled(trials, {}).tolist() == []


# Enrolment maps (M12, M13).


@pytest.mark.parametrize(
    ("text", "members"),
    [
        ("model-id enroll-file-ids ...\nm a b\nn c d e\n", {"m": ["a", "b"], "n": ["c", "d", "e"]}),
        ("model-id phrase-id enroll-file-id1 enroll-file-id2\nm 05 a b\nn 07 c d\n",
         {"m": ["a", "b"], "n": ["c", "d"]}),
        ("modelid\tsegmentid\tside\nm\ta\ta\nm\tb\ta\n", {"m": ["a", "b"]}),
        ("modelid segmentid side\nm a a\nm a b\n", {"m": ["a:a", "a:b"]}),
        ("modelid,segmentid\nm,a\nn,b\n", {"m": ["a"], "n": ["b"]}),
        ("10001 m taaaa.sph:a\n10002 f tbbbb.sph:B,tcccc.sph:a\n",  # SRE08 and SRE10
         {"10001": ["taaaa.sph:a"], "10002": ["tbbbb.sph:b", "tcccc.sph:a"]}),
        ("id00800-enroll enroll/id00800-enroll.wav\n", {"id00800-enroll": ["enroll/id00800-enroll.wav"]}),  # CN-Celeb
        ("12345 audio/aaaa.flac\n", {"12345": ["audio/aaaa.flac"]}),  # SITW's enroll-core.lst
        ("m a a\nm a\n", {"m": ["a"]}),
    ],
)  # fmt: skip
def test_enrolment_maps(tmp_path: Path, text: str, members: dict[str, list[str]]) -> None:
    assert read_map(write(tmp_path, text)).members == members


def test_enrolment_maps_count_what_they_leave_out(tmp_path: Path) -> None:
    assert read_map(write(tmp_path, "m a a\nm a b\n")).notes == (
        "utterances named again for one model, which count once: 2",
    )
    header = "model-id phrase-id enroll-file-id1\n"
    assert read_map(write(tmp_path, f"{header}m 05 a\n")).notes == ("columns not used: phrase-id",)
    with pytest.raises(SpkdError, match=r"list:1: .*start end"):
        read_map(write(tmp_path, "69006 audio/lywwa.flac 72.000 77.310\n"))


def test_a_large_model_is_read_in_linear_time(tmp_path: Path) -> None:
    """A quadratic reader would compare 5e9 names."""
    path = write(tmp_path, "".join(f"m u{i}\n" for i in range(100_000)))
    assert len(read_map(path).members["m"]) == 100_000


@pytest.mark.parametrize(
    ("text", "names", "first"),
    [
        ("0.5 1001 1002\n0.25 1001 1003\n", (), ("1001", "1002")),  # names have no decimals
        ("1001 1002 0.5\n1001 1003 1\n", (), ("1001", "1002")),
        ("5 1001 1002\n2 1001 1003\n", ("1001", "1002", "1003"), ("1001", "1002")),
        ("1001 1002 5\n1001 1003 2\n", ("1001", "1002", "1003"), ("1001", "1002")),
        ("5 1001 1002\n", (), None),
    ],
)
def test_scores_first_or_last_where_names_are_numbers(
    tmp_path: Path, text: str, names: tuple[str, ...], first: tuple[str, str] | None
) -> None:
    path = write(tmp_path, text)
    if first is None:
        with pytest.raises(UsageError, match="may be `enrolment test score` or `score enrolment test`"):
            read_scores(path)
        return
    trials, _ = read_scores(path, lambda: names)
    assert next(pairs(trials)) == first


@pytest.mark.parametrize(
    ("text", "known", "first"),
    [
        ("1 12 0\n0 7 1\n", ("7", "12", "0", "1"), None),
        ("1 12 0\n0 7 1\n", (), None),
        ("1 12 0\n0 7 1\n", ("7", "12", "1", "3"), None),  # each way has three of its four names
        ("1 12 0\n1 7 1\n", ("7", "12", "1"), ("1", "12", 0)),
        ("1 12 0\n0 7 1\n1 12 13\n", (), ("12", "0", 1)),  # 13 is no label
        ("1 12 0\n13 7 1\n", (), ("1", "12", 0)),
    ],
)
def test_a_label_first_or_last_where_names_are_numbers(
    tmp_path: Path, text: str, known: tuple[str, ...], first: tuple[str, str, int] | None
) -> None:
    path = write(tmp_path, text)
    if first is None:
        with pytest.raises(UsageError, match="may be .1 enrolment test. or .enrolment test target.*format=kaldi"):
            read(path, known=known)
        assert rows(read(path, "voxceleb", known))[0] == ("12", "0", 1)
        assert rows(read(path, "kaldi", known))[0] == ("1", "12", 0)
    else:
        assert rows(read(path, known=known))[0] == first


def test_labelled_scores_whose_names_are_numbers(tmp_path: Path) -> None:
    path = write(tmp_path, "1 12 0 0.7\n1 7 1 0.2\n")
    trials, _ = read_scores(path, lambda: ("1", "7", "12"))
    assert rows(trials) == [("1", "12", 0), ("1", "7", 1)]
    with pytest.raises(UsageError, match="may be `enrolment test 1 score` or `1 enrolment test score`"):
        read_scores(path)
