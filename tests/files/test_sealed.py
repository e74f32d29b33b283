from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

from spkd.errors import SpkdError
from spkd.files.sealed import Format, open_tensors, seal_tensors

FORMAT = Format("spkd_thing", 3, "a thing", "make it again")


def opened(tree: Any) -> dict[str, Any]:
    return FORMAT.open(json.loads(json.dumps(tree)), "f.json", lambda content, where: content)


def test_what_is_sealed_is_opened_whatever_its_layout() -> None:
    tree = FORMAT.seal({"b": (1, 2.5), "a": {"x": "é"}})
    expected = hashlib.sha256(b'{"a": {"x": "\\u00e9"}, "b": [1, 2.5]}').hexdigest()
    assert (tree["spkd_thing"], tree["digest"]) == (3, expected)
    assert opened(dict(sorted(tree.items()))) == {"b": [1, 2.5], "a": {"x": "é"}}


@pytest.mark.parametrize("change", [{"b": [1, 2.4]}, {"a": {}}, {"digest": ""}, {"digest": None}, {"c": 1}])
def test_a_changed_value_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(SpkdError, match=r"^f.json: damaged \(its values are not those of its digest\)"):
        opened(FORMAT.seal({"b": (1, 2.5), "a": {"x": "é"}}) | change)


@pytest.mark.parametrize("tree", [None, [], 3, {}, {"spkd_thing": 2}, {"spkd_thing": "3"}, {"spkd_thing": 3.0}])
def test_another_kind_or_format_is_refused_with_its_remedy(tree: Any) -> None:
    with pytest.raises(SpkdError, match=r"^f.json: not a thing of format 3; make it again"):
        opened(tree)


def test_the_same_tensors_give_the_same_bytes() -> None:
    tensors = {"b": np.arange(3.0), "a": np.arange(5, dtype=np.int8)}
    metadata = dict.fromkeys("defghi", "x")
    assert len({data := seal_tensors(save, tensors, metadata) for _ in range(20)}) == 1
    assert {name: values.tolist() for name, values in load(data).items()} == {"a": [0, 1, 2, 3, 4], "b": [0, 1, 2]}


def test_every_flipped_bit_in_sealed_tensors_is_found() -> None:
    tensors = {"b": np.arange(3, dtype=np.float16), "a": np.ones((2, 1), np.float32)}
    good = seal_tensors(save, tensors, {"errors": "{}"})
    assert open_tensors(good, "f") == {"errors": "{}"}
    assert open_tensors(seal_tensors(save, {}), "f") == {}
    assert {name: values.tolist() for name, values in load(good).items()} == {"a": [[1], [1]], "b": [0, 1, 2]}
    for whole in (good, seal_tensors(save, {}, {"errors": "{}"})):
        for at in range(8 * len(whole)):
            flipped = bytearray(whole)
            flipped[at // 8] ^= 1 << at % 8
            with pytest.raises(SpkdError, match="^f: damaged"):
                open_tensors(bytes(flipped), "f")
    with pytest.raises(SpkdError, match="^f: damaged"):
        open_tensors(save(tensors), "f")
