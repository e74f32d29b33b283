from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest

from spkd.errors import SpkdError
from spkd.files.sealed import Format

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
