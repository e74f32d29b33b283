from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st

from spkd.files import digest


def test_digests_are_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abcdef")
    expected = hashlib.sha256(b"abcdef").hexdigest()
    assert digest.of_bytes(b"abc", b"def") == digest.of_blocks([b"abcd", b"ef"]) == expected
    assert digest.of_file(tmp_path / "x") == expected


def test_a_tree_is_known_whatever_the_order_of_its_keys() -> None:
    assert digest.of_tree({"a": 1, "b": [1.5]}) == digest.of_tree(json.loads('{"b": [1.5], "a": 1}'))
    assert digest.of_tree({"a": 1}) != digest.of_tree({"a": 2})


@given(st.dictionaries(st.integers() | st.floats(allow_nan=False) | st.booleans(), st.text(max_size=3), max_size=30))
def test_a_tree_is_known_as_it_is_read_back(tree: dict[object, str]) -> None:
    assert digest.of_tree(tree) == digest.of_tree(json.loads(json.dumps(tree)))


def test_tensors_are_known_whatever_file_they_came_in() -> None:
    a, b = torch.arange(6.0).reshape(2, 3), torch.ones(2)
    expected = hashlib.sha256(b"a" + a.numpy().tobytes() + b"b" + b.numpy().tobytes()).hexdigest()
    assert digest.of_tensors({"b": b, "a": a}) == expected
    assert digest.of_tensors({"a": a.T.contiguous().T, "b": b}) == expected
