from __future__ import annotations

import numpy as np

from spkd.eval.speakers import from_labels, numbered
from spkd.eval.trials import Trials


def listed(text: str) -> Trials:
    rows = [line.split() for line in text.split(",")]
    names = list(dict.fromkeys(name for row in rows for name in row[1:]))
    enrolment, test = (np.array([names.index(row[side]) for row in rows], np.int32) for side in (1, 2))
    return Trials(names, enrolment, test, np.array([int(row[0]) for row in rows], np.int8), np.arange(len(rows)), "t")


def test_target_trials_join_their_utterances() -> None:
    trials = listed("1 a b,1 b c,0 a d,1 d e,0 f a")
    found = dict(zip(trials.names, from_labels(trials), strict=True))
    assert found == {"a": "a", "b": "a", "c": "a", "d": "d", "e": "d", "f": "f"}


def test_sides_get_the_numbers_of_their_speakers() -> None:
    trials = listed("1 m a,0 m b,0 n a")
    left, right = numbered(trials, {"m": "ann", "n": "bob"}, {"a": "ann", "b": "bob"})
    assert left.tolist() == [0, 0, 1]
    assert right.tolist() == [0, 1, 0]
