"""Speakers of trials, from the manifest or from the trials themselves."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from spkd.eval.trials import Trials


def from_labels(trials: Trials) -> list[str]:
    """Speaker of each of the trials' names.

    Names that target trials join are of one speaker, who gets the first of these names.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    size = len(trials.names)
    same = np.flatnonzero(trials.label) if trials.label is not None else np.empty(0, np.int64)
    joined = coo_array((np.ones(len(same), bool), (trials.enrolment[same], trials.test[same])), (size, size))
    _, speaker = connected_components(joined, directed=False)
    _, first = np.unique(speaker, return_index=True)
    return [trials.names[name] for name in first[speaker].tolist()]


def numbered(trials: Trials, enrolment: Mapping[str, str], test: Mapping[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the speakers of both sides of every trial, from 0: (N,) each.

    Args:
        enrolment: speaker of each name on the enrolment side.
        test: speaker of each name on the test side.
    """
    number: dict[str, int] = {}
    tables = []
    for side, speaker in ((trials.enrolment, enrolment), (trials.test, test)):
        table = np.zeros(len(trials.names), np.int32)
        for index in np.unique(side).tolist():
            table[index] = number.setdefault(speaker[trials.names[index]], len(number))
        tables.append(table)
    return tables[0][trials.enrolment], tables[1][trials.test]
