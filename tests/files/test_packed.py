"""Packed texts against lists of strings."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spkd.files import packed, spool
from spkd.files.packed import PackedTexts

TEXTS = st.lists(st.text(max_size=6), max_size=30)


@given(TEXTS, st.data())
def test_they_are_a_list_of_strings(texts: list[str], data: st.DataObject) -> None:
    made = PackedTexts.of(iter(texts))
    assert list(made) == texts
    assert made == texts
    assert len(made) == len(texts)
    assert pickle.loads(pickle.dumps(made)) == made
    assert made == PackedTexts.join([PackedTexts.of(texts[:3]), PackedTexts.of([]), PackedTexts.of(texts[3:])])
    numbers = data.draw(st.lists(st.integers(0, len(texts) - 1), max_size=9)) if texts else []
    assert made.take(np.array(numbers, np.int64)) == [texts[number] for number in numbers]
    start, stop, step = data.draw(st.tuples(*[st.integers(-5, 35)] * 2, st.sampled_from([-2, -1, 1, 2])))
    assert made[start:stop:step] == texts[start:stop:step]
    for number in range(-len(texts), len(texts)):
        assert made[number] == texts[number]


@given(TEXTS, st.text(max_size=6), st.booleans())
def test_places_are_those_of_a_dictionary(texts: list[str], other: str, are_many: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if are_many:
            patch.setattr(packed, "SORTED", 4)
            patch.setattr(packed, "AT_ONCE", 3)
            patch.setattr(spool, "AT_ONCE", 3)
            patch.setattr(spool, "IN_MEMORY", 9)
        check_places(texts, other)


def check_places(texts: list[str], other: str) -> None:
    made, known = PackedTexts.of(texts), {text: number for number, text in reversed(list(enumerate(texts)))}
    assert {text: made.places[text] for text in known} == known
    assert (other in made, made.places.get(other)) == (other in known, known.get(other))
    seen: set[str] = set()
    repeated = next((text for text in texts if text in seen or seen.add(text)), None)  # type: ignore[func-returns-value]
    assert made.repeated() == repeated


def test_names_of_files_that_are_not_utf8() -> None:
    assert list(PackedTexts.of(["a\udcff", "ü"])) == ["a\udcff", "ü"]


def test_equal_hashes_are_no_equal_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "hash_of", len)
    made = PackedTexts.of(["a", "bb", "c", "dd", "c"])
    assert [made.places[text] for text in ("a", "bb", "dd")] == [0, 1, 3]
    assert "e" not in made
    assert "eee" not in made
    assert made.repeated() == "c"
    assert PackedTexts.of(["a", "b"]).repeated() is None


@pytest.mark.parametrize(
    ("data", "ends"), [(b"ab", [1]), (b"ab", [2, 1, 2]), (b"\xff", [1]), ("ü".encode(), [1, 2]), (b"a", [1, 2])]
)
def test_arrays_that_are_no_texts(data: bytes, ends: list[int]) -> None:
    assert PackedTexts(np.frombuffer(data, np.uint8), np.array(ends)).is_damaged()
    whole = PackedTexts.of(["ü", "", "a"])
    assert not whole.is_damaged()
