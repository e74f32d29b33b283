"""Texts of millions of utterances in two arrays, since a list of as many strings takes ten times their bytes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain, islice
from typing import Any

import numpy as np

AT_ONCE = 1 << 16  # texts that are decoded together
ERRORS = "surrogatepass"  # names of files may have bytes that are not UTF-8, which Python keeps as surrogates


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
        parts, rest = list[PackedTexts](), iter(texts)
        while encoded := [text.encode(errors=ERRORS) for text in islice(rest, AT_ONCE)]:
            ends = np.cumsum([len(each) for each in encoded], dtype=np.int64)
            parts.append(cls(np.frombuffer(b"".join(encoded), np.uint8), ends))
        return cls.join(parts)

    @classmethod
    def join(cls, parts: Sequence[PackedTexts]) -> PackedTexts:
        """The texts of several sequences, one after the other."""
        if len(parts) == 1:
            return parts[0]
        before = np.cumsum([0, *(len(part.data) for part in parts)]).tolist()
        ends = [part.ends + count for part, count in zip(parts, before, strict=False)]
        empty = np.zeros(0, np.uint8), np.zeros(0, np.int64)
        return cls(np.concatenate([empty[0], *(part.data for part in parts)]), np.concatenate([empty[1], *ends]))

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
        begin = int(self.ends[start - 1]) if start else 0
        for place in range(start, stop, AT_ONCE):
            ends = self.ends[place : min(place + AT_ONCE, stop)].tolist()
            data, first = self.data[begin : ends[-1]].tobytes(), begin
            for end in ends:
                yield data[begin - first : end - first].decode(errors=ERRORS)
                begin = end

    def __contains__(self, text: object) -> bool:
        return text in self.places

    def __eq__(self, other: object) -> bool:
        if isinstance(other, PackedTexts):
            return np.array_equal(self.ends, other.ends) and np.array_equal(self.data, other.data)
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(str.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]

    def __getstate__(self) -> dict[str, Any]:
        # Hashes of texts are those of this process.
        return {"data": self.data, "ends": self.ends}

    def take(self, numbers: np.ndarray) -> PackedTexts:
        """The texts of the given numbers (B,), in this order."""
        begins = np.concatenate([np.zeros(1, np.int64), self.ends])[:-1][numbers]
        lengths = self.ends[numbers] - begins
        ends = np.cumsum(lengths)
        data = np.empty(int(ends[-1]) if len(ends) else 0, np.uint8)
        for start in range(0, len(numbers), AT_ONCE):  # the places of all bytes take eight times as many
            part = slice(start, start + AT_ONCE)
            first, last = int(ends[start] - lengths[start]), int(ends[part][-1])
            shift = np.repeat(begins[part] - (ends[part] - lengths[part]), lengths[part])
            data[first:last] = self.data[np.arange(first, last) + shift]
        return PackedTexts(data, ends)

    @cached_property
    def places(self) -> Places:
        """Each text -> its number; of equal texts one of them."""
        return Places(self)

    def repeated(self) -> str | None:
        """The first text that is there a second time; None where all differ."""
        hashes, order = self.places.hashes, self.places.order
        doubtful = np.flatnonzero(hashes[1:] == hashes[:-1])
        pairs = sorted((int(max(order[i : i + 2])), i) for i in doubtful.tolist())
        if not pairs:
            return None
        seen = set[str]()
        for number in sorted(set(chain.from_iterable(order[i : i + 2].tolist() for _, i in pairs))):
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


class Places(Mapping[str, int]):
    """Numbers of texts, found by their hashes: 12 bytes for each, where a dictionary takes 100 and the texts.

    Attributes:
        hashes: (N,) hashes of the texts, ascending.
        order: (N,) numbers of the texts in this order.
    """

    def __init__(self, texts: PackedTexts) -> None:
        self._texts = texts
        hashes = np.fromiter(map(hash, texts), np.int64, len(texts))
        self.order = np.argsort(hashes, kind="stable").astype(np.int32 if len(texts) < 2**31 else np.int64)
        self.hashes = hashes[self.order]
        self._view = memoryview(self.hashes)

    def __len__(self) -> int:
        return len(self._texts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._texts)

    def __getitem__(self, text: str) -> int:
        wanted = hash(text)
        place = bisect_left(self._view, wanted)
        while place < len(self._view) and self._view[place] == wanted:
            if self._texts[number := int(self.order[place])] == text:
                return number
            place += 1
        raise KeyError(text)
