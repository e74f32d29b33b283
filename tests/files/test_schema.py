from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from spkd.errors import SpkdError
from spkd.files.schema import convert, record


@dataclass(frozen=True)
class Inner:
    size: int = field(metadata={"low": 1, "high": 9})


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner
    numbers: tuple[float, ...] = ()
    table: dict[int, str] = field(default_factory=dict)
    maybe: int | None = None


GOOD: dict[str, Any] = {"name": "a", "inner": {"size": 3}, "numbers": [1, 2.5], "table": {"7": "x"}, "maybe": None}


def test_a_tree_becomes_its_dataclass() -> None:
    assert record(Outer, GOOD, "f") == Outer("a", Inner(3), (1.0, 2.5), {7: "x"}, None)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"name": 3}, "name must be text"),
        ({"inner": {"size": 10}}, "at most 9"),
        ({"inner": {"size": 0}}, "at least 1"),
        ({"inner": {"size": True}}, "whole number"),
        ({"inner": {"size": "3"}}, "whole number"),
        ({"inner": {"size": 3, "more": 1}}, "unknown name 'more'"),
        ({"inner": {}}, "size is missing"),
        ({"inner": []}, "expected an object"),
        ({"numbers": [float("nan")]}, "finite"),
        ({"numbers": [10**400]}, "must be a number"),
        ({"numbers": 5}, "must be a list"),
        ({"table": {"x": "y"}}, "whole number"),
        ({"maybe": 1.5}, "whole number"),
        ({"other": 1}, "unknown name 'other'"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], expected: str) -> None:
    with pytest.raises(SpkdError, match=f"^f.*{expected}"):
        record(Outer, GOOD | change, "f")


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (str, "010", "010"),
        (str, "no", "no"),
        (str, "${HOME}", "${HOME}"),
        (str | None, "null", None),
        (str | None, "", None),
        (int, "010", 10),
        (float, "1e-3", 0.001),
        (float, "+.5E1", 5.0),
        (bool, "Yes", True),
        (bool, "off", False),
        (list[float], ["0.9", "1"], [0.9, 1.0]),
    ],
)
def test_text_is_read_by_the_type_that_is_asked_for(kind: Any, text: Any, value: Any) -> None:
    assert convert(kind, text, text=True) == value


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (int, "1_000"),
        (int, "0x1F"),
        (int, "12:30"),
        (float, "inf"),
        (bool, "2"),
        (int, "9" * 5000),
        (int, "\u0663"),
        (float, " 1"),
        (float, "nan"),
        (str, ""),
        (str, "a\0"),
    ],
)
def test_text_that_is_no_such_value_is_refused(kind: Any, text: str) -> None:
    with pytest.raises(ValueError, match="must"):
        convert(kind, text, text=True)
