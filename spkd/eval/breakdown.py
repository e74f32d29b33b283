"""Results by columns of the manifest: gender, age, duration, session."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from spkd.corpus.utterance import Utterance
from spkd.eval.metrics import Curve, curve, eer
from spkd.files.text import finite_number

UNKNOWN = "unknown"
MOST_VALUES = 8  # values of a column of words; with more, the groups are trials of equal and of different values
RANGES = 4  # ranges into which numbers are divided, with equally many utterances in each


@dataclass(frozen=True)
class Group:
    """Group of trials whose sides have certain values.

    Attributes:
        name: values of both sides.
        eer_percent: EER (%) of these trials alone; None where they are all targets or all non-targets.
        miss_percent: miss rate (%) at the threshold of the EER of all trials; None without target trials.
        false_alarm_percent: false-alarm rate (%) at this threshold; None without non-target trials.
    """

    name: str
    targets: int
    non_targets: int
    eer_percent: float | None
    miss_percent: float | None
    false_alarm_percent: float | None


def groups(
    scores: np.ndarray,
    labels: np.ndarray,
    enrolment: Sequence[str],
    test: Sequence[str],
    sides: tuple[np.ndarray, np.ndarray],
    threshold: float,
) -> list[Group]:
    """Groups of trials, one for each pair of values that trials have.

    Args:
        scores: (N,) scores of the trials.
        labels: (N,) 1 target, 0 non-target.
        enrolment: value of each row of the enrolment side, a word or a number; "" where there is none.
        test: value of each row of the test side.
        sides: (N,) row of every trial's enrolment side, and row of its test side.
        threshold: threshold at which misses and false alarms are counted.
    """
    left, right, names = _classes(enrolment, test)
    left_class, right_class = left[sides[0]], right[sides[1]]
    if len(names) > MOST_VALUES:
        unknown = names.index(UNKNOWN) if UNKNOWN in names else -1
        kind = np.where(
            (left_class == unknown) | (right_class == unknown), 2, np.where(left_class == right_class, 0, 1)
        )
        titles = ["equal", "different", UNKNOWN]
    else:
        kind = np.minimum(left_class, right_class).astype(np.int64) * len(names) + np.maximum(left_class, right_class)
        titles = [a if a == b else f"{a} / {b}" for a, b in itertools.product(names, names)]
    return [_group(titles[number], scores, labels, kind == number, threshold) for number in np.unique(kind).tolist()]


def values_of_model(enrolment: Sequence[Utterance], column: str) -> list[str]:
    """Values of a column in the utterances that define a model; of durations (s), also of speech, their sum."""
    values = list(dict.fromkeys(utterance.attribute(column) for utterance in enrolment))
    if column == "duration" and "" not in values:
        return [str(round(sum(utterance.whole or 0.0 for utterance in enrolment), 6))]
    if column == "speech" and all(utterance.speech is not None for utterance in enrolment):
        return [str(round(sum(utterance.duration or 0.0 for utterance in enrolment), 6))]
    return values


def _as_text(numbers: np.ndarray) -> list[str]:
    """Numbers with three digits, or as many as tell them apart and write years and frequencies out."""
    for digits in range(3, 18):
        text = [f"{number:.{digits}g}" for number in numbers.tolist()]
        if len(set(text)) == len(text) and not any("e+" in word for word in text):
            break
    return text


def _group(name: str, scores: np.ndarray, labels: np.ndarray, chosen: np.ndarray, threshold: float) -> Group:
    scores, labels = scores[chosen], labels[chosen]
    targets, non_targets = scores[labels == 1], scores[labels == 0]
    of_group: Curve | None = curve(scores, labels) if len(targets) and len(non_targets) else None
    return Group(
        name,
        len(targets),
        len(non_targets),
        None if of_group is None else 100 * eer(of_group)[0],
        100 * float((targets < threshold).mean()) if len(targets) else None,
        100 * float((non_targets >= threshold).mean()) if len(non_targets) else None,
    )


def _classes(enrolment: Sequence[str], test: Sequence[str]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Class of every row of the enrolment and of the test side, and names of the classes: words or ranges."""
    values = [*enrolment, *test]
    numbers = [finite_number(value) for value in values]
    given = [number for number, value in zip(numbers, values, strict=True) if value]
    if given and all(number is not None for number in given) and len(set(given)) > MOST_VALUES:
        known = np.array([number for number in given if number is not None])
        edges = np.unique(np.quantile(known, np.linspace(0, 1, RANGES + 1)))
        names = [f"{a} to {b}" for a, b in itertools.pairwise(_as_text(edges))]
        places = [
            len(names) if number is None else min(int(np.searchsorted(edges, number, "right")) - 1, len(names) - 1)
            for number in numbers
        ]
    else:
        words = [value or UNKNOWN for value in values]
        names = sorted(set(words) - {UNKNOWN})
        place: Mapping[str, int] = {name: index for index, name in enumerate(names)}
        places = [place.get(word, len(names)) for word in words]
    if len(names) in places:
        names = [*names, UNKNOWN]
    return np.array(places[: len(enrolment)], np.int32), np.array(places[len(enrolment) :], np.int32), names
