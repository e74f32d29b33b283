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
        (["a", "b"], ["a.wav", "b.wav"]),
        (["u1.ch1.wav", "u1.ch2.wav"], ["u1.ch1", "u1.ch2"]),
        (["taaaa:a", "tbbbb:b", "1001"], ["taaaa_A", "tbbbb_B", "1001"]),  # Kaldi's names of SRE08
        (["taaaa.sph:a", "tbbbb.sph:b"], ["taaaa_a", "tbbbb_b"]),
        (["taaaa:a", "tbbbb:a"], ["taaaa", "tbbbb"]),
        # CN-Celeb with its enroll.map and enroll.lst, and WeSpeaker's CNC-Eval-Concat.lst
        (["id8/sing-1.wav", "test/id8-sing-2.wav"], ["id8/sing-1", "test/id8-sing-2.wav"]),
        (["enroll/id8-enroll.wav", "test/id8-sing-2.wav"], ["id8-enroll", "test/id8-sing-2.wav"]),
        (["eval/enroll/id8-enroll.wav", "eval/test/id8-sing-2.wav"], ["id8-enroll", "test/id8-sing-2.wav"]),
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
        (["u1.ch2", "u2.ch2"], ["u1.ch1", "u2.ch1"], {}),  # another channel
        (["u1.v2"], ["u1.v1"], {}),
        (["u1.ch1", "u2.ch2"], ["u1", "u2"], {}),  # not one suffix
        (["t1:a", "t1:b"], ["t1"], {}),  # two sides, one utterance
        (["x/a.wav", "y/b.wav", "z/c.wav"], ["a", "b", "c"], {}),  # folders of speakers, say
        (["x/a.wav", "y/a.wav"], ["a", "b"], {}),
        (["x/a.wav", "b"], ["a", "a.flac", "b"], {"b": "b"}),
    ],
)
def test_a_rule_that_is_not_sure_is_not_used(names: list[str], ids: list[str], found: dict[str, str]) -> None:
    assert match(names, known(*ids)) == found
