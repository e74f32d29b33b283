"""Who speaks in the trials: from the manifest, or from the trials themselves."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from spkd.eval.trials import Trials


def from_labels(trials: Trials) -> list[str]:
    """A speaker for each of the trials' names: those that target trials join are one speaker, whose name is that of the
    first of them."""
    parent = list(range(len(trials.names)))

    def root(name: int) -> int:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    same = np.flatnonzero(trials.label) if trials.label is not None else np.empty(0, np.int64)
    for a, b in zip(trials.enrolment[same].tolist(), trials.test[same].tolist(), strict=True):
        one, other = root(a), root(b)
        parent[max(one, other)] = min(one, other)
    return [trials.names[root(name)] for name in range(len(parent))]


def numbered(trials: Trials, enrolment: Mapping[str, str], test: Mapping[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """The speakers of both sides of every trial as numbers from 0: (N,) each.

    Args:
        enrolment, test: speaker of each name on that side.
    """
    number: dict[str, int] = {}
    tables = []
    for side, speaker in ((trials.enrolment, enrolment), (trials.test, test)):
        table = np.zeros(len(trials.names), np.int32)
        for index in np.unique(side).tolist():
            table[index] = number.setdefault(speaker[trials.names[index]], len(number))
        tables.append(table)
    return tables[0][trials.enrolment], tables[1][trials.test]
