from __future__ import annotations

import numpy as np
import pytest

from spkd.corpus.utterance import Utterance
from spkd.eval.breakdown import Group, groups, values_of_model
from spkd.eval.metrics import curve, eer

SCORES = np.array([0.9, 0.4, 0.8, 0.3, 0.2, 0.7])
LABELS = np.array([1, 1, 1, 0, 0, 0])
SIDES = (np.array([0, 1, 2, 0, 1, 2]), np.array([0, 1, 2, 1, 0, 0]))


def by(enrolment: list[str], test: list[str]) -> dict[str, Group]:
    return {group.name: group for group in groups(SCORES, LABELS, enrolment, test, SIDES, 0.5)}


def test_words_make_a_group_of_each_pair() -> None:
    found = by(["f", "m", ""], ["f", "m", ""])
    assert {name: (g.targets, g.non_targets) for name, g in found.items()} == {
        "f": (1, 0),
        "m": (1, 0),
        "unknown": (1, 0),
        "f / m": (0, 2),
        "f / unknown": (0, 1),
    }
    assert found["m"].miss_percent == 100.0
    assert found["f / unknown"].false_alarm_percent == 100.0
    assert found["f / m"].eer_percent is None


def test_one_group_has_the_eer_of_its_trials() -> None:
    found = by(["x"] * 3, ["x"] * 3)
    assert found["x"].eer_percent == 100 * eer(curve(SCORES, LABELS))[0]


def test_many_words_are_equal_or_different() -> None:
    enrolment = [f"s{i}" for i in range(12)]
    sides = (np.array([0, 1, 2, 3]), np.array([0, 1, 3, 2]))
    found = groups(SCORES[:4], np.array([1, 1, 0, 0]), enrolment, enrolment, sides, 0.5)
    assert [(g.name, g.targets, g.non_targets) for g in found] == [("equal", 2, 0), ("different", 0, 2)]


def test_numbers_make_ranges_of_equally_many() -> None:
    values = [str(i) for i in range(40)]
    sides = (np.arange(40), np.arange(40))
    found = groups(np.linspace(0, 1, 40), np.tile([0, 1], 20), values, values, sides, 0.5)
    assert [g.name for g in found] == ["0 to 9.75", "9.75 to 19.5", "19.5 to 29.2", "29.2 to 39"]
    assert [g.targets + g.non_targets for g in found] == [10] * 4


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (range(1940, 1980), ["1940 to 1950", "1950 to 1960", "1960 to 1969", "1969 to 1979"]),
        (range(16_000, 16_400, 10), ["16000 to 16098", "16098 to 16195", "16195 to 16292", "16292 to 16390"]),
    ],
)
def test_ranges_of_years_and_frequencies_are_written_out(values: range, names: list[str]) -> None:
    """Edges are quartiles: numpy's are checked by hand, 1940 + 39 / 4 = 1949.75."""
    places, words = (np.arange(40), np.arange(40)), [str(value) for value in values]
    found = groups(np.linspace(0, 1, 40), np.tile([0, 1], 20), words, words, places, 0.5)
    assert [g.name for g in found] == names


def test_a_model_has_the_values_of_all_its_utterances() -> None:
    def spoken(duration: float | None, session: str) -> Utterance:
        return Utterance("u", "u.wav", None, duration=duration, attributes=(("session", session),))

    enrolment = [spoken(1.0, "A"), spoken(6.0, "B"), spoken(6.0, "B")]
    assert values_of_model(enrolment, "duration") == ["13.0"]
    assert values_of_model(enrolment, "session") == ["A", "B"]
    assert values_of_model(enrolment[1:], "session") == ["B"]
    assert values_of_model([*enrolment, spoken(None, "A")], "duration") == ["1.0", "6.0", ""]
