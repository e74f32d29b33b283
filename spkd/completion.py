"""Completion of settings in a shell: the keys of a command, and the values of those that have choices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from glob import escape, glob
from pathlib import Path

from spkd import config

MOST_FILES = 200
NAMES = "names"  # of components, where a value may be something else, too


def completed(schema: type, before: Sequence[str], word: str, files: bool = True) -> list[str]:
    """Settings with which a word can go on.

    Where one key alone fits, its values follow. There are two at least then, so that the shell adds no space after the
    equals sign that they begin with alike.

    Args:
        schema: dataclass of the command's settings.
        before: words of the command line before it.
        word: beginning of `key=value`.
        files: whether files are given, where the value of a key may be one.
    Returns:
        Items `key=` or `key=value`.
    """
    given = {name: value for name, equals, value in (item.partition("=") for item in before) if equals}
    known = _keys(schema, given)
    name, equals, value = word.partition("=")
    if equals:
        return [f"{name}={each}" for each in _values(known[name], value, files)] if name in known else []
    fitting = [each for each in known if each.startswith(word) and each not in given]
    if len(fitting) != 1:
        return [f"{each}=" for each in fitting]
    only = known[fitting[0]]
    every = [f"{fitting[0]}={each}" for each in _values(only, "", files)]
    return every if len(every) > 1 else [f"{fitting[0]}=", *every]


def _keys(schema: type, given: Mapping[str, str]) -> dict[str, config.Key]:
    """Every key as it is typed -> the key, of a command and of the components that are chosen."""
    own = {each.name: each for each in config.keys(schema)}
    known = {_short(schema, name): key for name, key in own.items()}
    for slot in config.slots(schema):
        chooser, default = _short(schema, slot.chooser), own[slot.chooser].default
        if isinstance(default, list):
            known[chooser] = replace(known[chooser], limits={"choices": tuple(slot.registry)})
        elif not known[chooser].choices:  # a name, or a file
            known[chooser] = replace(known[chooser], limits={NAMES: tuple(slot.registry)})
        chosen = given.get(chooser, given.get(slot.chooser))
        names = default if chosen is None else chosen.strip("[]").split(",")
        for name in slot.chosen(names):
            if name in slot.registry.ours:
                known |= slot.keys(name)
    return known


def _short(schema: type, name: str) -> str:
    """Key as it is typed: `teacher` for `teacher.name`."""
    section = name.rpartition(".")[0]
    return section if section and config.full_name(schema, section) == name else name


def _values(key: config.Key, begun: str, files: bool) -> Iterator[str]:
    """Values of a key that begin with a text: its choices, of a list after its last comma; or its default, or files."""
    head = ""
    if key.kind.startswith("list"):
        head, comma, begun = begun.removeprefix("[").rpartition(",")
        head = f"[{head}{comma}"
    choices = ("true", "false") if key.type is bool else key.choices
    if choices:
        yield from (f"{head}{choice}" for choice in choices if choice.startswith(begun) and choice not in head)
    elif key.type is str or "Path" in key.kind or NAMES in key.limits:
        yield from (name for name in key.limits.get(NAMES, ()) if name.startswith(begun))
        yield from sorted(_marked(path) for path in glob(f"{escape(begun)}*")[:MOST_FILES]) if files else ()
    elif str(key.default).startswith(begun) and not isinstance(key.default, list | dict) and key.default is not None:
        yield str(key.default)


def _marked(path: str) -> str:
    return f"{path}/" if Path(path).is_dir() else path


def of_bash(schema: type, words: Sequence[str], current: int) -> list[str]:
    """Settings with which a word can go on in bash, which divides words at the equals sign.

    Args:
        words: of the line as bash divides it: `key`, `=`, `value`.
        current: place of the word that is completed; also behind the last.
    Returns:
        As `completed`; of a value, the part behind the equals sign. Files are left to bash.
    """
    before: list[str] = []
    for word in words[:current]:
        if before and (word == "=" or before[-1].endswith("=")):
            before[-1] += word
        else:
            before.append(word)
    word = words[current] if current < len(words) else ""
    if before and (word == "=" or before[-1].endswith("=")):
        name = before.pop().removesuffix("=")
        items = completed(schema, before, f"{name}={word.removeprefix('=')}", files=False)
        return [item.removeprefix(f"{name}=") for item in items]
    return completed(schema, before, word, files=False)
