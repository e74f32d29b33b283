from __future__ import annotations

import unicodedata

import pytest

from spkd.eval.names import match


def known(*ids: str) -> dict[str, int]:
    return {name: i for i, name in enumerate(ids)}


@pytest.mark.parametrize(
    ("names", "ids"),
    [
        (["a", "b"], ["b", "a"]),
        ([unicodedata.normalize("NFD", "zoë/1")], [unicodedata.normalize("NFC", "zoë/1")]),
        ([unicodedata.normalize("NFC", "zoë/1")], [unicodedata.normalize("NFD", "zoë/1")]),
        (["wav/id1/x/1.wav", "wav/id2/x/1.wav"], ["id1/x/1.wav", "id2/x/1.wav"]),
        (["id1/x/1.wav", "id2/x/1.wav"], ["wav/id1/x/1.wav", "wav/id2/x/1.wav"]),
        (["a.wav", "b.wav"], ["a", "b"]),
        (["a.wav", "b.wav"], ["a.flac", "b.flac"]),
    ],
)
def test_names_are_matched_where_one_rule_fits_all(names: list[str], ids: list[str]) -> None:
    found = match(names, known(*ids))
    assert set(found) == set(names)
    assert set(found.values()) == set(ids)


@pytest.mark.parametrize(
    ("names", "ids", "found"),
    [
        (["a.wav", "c.wav"], ["a", "b"], {}),
        (["a.wav", "a.flac"], ["a"], {}),
        (["a.wav"], ["a", "a.flac"], {}),
        (["a", "x"], ["a"], {"a": "a"}),
    ],
)
def test_a_rule_that_is_not_sure_is_not_used(names: list[str], ids: list[str], found: dict[str, str]) -> None:
    assert match(names, known(*ids)) == found
