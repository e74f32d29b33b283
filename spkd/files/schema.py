"""Conversion of plain values from JSON, YAML and command lines to typed dataclasses.

Values from a file or a user are checked here before they are used: types, finite numbers, ranges, unknown and missing
names. A range is declared with the field, as `metadata={"low": 1, "high": 8}`, and includes its bounds; of a list or
dict, it holds for every item.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import types
from collections.abc import Mapping
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from spkd.errors import SpkdError, did_you_mean

Record = TypeVar("Record")
NUMBER = re.compile(r"[-+.0-9A-Za-z]{1,40}")  # what Python takes besides: underscores, spaces, digits of every script
TRUE, FALSE, NULL = ("true", "yes", "on", "1"), ("false", "no", "off", "0"), ("null", "none", "~", "")


@functools.cache
def type_hints(kind: type) -> Mapping[str, Any]:
    """Name of each field of a dataclass -> its type. One record is read for every unit and every key of a command."""
    return types.MappingProxyType(get_type_hints(kind))


def record(kind: type[Record], tree: Any, where: str) -> Record:
    """A dataclass from a JSON object.

    Raises:
        SpkdError: not an object, an unknown or missing name, or a value of the wrong type or outside its range.
    """
    if not isinstance(tree, dict):
        raise SpkdError(f"{where}: damaged (expected an object, found {type(tree).__name__})")
    hints, fields = type_hints(cast(type, kind)), {f.name: f for f in dataclasses.fields(cast(Any, kind))}
    for name in tree:
        if name not in fields:
            raise SpkdError(f"{where}: damaged (unknown name {str(name)[:40]!r})")
    values = {}
    for name, field in fields.items():
        if name in tree:
            try:
                values[name] = convert(hints[name], tree[name], field.metadata, f"{where}: {name}")
            except ValueError as error:
                raise SpkdError(f"{where}: damaged ({name} {error})") from error
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise SpkdError(f"{where}: damaged ({name} is missing)")
    return kind(**values)


def convert(
    kind: Any, value: Any, limits: Mapping[str, Any] = types.MappingProxyType({}), where: str = "", text: bool = False
) -> Any:
    """Convert a value to a type: bool, int, float, str, None, lists, tuples, dicts, dataclasses and unions with None.

    Args:
        limits: metadata of the field: `low` and `high`, the bounds of numbers; `positive`; `choices`.
        text: whether strings stand for numbers, truth values and null, as on a command line.
    Raises:
        ValueError: the value does not have the type, or is outside its limits; the message follows the value's name.
    """
    # Any, unions and dataclasses.
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None or (text and isinstance(value, str) and value.lower() in NULL):
            return None
        return convert(next(a for a in arguments if a is not type(None)), value, limits, where, text)
    if dataclasses.is_dataclass(kind):
        return record(cast(Any, kind), value, where)
    # Lists, tuples and dicts, item by item.
    if origin is list or (origin is tuple and arguments[-1] is Ellipsis):
        if not isinstance(value, list | tuple):
            raise ValueError(f"must be a list, not {_shown(value)}")
        items = [convert(arguments[0], item, limits, f"{where}[{i}]", text) for i, item in enumerate(value)]
        return items if origin is list else tuple(items)
    if origin is tuple:
        if not isinstance(value, list | tuple) or len(value) != len(arguments):
            raise ValueError(f"must be a list of {len(arguments)}, not {_shown(value)}")
        pairs = zip(arguments, value, strict=True)
        return tuple(convert(kind, item, limits, f"{where}[{i}]", text) for i, (kind, item) in enumerate(pairs))
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"must be a mapping, not {_shown(value)}")
        key, item = arguments
        return {
            convert(key, k, text=text or key is not str): convert(item, v, limits, f"{where}.{k}", text)
            for k, v in value.items()
        }
    return _within(_scalar(kind, value, text), limits)


def _scalar(kind: type, value: Any, text: bool) -> Any:
    written = value.lower() if text and isinstance(value, str) else None
    if kind is str and isinstance(value, str):
        if not value.isascii() and any(
            "\ud800" <= character <= "\udfff" for character in value
        ):  # half of a surrogate pair
            raise ValueError("must be text that UTF-8 can write")
        if text and (not value or "\0" in value):
            raise ValueError("must not hold the character NUL" if value else "must not be empty")
        return value
    if kind is bool:
        if isinstance(value, bool):
            return value
        if written in TRUE or written in FALSE:
            return written in TRUE
        raise ValueError(f"must be true or false, not {_shown(value)}")
    if kind in (int, float):
        try:
            if written is not None and NUMBER.fullmatch(written):
                return kind(written) + 0  # no negative zero
            if (
                isinstance(value, int | float)
                and not isinstance(value, bool)
                and (kind is float or value == int(value))
            ):
                return kind(value)
        except (ValueError, OverflowError):
            pass
    names = {int: "a whole number", float: "a number", str: "text"}
    raise ValueError(f"must be {names.get(kind, kind)}, not {_shown(value)}")


def _within(value: Any, limits: Mapping[str, Any]) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"must be a finite number, not {value}")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"must be a number of 64 bits, not {_shown(value)}")
    if isinstance(value, int | float) and not isinstance(value, bool):
        low, high = limits.get("low"), limits.get("high")
        if low is not None and value < low:
            raise ValueError(f"must be at least {low:g}, not {value:g}")
        if high is not None and value > high:
            raise ValueError(f"must be at most {high:g}, not {value:g}")
        if limits.get("positive") and value <= 0:
            raise ValueError(f"must be positive, not {value:g}")
    choices = limits.get("choices")
    if choices and value not in choices:
        raise ValueError(f"has no choice {_shown(value)}{did_you_mean(str(value), choices)}")
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
