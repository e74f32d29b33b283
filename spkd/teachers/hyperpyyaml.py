"""SpeechBrain's settings files (HyperPyYAML), read as data: no object that they name is made or run."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from spkd.errors import UsageError
from spkd.teachers.toolkit import PlainLoader, check_keys, read_settings

REFERENCE = re.compile(r"<([\w.]+)>")
MOST_REFERENCES = 20  # references followed one after the other
Check = Callable[[Any], bool]


@dataclass(frozen=True)
class Tagged:
    """Value with a tag.

    Attributes:
        tag: tag without its exclamation mark: `new:CLASS`, `name:CLASS`, `ref`, ...
        value: text, a list or a mapping.
    """

    tag: str
    value: Any


class _TaggedLoader(PlainLoader):
    """YAML loader that keeps the tags of other programs, and refuses repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if repeated := [key for i, key in enumerate(keys) if key in keys[:i]]:
            raise yaml.constructor.ConstructorError(None, None, f"{repeated[0]} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _tagged(loader: _TaggedLoader, suffix: str, node: yaml.Node) -> Tagged:
    if isinstance(node, yaml.MappingNode):
        return Tagged(suffix, loader.construct_mapping(node, deep=True))
    if isinstance(node, yaml.SequenceNode):
        return Tagged(suffix, loader.construct_sequence(node, deep=True))
    return Tagged(suffix, node.value)


# Numbers as in YAML 1.2, which HyperPyYAML reads: 1e-10 is a number there.
_TaggedLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
_TaggedLoader.add_multi_constructor("!", _tagged)
_TaggedLoader.add_multi_constructor("tag:", _tagged)


@dataclass(frozen=True)
class Hyperparams:
    """Content of a settings file.

    Attributes:
        tree: content, with its tags.
    """

    path: Path
    tree: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Hyperparams:
        """Read a file. Raises UsageError where it is missing or is not a settings file."""
        return cls(path, read_settings(path, _TaggedLoader))

    def resolved(self, value: Any, where: str) -> Any:
        """Value after following its references.

        Raises:
            UsageError: a reference to a missing setting, a circle of references, or an expression.
        """
        for _ in range(MOST_REFERENCES):
            if not isinstance(value, Tagged) or value.tag not in ("ref", "copy"):
                return value
            match = REFERENCE.fullmatch(str(value.value).strip())
            if match is None:
                raise UsageError(
                    f"{self.path}: {where}: {str(value.value)[:60]!r} is an expression; write its value there"
                )
            node: Any = self.tree
            for name in match[1].split("."):
                node = node.value if isinstance(node, Tagged) else node
                if not isinstance(node, dict) or name not in node:
                    raise UsageError(f"{self.path}: {where}: refers to {match[1][:60]}, which is not there")
                node = node[name]
            value = node
        raise UsageError(f"{self.path}: {where}: references without end")

    def section(self, name: str) -> Section:
        """Object that the file describes, by its name among the modules or at the top level.

        Raises:
            UsageError: the file lacks it, or does not describe it by a class.
        """
        modules = self.resolved(self.tree.get("modules", {}), "modules")
        holder = modules if isinstance(modules, dict) and name in modules else self.tree
        if name not in holder:
            raise UsageError(f"{self.path}: no {name} there, which says what SpeechBrain runs")
        value = self.resolved(holder[name], name)
        if not isinstance(value, Tagged) or not value.tag.startswith("new:"):
            raise UsageError(f"{self.path}: {name}: expected `!new:CLASS` and its settings")
        arguments = {} if value.value in ("", None) else value.value
        if not isinstance(arguments, dict):
            raise UsageError(f"{self.path}: {name}: expected settings by name")
        return Section(self, name, value.tag.removeprefix("new:"), arguments)


@dataclass(frozen=True)
class Section:
    """Object that the file describes.

    Attributes:
        kind: name of its class.
    """

    file: Hyperparams
    name: str
    kind: str
    arguments: dict[str, Any]

    def check(self, kinds: Collection[str], known: Collection[str]) -> None:
        """Check class and settings. Raises UsageError for another class, or an unknown setting."""
        if self.kind not in kinds:
            raise UsageError(
                f"{self.file.path}: {self.name} is {self.kind[:100]}, which spkd does not have; taken: "
                f"{', '.join(kinds)}"
            )
        check_keys(self.arguments, known, f"{self.file.path}: {self.name}")

    def get(self, key: str, default: Any, fits: Check, expected: str) -> Any:
        """Value of a setting.

        Args:
            fits: function that tells whether a value is allowed.
        Raises:
            UsageError: a value that spkd does not support.
        """
        if key not in self.arguments:
            return default
        value = self.file.resolved(self.arguments[key], f"{self.name}.{key}")
        if isinstance(value, list):
            value = [self.file.resolved(item, f"{self.name}.{key}") for item in value]
        if not fits(value):
            raise UsageError(f"{self.file.path}: {self.name}.{key}={_shown(value)}; spkd takes {expected}")
        return value

    def whole(self, key: str, default: int | None, low: int, high: int) -> Any:
        """Value of an integer setting; may be None where that is the default."""
        return self.get(
            key, default, lambda v: (v is None and default is None) or (_is_whole(v) and low <= v <= high),
            f"{low} to {high}",
        )  # fmt: skip

    def number(self, key: str, default: float | None, low: float, high: float) -> Any:
        """Value of a numeric setting; may be None where that is the default."""
        return self.get(
            key, default, lambda v: (v is None and default is None) or (_is_number(v) and low <= v <= high),
            f"{low:g} to {high:g}",
        )  # fmt: skip

    def flag(self, key: str, default: bool) -> bool:
        """Value of a boolean setting."""
        return self.get(key, default, lambda v: isinstance(v, bool), "True or False")

    def choice(self, key: str, default: str, choices: Collection[str]) -> str:
        """Value of a setting with a choice of words."""
        return self.get(key, default, lambda v: isinstance(v, str) and v in choices, ", ".join(choices))

    def only(self, key: str, default: Any, *values: Any) -> None:
        """Check a setting of which spkd supports only some values. Raises UsageError for others."""
        self.get(key, default, lambda v: v in values, " or ".join(map(_shown, values)))
        if key not in self.arguments and default not in values:
            raise UsageError(
                f"{self.file.path}: {self.name}.{key} is not set, which is {_shown(default)}; spkd takes "
                f"{' or '.join(map(_shown, values))}"
            )

    def wholes(self, key: str, default: list[int], count: int) -> list[int]:
        """The first `count` integers of a setting, each at least 1; further ones are ignored, as in SpeechBrain."""

        def fits(value: Any) -> bool:
            return isinstance(value, list) and len(value) >= count and all(_is_whole(n) and 0 < n < 1000 for n in value)

        return self.get(key, default, fits, f"{count} whole numbers")[:count]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    """Value as it is written in a file. Nested values are not written out, since aliases may make them endless."""
    if isinstance(value, Tagged):
        return f"!{value.tag[:60]}"
    if isinstance(value, list):
        return "a list" if any(isinstance(v, list | dict) for v in value) else f"[{', '.join(map(_shown, value[:10]))}]"
    return "settings" if isinstance(value, dict) else repr(value)[:60]
