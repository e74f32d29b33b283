"""Numbers of millions of views that take no memory: they are looked up or computed where they are asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from spkd.files.mapped import MappedFile
from spkd.seeding import Purpose, random_state

IN_MEMORY = 1 << 20  # numbers up to which a random order is an array: 8 MB, made in 20 ms
AT_ONCE = 1 << 16  # numbers that are computed together where all are iterated over
ROUNDS = 6  # of a random order that is computed


class Lazy(NDArrayOperatorsMixin, ABC):
    """Sequence of numbers that is indexed like an array, and computed where it is; arithmetic takes it as a whole."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def stretch(self, start: int, stop: int) -> np.ndarray:
        """Numbers at the places `start` to `stop` - 1."""

    @abstractmethod
    def at(self, places: np.ndarray) -> np.ndarray:
        """Numbers at the given places (B,), which are not negative."""

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            return self.stretch(start, max(start, stop))[::step]
        places = np.asarray(key)
        if places.dtype == bool:
            places = np.flatnonzero(places)
        numbers = self.at(places.reshape(-1))
        return numbers[0] if places.ndim == 0 else numbers.reshape(places.shape)

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, len(self), AT_ONCE):
            yield from self.stretch(start, min(start + AT_ONCE, len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        whole = self[:]
        return whole if dtype is None else whole.astype(dtype, copy=False)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        return getattr(ufunc, method)(*(np.asarray(x) if isinstance(x, Lazy) else x for x in inputs), **options)


def as_array(lazy: Lazy) -> np.ndarray:
    """The same, by the type of arrays, whose place it takes."""
    array: Any = lazy
    return array


class Computed(Lazy):
    """Numbers that a function computes.

    Args:
        function: function of places (B,) and of `arguments` that gives the numbers (B,). It can be pickled.
    """

    def __init__(self, count: int, function: Callable[..., np.ndarray], *arguments: Any) -> None:
        self._count, self._function, self._arguments = count, function, arguments

    def __len__(self) -> int:
        return self._count

    def stretch(self, start: int, stop: int) -> np.ndarray:
        return self._function(np.arange(start, stop), *self._arguments)

    def at(self, places: np.ndarray) -> np.ndarray:
        if len(places) and (places.min() < 0 or places.max() >= self._count):
            raise IndexError(f"a place outside of 0 to {self._count - 1}")
        return self._function(places, *self._arguments)


class Column(Lazy):
    """One field of a section of a mapped file."""

    def __init__(self, file: MappedFile, section: str, name: str) -> None:
        self._file, self._section, self._name = file, section, name

    def __len__(self) -> int:
        return self._file.count(self._section)

    def stretch(self, start: int, stop: int) -> np.ndarray:
        return np.ascontiguousarray(self._file.part(self._section, start, stop)[self._name])

    def at(self, places: np.ndarray) -> np.ndarray:
        return self._file.take(self._section, self._name, places)


class Joined(Lazy):
    """Columns one after the other.

    Args:
        columns: arrays or columns.
        changes: function for each column that is applied to its numbers; None: they stay.
    """

    def __init__(
        self, columns: Sequence[Any], changes: Sequence[Callable[[np.ndarray], np.ndarray]] | None = None
    ) -> None:
        self._columns = columns
        self._changes: Sequence[Callable[..., np.ndarray]] = changes or [np.asarray] * len(columns)
        self._ends = np.cumsum([len(column) for column in columns])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def stretch(self, start: int, stop: int) -> np.ndarray:
        pieces = []
        for column, change, end in zip(self._columns, self._changes, self._ends.tolist(), strict=True):
            first = end - len(column)
            pieces.append(change(np.asarray(column[max(start - first, 0) : max(stop - first, 0)])))
        return np.concatenate(pieces)

    def at(self, places: np.ndarray) -> np.ndarray:
        if len(places) and (places.min() < 0 or places.max() >= len(self)):
            raise IndexError(f"a number outside of 0 to {len(self) - 1}")
        which = np.searchsorted(self._ends, places, side="right")
        numbers = np.empty(len(places), self.stretch(0, 0).dtype)
        for part in np.unique(which).tolist():
            inside, first = which == part, self._ends[part] - len(self._columns[part])
            numbers[inside] = self._changes[part](self._columns[part][places[inside] - first])
        return numbers


def picked(numbers: np.ndarray, places: np.ndarray) -> np.ndarray:
    """numbers[places]."""
    return as_array(Computed(len(places), _picked, numbers, places))


def _picked(at: np.ndarray, numbers: np.ndarray, places: np.ndarray) -> np.ndarray:
    return numbers[places[at]]


def all_but(count: int, left_out: np.ndarray) -> np.ndarray:
    """The numbers from 0 to `count` - 1 without those left out, which are sorted."""
    before = left_out - np.arange(len(left_out))  # numbers that are kept before each that is left out
    return as_array(Computed(count - len(left_out), _after_gaps, before))


def _after_gaps(places: np.ndarray, before: np.ndarray) -> np.ndarray:
    return places + np.searchsorted(before, places, side="right")


def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    """The numbers from 0 to `count` - 1 in a random order, which depends on the arguments alone.

    A long one is not stored: each place is encrypted by a Feistel network of `ROUNDS` rounds, until the number is below
    `count` (cycle walking: Black and Rogaway, CT-RSA 2002, section 4), which is a permutation.
    """
    random = random_state(Purpose.ORDER, seed, epoch)
    if count <= IN_MEMORY:
        return random.permutation(count)
    keys = random.randint(0, 2**32, (ROUNDS, 2), np.uint64)
    return as_array(Computed(count, _encrypted, count, keys[:, 0] << np.uint64(32) | keys[:, 1]))


def _encrypted(places: np.ndarray, count: int, keys: np.ndarray) -> np.ndarray:
    half = np.uint64(-(-max(count - 1, 1).bit_length() // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    numbers, todo = places.astype(np.uint64), np.arange(len(places))
    while len(todo):
        left, right = numbers[todo] >> half, numbers[todo] & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        numbers[todo] = left << half | right
        todo = todo[numbers[todo] >= count]
    return numbers.astype(np.int64)


def _mixed(bits: np.ndarray) -> np.ndarray:
    """Finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
