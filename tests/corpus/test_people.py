from __future__ import annotations

import base64
import hashlib
from typing import Any

import pytest

from spkd.corpus.people import MOST_NAMES, Names
from spkd.errors import SpkdError


def test_names_are_kept_as_digests() -> None:
    names = Names.of(["bob", "ann", "ann"])
    expected = sorted(hashlib.sha256(name).digest()[:6] for name in (b"ann", b"bob"))
    assert base64.b64decode(names.digests) == b"".join(expected)
    assert (names.count, names.is_sample) == (2, False)
    assert names.shared(["carl", "bob", "bob"]) == ["bob"]
    assert names.with_those_of(Names.of(["bob", "carl"])) == Names.of(["ann", "bob", "carl"])
    assert Names(0).shared(["ann"]) == []


def test_a_name_is_one_however_accents_are_written() -> None:
    assert Names.of(["Jos\u00e9"]).shared(["Jose\u0301", "Jose"]) == ["Jose\u0301"]


def test_a_large_set_is_sampled_evenly() -> None:
    names = Names.of(f"speaker{i}" for i in range(40_000))
    assert (names.count, names.is_sample, len(names.kept)) == (40_000, True, MOST_NAMES)
    found = len(names.shared(f"speaker{i}" for i in range(0, 40_000, 10)))
    assert abs(found - 1000) < 120  # a quarter of 4,000, four deviations
    assert len(names.with_those_of(Names.of(["another"])).kept) == MOST_NAMES


@pytest.mark.parametrize("digests", ["?", "AAAA", "é", base64.b64encode(bytes(12)).decode()])
def test_digests_that_are_none_are_a_line(digests: str) -> None:
    content: dict[str, Any] = {"count": 1, "digests": digests}
    with pytest.raises(SpkdError, match="damaged"):
        _ = Names(**content).kept
