"""Order in which audio in containers is loaded, so that each container is read once from end to end."""

from __future__ import annotations

import numpy as np

from spkd.corpus.address import ROW, Address, parse, state_of_container
from spkd.corpus.columns import Columns
from spkd.corpus.rows import table

REACH = 1 << 26  # bytes of containers within which audio may be loaded in any order, such as that of its lengths
WHOLE = -1  # in place of the number of a group of rows, of audio that is in none


def by_place(columns: Columns, utterances: np.ndarray) -> list[np.ndarray]:
    """Places in `utterances`, as the audio lies, in groups that are near one another.

    A group has `REACH` bytes of containers, or is of one group of rows of a table, which is decompressed as a whole.
    Audio in files, which may be read in any order, is one group.

    Args:
        utterances: (N,) numbers of utterances.
    """
    if not any(folder.endswith("#") for folder in columns.folders):
        return [np.arange(len(utterances))]
    containers: dict[str, int] = {}
    order = np.empty((len(utterances), 3), np.int64)  # number of the container, group of rows, first byte or row
    ends = np.empty(len(utterances), np.int64)
    for place, utterance in enumerate(utterances.tolist()):
        if (address := parse(columns.path(utterance))) is None:
            order[place], ends[place] = (len(columns), WHOLE, place), place
        else:
            container = containers.setdefault(address.container, len(containers))
            order[place], ends[place] = (container, _rows(address), address.offset), address.offset + address.length
    order_of = np.lexsort(order.T[::-1])
    groups, group, taken, last, end = list[np.ndarray](), list[int](), 0, (0, WHOLE), 0
    for place in order_of.tolist():
        container, rows, begin = order[place].tolist()
        is_same = (container, rows) == last
        taken += int(ends[place]) - (end if is_same else begin)
        if group and (taken > REACH or (not is_same and {rows, last[1]} != {WHOLE})):
            groups.append(np.array(group))
            group, taken = [], int(ends[place]) - begin
        group.append(place)
        last, end = (container, rows), int(ends[place])
    return [*groups, np.array(group, np.int64)]


def _rows(address: Address) -> int:
    """Number of the group of rows that holds a cell of a table; WHOLE where it is none, or cannot be read."""
    if address.storage != ROW:
        return WHOLE
    try:
        return table(address.container, state_of_container(address.container)).group_of(address.offset)[0]
    except ValueError:  # which decoding finds, too
        return WHOLE
