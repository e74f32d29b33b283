"""Results by columns of the manifest: gender, age, duration, session."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from spkd.eval.metrics import Curve, curve, eer
from spkd.files.text import finite_number

UNKNOWN = "unknown"
MOST_VALUES = 8  # of a column of words; with more, trials are those of equal and of different values
RANGES = 4  # into which numbers are divided, with as many utterances in each


@dataclass(frozen=True)
class Group:
    """Trials of one kind.

    Attributes:
        name: the values of both sides.
        targets, non_targets: how many trials.
        eer_percent: of these trials alone; None where they are of one kind.
        miss_percent, false_alarm_percent: at the threshold of the EER of all trials; None without such trials.
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
    """One group for each pair of values that trials have.

    Args:
        enrolment, test: values of the rows of both sides, as words or numbers; "" where there is none.
        sides: (N,) the rows of every trial's enrolment and test side.
        threshold: at which miss and false alarms are counted.
    """
    left, right, names = _classes(enrolment, test)
    one, other = left[sides[0]], right[sides[1]]
    if len(names) > MOST_VALUES:
        unknown = names.index(UNKNOWN) if UNKNOWN in names else -1
        kind = np.where((one == unknown) | (other == unknown), 2, np.where(one == other, 0, 1))
        titles = ["equal", "different", UNKNOWN]
    else:
        kind = np.minimum(one, other).astype(np.int64) * len(names) + np.maximum(one, other)
        titles = [a if a == b else f"{a} / {b}" for a, b in itertools.product(names, names)]
    return [_group(titles[number], scores, labels, kind == number, threshold) for number in np.unique(kind).tolist()]


def _group(name: str, scores: np.ndarray, labels: np.ndarray, chosen: np.ndarray, threshold: float) -> Group:
    scores, labels = scores[chosen], labels[chosen]
    targets, others = scores[labels == 1], scores[labels == 0]
    at: Curve | None = curve(scores, labels) if len(targets) and len(others) else None
    return Group(
        name,
        len(targets),
        len(others),
        None if at is None else 100 * eer(at)[0],
        100 * float((targets < threshold).mean()) if len(targets) else None,
        100 * float((others >= threshold).mean()) if len(others) else None,
    )


def _classes(enrolment: Sequence[str], test: Sequence[str]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Class of every row of both sides, and the classes' names in order: words, or ranges of numbers."""
    values = [*enrolment, *test]
    numbers = [finite_number(value) for value in values]
    given = [number for number, value in zip(numbers, values, strict=True) if value]
    if given and all(number is not None for number in given) and len(set(given)) > MOST_VALUES:
        known = np.array([number for number in given if number is not None])
        edges = np.unique(np.quantile(known, np.linspace(0, 1, RANGES + 1)))
        names = [f"{a:.3g} to {b:.3g}" for a, b in itertools.pairwise(edges)]
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
