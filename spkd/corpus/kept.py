"""Values that are kept for a while, such as open files and decompressed audio."""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")
_all: weakref.WeakSet[Kept] = weakref.WeakSet()


def _renew_all() -> None:
    for kept in list(_all):
        kept._renew_locks()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)


class Kept(Generic[Value]):
    """The values used last, each made once however many threads ask for it.

    Args:
        most: most of what `size` gives for all values together.
        size: function of a value.
        least: number of values, of those that were used last, that stay whatever their sizes.
    """

    def __init__(self, most: int, size: Callable[[Value], int], least: int = 1) -> None:
        self._most, self._size, self._least = most, size, least
        self._values: OrderedDict[Hashable, Value] = OrderedDict()
        self._taken = 0
        self._renew_locks()
        _all.add(self)

    def _renew_locks(self) -> None:
        """Make new locks, for a forked process: threads of the other one hold the old ones for ever."""
        self._made: dict[Hashable, threading.Lock] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value of a key, made where it is not kept. Raises what `make` raises."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
            making = self._made.setdefault(key, threading.Lock())
        with making:
            with self._lock:
                if key in self._values:
                    return self._values[key]
            try:
                value = make()
                with self._lock:
                    self._values[key] = value
                    self._taken += self._size(value)
                    while self._taken > self._most and len(self._values) > self._least:
                        _, dropped = self._values.popitem(last=False)
                        self._taken -= self._size(dropped)
            finally:
                with self._lock:
                    self._made.pop(key, None)
        return value
