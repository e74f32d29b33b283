from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from spkd.errors import SpkdError
from spkd.students import Checkpoint, build, save_student
from spkd.students.description import MOST_NAMES, Description, Names, People, Training
from tests.foreign import FOREIGN, changed


def test_names_are_kept_as_digests() -> None:
    names = Names.of(["bob", "ann", "ann"])
    expected = sorted(hashlib.sha256(name).digest()[:6] for name in (b"ann", b"bob"))
    assert base64.b64decode(names.digests) == b"".join(expected)
    assert (names.count, names.is_sample) == (2, False)
    assert names.shared(["carl", "bob", "bob"]) == ["bob"]
    assert names.with_those_of(Names.of(["bob", "carl"])) == Names.of(["ann", "bob", "carl"])
    assert Names(0).shared(["ann"]) == []


def test_a_large_set_is_sampled_evenly() -> None:
    names = Names.of(f"speaker{i}" for i in range(40_000))
    assert (names.count, names.is_sample, len(names.kept)) == (40_000, True, MOST_NAMES)
    found = len(names.shared(f"speaker{i}" for i in range(0, 40_000, 10)))
    assert abs(found - 1000) < 120  # a quarter of 4,000, four deviations
    assert len(names.with_those_of(Names.of(["another"])).kept) == MOST_NAMES


def test_every_changed_value_is_a_line_that_names_file_and_field(tmp_path: Path) -> None:
    """Wrong types, nulls, huge numbers, NaN, lone surrogates and missing names, at every place of the tree."""
    people = People(Names.of(["ann"]), Names.of(["u1"]))
    training = Training({"losses": {"aam": {}}, "caches": ["f"], "batch_size": 4}, 5, {"aam": 0.5}, people=people)
    save_student(tmp_path, Checkpoint(build("tiny", channels=16, embedding=8), training=training))
    path = tmp_path / "model.json"
    tree = json.loads(path.read_text())
    assert Description.read(path).training == training
    count = 0
    for field, damaged in changed(tree):
        path.write_text(json.dumps(damaged))
        with pytest.raises(SpkdError) as caught:
            Description.read(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert len(str(caught.value).splitlines()) == 1, field
        count += 1
    assert count > 15 * len(FOREIGN), count


@pytest.mark.parametrize("digests", ["?", "AAAA", "é", base64.b64encode(bytes(12)).decode()])
def test_digests_that_are_none_are_a_line(digests: str) -> None:
    content: dict[str, Any] = {"count": 1, "digests": digests}
    with pytest.raises(SpkdError, match="damaged"):
        _ = Names(**content).kept
