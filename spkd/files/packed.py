"""Texts of millions of utterances in two arrays, since a list of as many strings takes ten times their bytes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from hashlib import blake2b
from itertools import chain, islice
from typing import Any

import numpy as np

from spkd.files.spool import AT_ONCE, Spool, numbers_in, rows_of, spooled, stretches

ERRORS = "surrogatepass"  # names of files may have bytes that are not UTF-8, which Python keeps as surrogates
SORTED = 1 << 18  # hashes that are sorted together, on average


class PackedTexts(Sequence[str]):
    """Sequence of texts, made where it is indexed.

    Args:
        data: (bytes,) all texts in UTF-8, one after the other.
        ends: (N,) end of each text in `data`, int64.
    """

    def __init__(self, data: np.ndarray, ends: np.ndarray) -> None:
        self.data, self.ends = data, ends

    @classmethod
    def of(cls, texts: Iterable[str]) -> PackedTexts:
        """These texts; those that are packed already, as they are."""
        if isinstance(texts, PackedTexts):
            return texts
        packing = Packing()
        packing.add(texts)
        return packing.texts()

    @classmethod
    def join(cls, parts: Sequence[PackedTexts]) -> PackedTexts:
        """The texts of several sequences, one after the other."""
        if len(parts) == 1:
            return parts[0]
        packing = Packing()
        for part in parts:
            packing.add_packed(part)
        return packing.texts()

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, key: Any) -> Any:
        """A text, or a list of those of a slice."""
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            return list(self._stretch(start, stop)) if step == 1 else [self[n] for n in range(start, stop, step)]
        number = range(len(self))[key]
        begin = int(self.ends[number - 1]) if number else 0
        return self.data[begin : int(self.ends[number])].tobytes().decode(errors=ERRORS)

    def __iter__(self) -> Iterator[str]:
        return self._stretch(0, len(self))

    def _stretch(self, start: int, stop: int) -> Iterator[str]:
        return (each.decode(errors=ERRORS) for each in self.encoded(start, stop))

    def encoded(self, start: int, stop: int) -> Iterator[bytes]:
        """The texts `start` to `stop` - 1 in UTF-8."""
        begin = int(self.ends[start - 1]) if start else 0
        for place in range(start, stop, AT_ONCE):
            ends = self.ends[place : min(place + AT_ONCE, stop)].tolist()
            data, first = self.data[begin : ends[-1]].tobytes(), begin
            for end in ends:
                yield data[begin - first : end - first]
                begin = end

    @property
    def empty(self) -> int:
        """Number of texts that are empty."""
        begin = np.zeros(1, np.int64)
        count = 0
        for ends in stretches(self.ends):
            count += int((np.diff(ends, prepend=begin) == 0).sum())
            begin = ends[-1:]
        return count

    def __contains__(self, text: object) -> bool:
        return text in self.places

    def __eq__(self, other: object) -> bool:
        if isinstance(other, PackedTexts):
            return np.array_equal(self.ends, other.ends) and np.array_equal(self.data, other.data)
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(str.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]

    def __getstate__(self) -> dict[str, Any]:
        # Places are found again, faster than they are passed on.
        return {"data": self.data, "ends": self.ends}

    def take(self, numbers: np.ndarray) -> PackedTexts:
        """The texts of the given numbers (B,), or those of a mask (N,), in this order."""
        packing = Packing()
        for part in numbers_in(numbers):
            rows, ends = rows_of(part, self.ends)
            packing.add_packed(PackedTexts(self.data[rows], ends))
        return packing.texts()

    @cached_property
    def places(self) -> Places:
        """Each text -> its number; of equal texts one of them."""
        return Places.of(self)

    def repeated(self) -> str | None:
        """The first text that is there a second time; None where all differ."""
        hashes, order, begin = self.places.hashes, self.places.order, 0
        pairs: list[tuple[int, int]] = []  # numbers of texts of one hash
        for part in stretches(hashes[1:]):
            at = begin + np.flatnonzero(part == hashes[begin : begin + len(part)])
            pairs += zip(order[at].tolist(), order[at + 1].tolist(), strict=True)
            begin += len(part)
        seen = set[str]()
        for number in sorted(set(chain.from_iterable(pairs))):
            if (text := self[number]) in seen:
                return text
            seen.add(text)
        return None

    def is_damaged(self) -> bool:
        """Whether the arrays are no texts: ends that do not rise up to the last byte, or bytes that are not UTF-8."""
        last = int(self.ends[-1]) if len(self.ends) else 0
        if (np.diff(self.ends, prepend=0) < 0).any() or last != len(self.data):
            return True
        try:
            self.data.tobytes().decode()
        except UnicodeDecodeError:
            return True
        begins = self.ends[self.ends < last]
        return bool(((self.data[begins] & 0xC0) == 0x80).any())  # within a character


class Packing:
    """Texts that are being packed."""

    def __init__(self) -> None:
        self._data, self._ends = Spool(np.uint8), Spool(np.int64)

    def add(self, texts: Iterable[str]) -> None:
        """Add texts, which are taken one by one."""
        rest = iter(texts)
        while encoded := [text.encode(errors=ERRORS) for text in islice(rest, AT_ONCE)]:
            ends = np.cumsum([len(each) for each in encoded], dtype=np.int64)
            self.add_packed(PackedTexts(np.frombuffer(b"".join(encoded), np.uint8), ends))

    def add_packed(self, texts: PackedTexts) -> None:
        before = len(self._data)
        self._data.add(texts.data)
        for ends in stretches(texts.ends):
            self._ends.add(ends + before)

    def texts(self) -> PackedTexts:
        """All that was added so far."""
        return PackedTexts(self._data.array(), self._ends.array())


class Places(Mapping[str, int]):
    """Numbers of texts, found by their hashes: 12 bytes for each, where a dictionary takes 100 and the texts.

    Args:
        hashes: (N,) hashes of the texts, ascending; uint64.
        order: (N,) numbers of the texts in this order.
    """

    def __init__(self, texts: PackedTexts, hashes: np.ndarray, order: np.ndarray) -> None:
        self._texts, self.hashes, self.order = texts, hashes, order
        self._view = hashes.data

    @classmethod
    def of(cls, texts: PackedTexts) -> Places:
        """Places of texts. Hashes are sorted by ranges of their values, of which each takes little memory."""
        encoded = iter(texts.encoded(0, len(texts)))
        all_hashes = spooled(
            np.uint64,
            (
                np.fromiter(map(hash_of, islice(encoded, AT_ONCE)), np.uint64, min(AT_ONCE, len(texts) - start))
                for start in range(0, len(texts), AT_ONCE)
            ),
        )
        hashes, order = Spool(np.uint64), Spool(np.int32 if len(texts) < 2**31 else np.int64)
        for numbers in by_ranges(all_hashes):
            values = all_hashes[numbers]
            by_value = np.argsort(values, kind="stable")
            hashes.add(values[by_value])
            order.add(numbers[by_value])
        return cls(texts, hashes.array(), order.array())

    def __len__(self) -> int:
        return len(self._texts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._texts)

    def __getitem__(self, text: str) -> int:
        wanted = hash_of(text.encode(errors=ERRORS))
        place = bisect_left(self._view, wanted)
        while place < len(self._view) and self._view[place] == wanted:
            if self._texts[number := int(self.order[place])] == text:
                return number
            place += 1
        raise KeyError(text)


def by_ranges(hashes: np.ndarray) -> Iterator[np.ndarray]:
    """Numbers of hashes (N,) by ranges of their values, from the lowest to the highest; equal ones are in one range."""
    ranges = 1 + len(hashes) // SORTED
    for part in range(ranges):
        low, last = part * 2**64 // ranges, (part + 1) * 2**64 // ranges - 1
        start, found = 0, [np.zeros(0, np.int64)]
        for some in stretches(hashes):
            found.append(start + np.flatnonzero((some >= np.uint64(low)) & (some <= np.uint64(last))))
            start += len(some)
        yield np.concatenate(found)


def hash_of(text: bytes) -> int:
    """Hash of a text in UTF-8, below 2**64; the same in every process."""
    return int.from_bytes(blake2b(text, digest_size=8).digest())
