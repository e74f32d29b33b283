"""Values that no file of ours holds, put into every place of a JSON tree."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from typing import Any

FOREIGN: tuple[Any, ...] = (
    *(None, True, -1, 10**30, 10**400, 1e308, float("nan"), "x", "\ud800", [[]], {"\udcff": None}),
)


def changed(tree: Any) -> Iterator[tuple[str, Any]]:
    """The tree with one value after the other replaced by each of FOREIGN, or left out; equal values are not tried.

    Yields:
        Where the change is, and the tree, which is changed in place until the next one.
    """
    for path in list(_paths(tree, ())):
        parent, last = functools.reduce(operator.getitem, path[:-1], tree), path[-1]
        before = parent[last]
        for value in FOREIGN:
            if type(value) is not type(before) or value != before:
                parent[last] = value
                yield ".".join(map(str, path)), tree
        del parent[last]
        yield ".".join(map(str, path)), tree
        if isinstance(parent, list):
            parent.insert(last, before)
        else:
            parent[last] = before


def _paths(tree: Any, above: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Every place of a tree: names of objects, and the first of each list."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield (*above, name)
            yield from _paths(value, (*above, name))
    elif isinstance(tree, list) and tree:
        yield (*above, 0)
        yield from _paths(tree[0], (*above, 0))
