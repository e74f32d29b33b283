"""Settings: dataclasses filled from recipes, files, environment and `key=value`.

Precedence, lowest first: the defaults of the dataclass, a recipe, `spkd.yaml` (or `--config FILE`), environment
variables `SPKD_<KEY>` (dots as double underscores: `SPKD_TEACHER__WEIGHTS`), `key=value` on the command line.
A plain value for a section sets its first key: `teacher=wavlm` is `teacher.name=wavlm`.

Each component that is chosen by name declares its settings: `student.ssl.layers` belongs to `student=ssl`. A setting
that is not in use is an error if it was typed. If it comes from a file, a recipe or the environment, which several runs
share, it is left out with a note.

The type of a key decides how its text is read: `cache=010` and `cache=no` are the folders `010` and `no`. Values are
not interpolated: `${...}` stays as it is written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shlex
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar, cast

from spkd.errors import SpkdError, UsageError, did_you_mean, listed, public_address, synonym
from spkd.files.reading import MOST_OF_SETTINGS, PROTOCOLS, is_foreign, read_text
from spkd.files.schema import convert, type_hints
from spkd.progress import log
from spkd.registry import COMMANDS, Registry, section_of

Schema = TypeVar("Schema")
RECIPES = Path(__file__).parent / "recipes"
SETTINGS_FILE = "spkd.yaml"
MOST_HINTS = 3


class Given(NamedTuple):
    """A value as a user wrote it.

    Attributes:
        where: file, variable or argument, for errors.
        value: text, or a list or mapping of a YAML file.
        typed: whether it was typed on the command line, rather than taken from a file, a recipe or the environment.
        from_file: whether it was taken from a file, which may be anybody's.
    """

    where: str
    value: Any
    typed: bool
    from_file: bool = False


def key(
    default: Any,
    meaning: str,
    choices: Iterable[str] = (),
    low: float | None = None,
    high: float | None = None,
    positive: bool = False,
    not_from_files: Collection[str] = (),
    is_replaced: bool = False,
) -> Any:
    """A dataclass field with its meaning, and optionally its choices or its range.

    Args:
        meaning: text for --help.
        choices: all valid values, such as the names of a registry; () where any value is valid.
        low: least number allowed, also for each item of lists and dicts.
        positive: whether numbers must be above 0.
        not_from_files: values that a settings file, which may be anybody's, cannot give.
        is_replaced: whether the command replaces what is there under the name that the value is. A settings file cannot
            name what is outside of the current folder.
    """
    limits = {"low": low, "high": high, "positive": positive, "choices": choices}
    metadata = {"meaning": meaning, "not_from_files": not_from_files, "is_replaced": is_replaced, **limits}
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def section(kind: type) -> Any:
    """A dataclass field whose keys are those of another dataclass."""
    return field(default_factory=kind)


def component(registry: Registry, otherwise: str = "") -> Any:
    """A dataclass field for the settings of the component that the dataclass's first key chooses.

    Where that key is a list, the field is a mapping from each chosen name to the settings of that component.

    Args:
        otherwise: name of the component that is chosen by a name which is not in the registry.
    """
    return field(default=None, metadata={"registry": registry, "otherwise": otherwise})


class Chooser:
    """Base class of dataclasses with a field `component(...)`.

    Where no settings are given, the field gets the default settings of the chosen component.
    """

    def __post_init__(self) -> None:
        slot = next(slot for slot in slots(type(self)) if not slot.prefix)
        choice, given = getattr(self, slot.chooser), getattr(self, slot.field)
        names = [] if choice is None else [name for name in slot.chosen(choice) if name in slot.registry]
        if isinstance(choice, list):
            by_name = {name: (given or {}).get(name) or slot.registry.settings(name)() for name in names}
            setattr(self, slot.field, by_name)
        elif names and given is None:
            setattr(self, slot.field, slot.registry.settings(names[0])())


@dataclass
class Settings:
    """Base class of a command's settings.

    Attributes:
        given: full name of each key that the user gave -> the value.
    """

    COMMAND: ClassVar[str]  # section of a settings file
    BORROWS: ClassVar[bool] = False  # reads the section of another command, as far as it concerns this one
    HINTS: ClassVar[dict[str, str]] = {}  # section of another command -> the section that has its keys here

    given: dict[str, Given] = field(default_factory=dict, repr=False, compare=False, kw_only=True)


@dataclass(frozen=True)
class Key:
    """One settable key.

    Attributes:
        name: full name, with dots.
        limits: choices and range of its values.
        owner: component to which it belongs, such as `student=ssl`; "" where it belongs to the command.
    """

    name: str
    type: Any
    default: Any
    meaning: str
    limits: Mapping[str, Any]
    owner: str = ""

    @property
    def kind(self) -> str:
        """Type, as --help prints it."""
        return self.type.__name__ if isinstance(self.type, type) and "[" not in str(self.type) else str(self.type)

    @property
    def choices(self) -> tuple[str, ...]:
        """All valid values; () where any value is valid."""
        return tuple(self.limits.get("choices", ()))

    def read(self, given: Given) -> Any:
        """Convert a value that the user gave.

        Raises:
            UsageError: the key does not accept the value, or not from a file.
        """
        value, is_list = given.value, self.kind.startswith("list")
        is_literal = isinstance(value, str) and value.startswith("[" if is_list else "{")
        if is_literal and isinstance(self.default, list | dict):
            value = _yaml(value, given.where)
        if is_list and not isinstance(value, list):
            value = [value] if value else []
        limits = {**self.limits, "choices": self.choices}
        if value == self.default == "":
            return value
        try:
            converted = convert(self.type, value, limits, given.where, text=True)
        except (ValueError, SpkdError) as error:
            text = str(given.value)
            if isinstance(self.default, dict) and not isinstance(value, dict):
                raise UsageError(
                    f"{given.where}: {self.name} {error}; write {self.name}.NAME=VALUE for one item, or "
                    f"{shlex.quote(f'{self.name}={{NAME: VALUE}}')} for all"
                ) from error
            way = f"; write {self.name}=[{shlex.quote(text)}]" if is_list and "," in text else ""
            raise UsageError(f"{given.where}: {self.name} {error}{'' if is_literal else way}") from error
        for text in converted if isinstance(converted, list) else [converted]:
            if given.from_file and text in self.limits.get("not_from_files", ()):
                whole = f"[{','.join(converted)}]" if is_list else text
                raise UsageError(
                    f"{given.where}: {self.name}={text} is not taken from a file; type {self.name}={whole}"
                )
            if given.from_file and self.limits.get("is_replaced") and _is_elsewhere(text):
                raise UsageError(
                    f"{given.where}: {self.name}={text} is there already, outside of the current folder, and is not "
                    f"replaced for a file that may be anybody's; type {self.name}={shlex.quote(text)}"
                )
            if given.from_file and isinstance(text, str) and is_foreign(text):
                raise UsageError(
                    f"{given.where}: {self.name}={text}: of addresses, a file may name those of "
                    f"{', '.join(PROTOCOLS)} alone; others are typed, as {self.name}=ADDRESS"
                )
        return converted


def _is_elsewhere(path: str) -> bool:
    """Whether something is there under a name, outside of the current folder."""
    return os.path.lexists(path) and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath("."))


@dataclass(frozen=True, eq=False)
class Slot:
    """Place of the settings of a component within those of a command.

    Attributes:
        prefix: prefix of its keys, such as `student.`; "" at the top.
        chooser: full name of the key that chooses the component.
        otherwise: see `component`.
        taken: names of keys and sections next to it, which no section of a component can have.
    """

    prefix: str
    field: str
    chooser: str
    registry: Registry
    otherwise: str
    taken: frozenset[str]

    def keys(self, name: str) -> dict[str, Key]:
        """Full name of each setting of a component -> its key.

        Raises:
            SpkdError: as of Registry.settings, or an installed package's component of the name of a key.
        """
        prefix = f"{self.prefix}{section_of(name)}."
        if section_of(name) in self.taken:
            raise self.registry.unusable(name, f"{prefix[:-1]} is a key of spkd; it needs another name")
        chooser = self.chooser.removesuffix(".name").removesuffix(".names")
        owned = keys(self.registry.settings(name), prefix)
        return {k.name: dataclasses.replace(k, owner=f"{chooser}={name}") for k in owned}

    def chosen(self, value: str | list[str] | None) -> list[str]:
        """Names of the components that a value of the chooser chooses."""
        names = [value] if isinstance(value, str) else value or []
        return [name if name in self.registry else self.otherwise or name for name in names]


def keys(schema: type, prefix: str = "") -> Iterator[Key]:
    """Every key of a settings dataclass, depth first, without the keys of components."""
    hints = type_hints(schema)
    for f in dataclasses.fields(schema):
        kind = hints[f.name]
        if dataclasses.is_dataclass(kind):
            yield from keys(cast(type, kind), f"{prefix}{f.name}.")
        elif "meaning" in f.metadata:
            default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
            yield Key(prefix + f.name, kind, default, f.metadata["meaning"], f.metadata)


def slots(schema: type, prefix: str = "") -> Iterator[Slot]:
    """Every place of the settings of a component, depth first."""
    hints, fields = type_hints(schema), dataclasses.fields(schema)
    for f in fields:
        if dataclasses.is_dataclass(hints[f.name]):
            yield from slots(cast(type, hints[f.name]), f"{prefix}{f.name}.")
        elif "registry" in f.metadata:
            names = [other.name for other in fields if "meaning" in other.metadata]
            taken = frozenset(names) | {name for name, kind in hints.items() if dataclasses.is_dataclass(kind)}
            yield Slot(prefix, f.name, prefix + names[0], f.metadata["registry"], f.metadata["otherwise"], taken)


def component_keys(schema: type) -> Iterator[Key]:
    """Every key of every component that a command can use."""
    for slot in slots(schema):
        for name in slot.registry:
            with contextlib.suppress(SpkdError):  # an installed package that cannot be imported; its use says why
                yield from slot.keys(name).values()


def recipes() -> list[str]:
    """Names of the recipes that come with spkd."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe(name: str) -> Path:
    """File of a recipe. Raises UsageError where there is none."""
    if name not in recipes():
        raise UsageError(f"--recipe {name}{did_you_mean(name, recipes())}")
    return RECIPES / f"{name}.yaml"


def load(
    schema: type[Schema],
    overrides: Sequence[str] = (),
    file: str | Path | None = None,
    environ: Mapping[str, str] = os.environ,
    base: str | None = None,
    left_out: dict[str, str] | None = None,
) -> Schema:
    """Settings of one command from defaults, recipe, file, environment and `key=value` overrides.

    Args:
        overrides: items `key=value` of the command line.
        file: a YAML file; None takes ./spkd.yaml if it exists. Keys that commands share are at its top level; keys of
            one command are under `extract:`, `train:` or `eval:`.
        base: name of a recipe, with lower precedence than all others.
        left_out: takes each typed setting that has no effect, as it was typed -> the reason; None: it is refused.
    Raises:
        UsageError: an unknown key, a key given in two spellings, a value of the wrong type or out of range, or a typed
            setting that is not in use.
    """
    ready = [] if base is None else _from_file(schema, recipe(base))
    sources = [*ready, *_from_file(schema, file), _from_environment(schema, environ), _from_command_line(overrides)]
    given: dict[str, Given] = {}
    for source in sources:
        given = _overridden(given, _resolved(schema, source), list(slots(schema)))
    return _filled(schema, given, left_out)


def ambient(schema: type) -> list[str]:
    """The settings file of the current folder, and the variables of the environment, that give settings of a command.

    Raises:
        UsageError: as `load`.
    """
    sources = [*_from_file(schema, None), _from_environment(schema, os.environ)]
    return list(dict.fromkeys(given.where for source in sources for _, given in source))


def chosen(settings: Schema, defaults: Mapping[str, Any], left_out: dict[str, str] | None = None) -> Schema:
    """Settings completed by values that a command chose.

    Args:
        defaults: full name of a key -> its value, which is used unless the user gave one.
    """
    made = {name: Given(f"{name}={value}", value, False) for name, value in defaults.items()}
    given = cast(Settings, settings).given
    kept = {name: value for name, value in given.items() if name not in made or value.value not in ("", "[]", [])}
    return _filled(type(settings), made | kept, left_out)


def without_unused(settings: Schema, unused: Mapping[str, str], left_out: dict[str, str] | None = None) -> Schema:
    """Settings without those that turn out to have no effect.

    Args:
        unused: full name of each setting, or of a section of settings, that has no effect -> the reason.
    Returns:
        The settings. Those without effect that a file, a recipe or the environment gave have their defaults again, and
        a note is printed.
    Raises:
        UsageError: one of them was typed.
    """
    given = cast(Settings, settings).given
    found = {
        name: reason
        for name in given
        for key_, reason in unused.items()
        if name == key_ or name.startswith((f"{key_}.", f"{key_}{{"))
    }
    return _filled(type(settings), _without(given, found, left_out), left_out) if found else settings


def dump(settings: Any) -> str:
    """Text of a settings file with those settings of a command that differ from the defaults.

    Credentials in addresses are left out.
    """
    import yaml

    tree: dict[str, Any] = {}
    for k, value in values(settings):
        if value != k.default:
            _put(tree, k.name.split("."), _public(value))
    return str(yaml.safe_dump({settings.COMMAND: tree}, sort_keys=False, allow_unicode=True))


def _public(value: Any) -> Any:
    """A value of a setting without the credentials of addresses."""
    if isinstance(value, dict):
        return {name: _public(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_public(part) for part in value]
    return public_address(value) if isinstance(value, str) else value


def values(settings: Any) -> Iterator[tuple[Key, Any]]:
    """Every key of a command and of the components that it uses, with its value."""
    for k in keys(type(settings)):
        yield k, _value(settings, k.name)
    for slot in slots(type(settings)):
        owned, choice = _value(settings, slot.prefix + slot.field), _value(settings, slot.chooser)
        by_name = owned if isinstance(choice, list) else dict.fromkeys(slot.chosen(choice), owned)
        for name, of_component in by_name.items():
            for full, k in slot.keys(name).items():
                yield k, _value(of_component, full.removeprefix(f"{slot.prefix}{section_of(name)}."))


def _value(settings: Any, name: str) -> Any:
    for part in name.split("."):
        settings = getattr(settings, part)
    return settings


def _put(tree: dict[str, Any], path: list[str], value: Any) -> None:
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    tree[path[-1]] = value


def _overridden(given: dict[str, Given], later: Mapping[str, Given], places: Sequence[Slot]) -> dict[str, Given]:
    """Merge the values of earlier sources with those of a later one, which has precedence.

    A whole mapping replaces all items of earlier sources.
    """
    fallen = _of_replaced(given, later, places)
    kept = {
        name: value
        for name, value in given.items()
        if name not in fallen and name not in later and ("{" not in name or name.partition("{")[0] not in later)
    }
    return kept | dict(later)


def _of_replaced(given: Mapping[str, Given], later: Mapping[str, Given], places: Sequence[Slot]) -> set[str]:
    """Names of values that came with a choice which a later source replaces: a recipe's width of its own student.

    A note says that they fall away.
    """
    fallen: set[str] = set()
    for slot in places:
        before, after = given.get(slot.chooser), later.get(slot.chooser)
        if before is None or after is None or not slot.prefix or isinstance(before.value, list):
            continue
        if str(before.value) != str(after.value):
            names = [n for n, value in given.items() if n.startswith(slot.prefix) and value.where == before.where]
            names = [n for n in names if n not in later and n != slot.chooser]
            if names:
                listed = ", ".join(map(shown, names))
                log(f"note: {before.where}: left out {listed}, which came with {slot.chooser}={before.value}")
            fallen |= set(names)
    return fallen


def _resolved(schema: type, source: Iterable[tuple[str, Given]]) -> dict[str, Given]:
    """Values of one source by the full names of their keys.

    The items of a mapping have the names `KEY{ITEM}`. `KEY` itself, with an empty mapping, stands for a whole mapping,
    which replaces the items of earlier sources.
    """
    known, places = {k.name: k for k in keys(schema)}, list(slots(schema))
    resolved: dict[str, Given] = {}
    spelling: dict[str, str] = {}
    for name, value in source:
        for full, part in _names(schema, known, places, name, value):
            # Of arguments with the same spelling the last counts, since scripts append theirs to those of a variable.
            if spelling.setdefault(full, name) != name or (full in resolved and not value.typed):
                raise UsageError(f"{value.where}: {shown(full)} is given twice, also as {spelling[full]}")
            if part.value == {}:  # a whole mapping replaces the items before it
                for item in [n for n in resolved if n.startswith(f"{full}{{")]:
                    del resolved[item], spelling[item]
            resolved[full] = part
    return resolved


def shown(name: str) -> str:
    """Name of a key, or of an item of a mapping, as a user writes it."""
    return name.replace("{", ".").removesuffix("}")


def _names(
    schema: type, known: Mapping[str, Key], places: Sequence[Slot], name: str, given: Given
) -> Iterator[tuple[str, Given]]:
    """Full names of the keys that a name stands for, with their values.

    Args:
        known: full name of each key of the command -> the key.
    """
    # A key of the command.
    name = full_name(schema, name)
    if (full := _key_or_item(known, name)) is not None:
        yield from _items(known, full, given)
        return
    # A key of a component, or a whole section of such keys.
    for slot in places:
        head, _, rest = name.removeprefix(slot.prefix).partition(".")
        if not name.startswith(slot.prefix) or (owner := slot.registry.named(head)) is None:
            continue
        owned = slot.keys(owner)
        if not owned:
            raise UsageError(f"{given.where}: unknown key {name!r}; {owner} has no settings of its own")
        prefix = f"{slot.prefix}{section_of(owner)}"
        if not rest:
            given = given._replace(value=_as_mapping(given))
        if not rest and not isinstance(given.value, dict):
            raise UsageError(f"{given.where}: {name} has keys of its own: {', '.join(owned)}")
        tree = {rest: given.value} if rest else given.value
        for part, value in _flatten(slot.registry.settings(owner), tree):
            if (full := _key_or_item(owned, f"{prefix}.{part}")) is None:
                raise UsageError(f"{given.where}: unknown key '{prefix}.{part}'{_hint(f'{prefix}.{part}', owned)}")
            yield from _items(owned, full, given._replace(value=value))
        return
    everything = [*known, *(k.name for k in component_keys(schema))]
    others = [command for command in COMMANDS if COMMANDS[command] is not schema and _has(COMMANDS[command], name)]
    is_near = any(k.rpartition(".")[2] == name.rpartition(".")[2] for k in everything)
    is_foreign = "." in name and not any(k.partition(".")[0] == name.partition(".")[0] for k in everything)
    if others and (is_foreign or not is_near) and _moved(name, everything, schema) is None:
        raise UsageError(f"{given.where}: unknown key {name!r}; it is a setting of spkd {listed(others)}")
    raise UsageError(f"{given.where}: unknown key {name!r}{_hint(name, everything, schema)}")


def _key_or_item(known: Mapping[str, Key], name: str) -> str | None:
    """Full name of a key, or of an item of a mapping: `storage.codecs{frames}` for `storage.codecs.frames`.

    Returns:
        None where there is no such key.
    """
    if name in known:
        return name
    owner = next((k for k in known if name.startswith(f"{k}.") and isinstance(known[k].default, dict)), None)
    return None if owner is None else f"{owner}{{{name.removeprefix(f'{owner}.')}}}"


def _items(known: Mapping[str, Key], name: str, given: Given) -> Iterator[tuple[str, Given]]:
    """Full names and values of a key; the value of a whole mapping is divided into its items."""
    if name not in known or not isinstance(known[name].default, dict):
        yield name, given
        return
    value = _as_mapping(given)
    if not isinstance(value, dict):
        known[name].read(given)  # says what is wrong with it
        return
    yield name, given._replace(value={})
    for item, part in value.items():
        yield f"{name}{{{item}}}", given._replace(value=part)


def _as_mapping(given: Given) -> Any:
    """The value of a mapping or of a section: text like {a: b} is parsed, and nothing is an empty one."""
    value = given.value
    if not isinstance(value, str) or value[:1] not in ("{", ""):
        return value
    tree = _yaml(value or "{}", given.where)
    if glued := [item for item, part in tree.items() if ":" in item and not part]:
        raise UsageError(f"{given.where}: write a space after the colon: {{{glued[0].replace(':', ': ', 1)}}}")
    return tree


def _filled(schema: type[Schema], given: Mapping[str, Given], left_out: dict[str, str] | None = None) -> Schema:
    """Settings of the values that the user gave, without those that are not in use."""
    # Convert the values.
    known, places = {k.name: k for k in keys(schema)}, list(slots(schema))
    owned = {name: k for slot in places for name, k in _used_and_given(slot, known, given).items()}
    values_: dict[str, Any] = {name: k.default for name, k in (known | owned).items()}
    # A whole mapping comes before its items.
    for name, value in sorted(given.items(), key=lambda item: "{" in item[0]):
        owner, _, item = name.partition("{")
        k = (known | owned)[owner]
        if item:
            values_[owner] = values_[owner] | k.read(value._replace(value={item[:-1]: value.value}))
        else:
            values_[owner] = k.read(value)
    # Find the settings of components that are not chosen.
    chosen = {slot: slot.chosen(values_[slot.chooser]) for slot in places}
    not_chosen = {}
    for slot, names in chosen.items():
        for name in () if values_[slot.chooser] == [] else given:  # an empty list: the command chooses later
            setting = owned.get(name.partition("{")[0])
            if setting is None or not setting.name.startswith(slot.prefix):
                continue
            if setting.owner.partition("=")[2] not in names:
                not_chosen[name] = f"{setting.owner} is not in use"
    settings = _assembled(schema, values_, places, chosen)
    cast(Any, settings).given = _without(given, not_chosen, left_out)
    return without_unused(settings, dict(_unused(settings)), left_out)


def _used_and_given(slot: Slot, known: Mapping[str, Key], given: Mapping[str, Given]) -> dict[str, Key]:
    """Full name -> key, of the components of a slot that are chosen or whose settings the user gave."""
    default = known[slot.chooser].default
    choice = known[slot.chooser].read(given[slot.chooser]) if slot.chooser in given else default
    names = {name for name in slot.chosen(choice) if name in slot.registry}
    for name in given:
        if name.startswith(slot.prefix):
            head = name.removeprefix(slot.prefix).partition(".")[0]
            if name.partition("{")[0] not in known and (owner := slot.registry.named(head)) is not None:
                names.add(owner)
    for name in names:
        slot.registry.note_namesakes(name)
    return {name: k for owner in slot.registry if owner in names for name, k in slot.keys(owner).items()}


def _without(
    given: Mapping[str, Given], reasons: Mapping[str, str], left_out: dict[str, str] | None
) -> dict[str, Given]:
    """Leave out values that have no effect, and print a note of each that was not typed.

    Args:
        given: full name of each value that the user gave -> the value.
        reasons: full name of each value without effect -> the reason.
    Returns:
        The other values.
    """
    notes: dict[tuple[str, str], list[str]] = {}
    for name, reason in reasons.items():
        if not given[name].typed:
            notes.setdefault((given[name].where, reason), []).append(shown(name))
        elif left_out is None:
            raise UsageError(f"{given[name].where} has no effect: {reason}")
        else:
            left_out[given[name].where] = reason
    for (where, reason), names in notes.items():
        log(f"note: {where}: left out {', '.join(names)}: {reason}")
    return {name: value for name, value in given.items() if name not in reasons}


def _unused(settings: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Full name of each setting that has no effect with the others, and the reason, from the dataclasses' `unused`."""
    if hasattr(settings, "unused"):
        for name, reason in settings.unused().items():
            yield prefix + name, reason
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        if dataclasses.is_dataclass(value):
            name = section_of(_choice(settings)) if "registry" in f.metadata else f.name
            yield from _unused(value, f"{prefix}{name}.")
        elif "registry" in f.metadata and isinstance(value, dict):
            for name, of_component in value.items():
                yield from _unused(of_component, f"{prefix}{section_of(name)}.")


def _choice(settings: Any) -> str:
    """Name of the component that a section chooses."""
    slot = next(slots(type(settings)))
    return slot.chosen(getattr(settings, slot.chooser))[0]


def _moved(name: str, known: Sequence[str], schema: type | None) -> str | None:
    """Key that this command has in the place of another command's, by its HINTS; None where it has none."""
    first, hints = name.partition(".")[0], cast(dict[str, str], getattr(schema, "HINTS", {}))
    moved = f"{hints[first]}{name.removeprefix(first)}" if first in hints else None
    return moved if any(k in (moved, f"{moved}.name") for k in known) else None


def _hint(name: str, known: Iterable[str], schema: type | None = None) -> str:
    """Hint for an unknown key: keys with the same last part (optim.lr for `lr`), or the key with the nearest spelling.

    Args:
        schema: dataclass of the command's settings; None for keys of a component.
    """
    known, first, last = list(known), name.partition(".")[0], synonym(name.rpartition(".")[2])
    if (moved := _moved(name, known, schema)) is not None:
        return f"; did you mean {moved!r}?"
    ending = [k for k in known if k.rpartition(".")[2] == last]
    ending = [k for k in ending if k.endswith(f".{name}")] or [k for k in ending if k.startswith(f"{first}.")] or ending
    if not ending:
        return did_you_mean(name, known)
    more = [f"{len(ending) - MOST_HINTS} more"] if len(ending) > MOST_HINTS else []
    return f"; did you mean {listed([*map(repr, ending[:MOST_HINTS]), *more], 'or')}?"


def _assembled(
    schema: type[Schema],
    values_: Mapping[str, Any],
    places: Sequence[Slot],
    chosen: Mapping[Slot, Sequence[str]],
    prefix: str = "",
) -> Schema:
    """Make the dataclass of the settings.

    Args:
        values_: full name of each key -> its value.
        chosen: names of the chosen components of each place.
        prefix: prefix of the names of its keys.
    """
    hints, arguments = type_hints(cast(type, schema)), {}
    for f in dataclasses.fields(cast(Any, schema)):
        kind = hints[f.name]
        slot = next((s for s in places if s.prefix == prefix and s.field == f.name), None)
        if slot is not None:
            of_components: dict[str, Any] = {
                name: _assembled(slot.registry.settings(name), values_, (), {}, f"{prefix}{section_of(name)}.")
                for name in chosen[slot]
                if name in slot.registry
            }
            is_list = isinstance(values_[slot.chooser], list)
            arguments[f.name] = of_components if is_list else next(iter(of_components.values()), None)
        elif dataclasses.is_dataclass(kind):
            arguments[f.name] = _assembled(cast(type, kind), values_, places, chosen, f"{prefix}{f.name}.")
        elif f.init and "meaning" in f.metadata:
            arguments[f.name] = values_[prefix + f.name]
    return schema(**arguments)


def full_name(schema: type, name: str) -> str:
    """Full name of a key: `teacher.name` for `teacher`, since a plain value for a section sets its first key."""
    node = schema
    for part in name.split("."):
        hints = type_hints(node)
        kind = hints.get(part)
        if kind is None or not dataclasses.is_dataclass(kind):
            return name
        node = cast(type, kind)
    return f"{name}.{dataclasses.fields(node)[0].name}"


def _from_command_line(overrides: Sequence[str]) -> Iterator[tuple[str, Given]]:
    for place, item in enumerate(overrides):
        name, equals, text = item.partition("=")
        if not equals or not name:
            around = " ".join(overrides[max(place - 1, 0) : place + 3])
            found = re.search(r"([\w.]+)(?: = ?|= )(\S+)", around)
            way = f"; write {found[1]}={shlex.quote(found[2])}" if found else ""
            raise UsageError(f"{item!r} is not key=value, written without spaces and after files{way}")
        yield name, Given(item, text, True)


def _from_environment(schema: type, environ: Mapping[str, str]) -> Iterator[tuple[str, Given]]:
    """Values of the variables that stand for keys of this command. Variables for other commands are skipped."""
    variables = {v: v.removeprefix("SPKD_").replace("__", ".").lower() for v in environ if v.startswith("SPKD_")}
    for variable, name in variables.items():
        if _is_key(schema, name):
            yield _with_capitals(schema, name), Given(variable, environ[variable], False)
        elif not any(_is_key(COMMANDS[command], name) for command in COMMANDS):
            valid = [k.name for kind in COMMANDS.values() for k in (*keys(kind), *component_keys(kind))]
            near = did_you_mean(variable, [f"SPKD_{full.replace('.', '__').upper()}" for full in valid])
            log(f"note: {variable}: no command has a setting {name!r}{near}")


def _with_capitals(schema: type, name: str) -> str:
    """Name of the key for which a name in small letters stands: components of installed packages may have others."""
    for slot in slots(schema):
        if (owner := slot.registry.named(name.removeprefix(slot.prefix).partition(".")[0])) and _is_of(slot, name):
            spelt = {k: k.lower() for k in slot.keys(owner)}
            return next(
                (k + name.removeprefix(low) for k, low in spelt.items() if f"{name}.".startswith(f"{low}.")), name
            )
    return name


def _is_of(slot: Slot, name: str) -> bool:
    """Whether a key belongs to a component of a slot."""
    head = name.removeprefix(slot.prefix).partition(".")[0]
    return name.startswith(slot.prefix) and slot.registry.named(head) is not None


def _is_item(schema: type, name: str) -> bool:
    """Whether a name is the name of a key, or of an item of a mapping."""
    return _key_or_item({k.name: k for k in keys(schema)}, name) is not None


def named_alike(schema: type, name: str) -> list[str]:
    """Full names of the keys that a name may stand for: a key itself, or the first keys with the same last part."""
    if _is_key(schema, name):
        return [name]
    every = (k.name for k in (*keys(schema), *component_keys(schema)))
    return [full for full in every if full.rpartition(".")[2] == name][:MOST_HINTS]


def _has(schema: type, name: str) -> bool:
    """Whether a command, or a component of one, has a key: unlike `_is_key`, which asks for the component alone."""
    return _is_item(schema, full_name(schema, name)) or any(k.name == name for k in component_keys(schema))


def _is_key(schema: type, name: str) -> bool:
    full = full_name(schema, name)
    return _is_item(schema, full) or any(_is_of(slot, full) for slot in slots(schema))


def _yaml(text: str, where: str) -> Any:
    """Parse YAML whose scalars all stay text, since the type of a key decides how they are read. Tags are ignored.

    Raises:
        UsageError: not valid YAML, an alias (with which a short file could become endless), or a name that is twice in
            a mapping.
    """
    import yaml

    class Loader(yaml.BaseLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("aliases (*name) are not read")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            names = Counter(str(name.value) for name, _ in node.value)
            twice = next((name for name, times in names.items() if times > 1), None)
            if twice is not None:
                raise yaml.YAMLError(f"{twice} is given twice")
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader=Loader)
    except (yaml.YAMLError, RecursionError) as error:
        problem = " ".join(str(error).split())[:200] if isinstance(error, yaml.YAMLError) else "nested too deep"
        raise UsageError(f"{where}: not valid YAML: {problem}") from error


def _from_file(schema: type, file: str | Path | None) -> list[list[tuple[str, Given]]]:
    """Values of a settings file: those that commands share, then those of the command."""
    # Read the file.
    if file is None:
        if not Path(SETTINGS_FILE).exists():
            return []
        file = SETTINGS_FILE
    tree = read_tree(Path(file))
    # Check the names of shared keys.
    shared = {k: v for k, v in tree.items() if k not in COMMANDS}
    everywhere = {f.name for name in COMMANDS for f in dataclasses.fields(COMMANDS[name])} - {"given"}
    here = {f.name for f in dataclasses.fields(cast(Any, schema))}
    for name in shared:
        if name not in everywhere and not any(_is_key(COMMANDS[command], name) for command in COMMANDS):
            raise UsageError(f"{file}: unknown key {name!r}{did_you_mean(str(name), [*COMMANDS, *everywhere])}")
    command, borrows = cast(Any, schema).COMMAND, cast(Any, schema).BORROWS
    # Take the values that concern this command.
    section_ = tree.get(command) or {}
    if not isinstance(section_, dict):
        raise UsageError(f"{file}: {command}: expected `key: value` lines")
    sources = ({k: v for k, v in shared.items() if k in here or _is_key(schema, k)}, section_)
    return [
        [
            (name, Given(str(file), value, False, True))
            for name, value in _flatten(schema, source)
            if not borrows or _is_key(schema, name)
        ]
        for source in sources
    ]


def read_tree(file: Path) -> dict[str, Any]:
    """Content of a settings file, whose scalars all stay text. Raises UsageError where it cannot be read."""
    try:
        text = read_text(file, MOST_OF_SETTINGS)
    except SpkdError as error:
        raise UsageError(f"settings file {error}") from error
    except OSError as error:
        raise UsageError(f"settings file {file}: cannot be read ({error.strerror})") from error
    tree = _yaml(text, str(file)) or {}
    if not isinstance(tree, dict) or not all(isinstance(k, str) for k in tree):
        raise UsageError(f"{file}: expected `key: value` lines")
    return tree


def _flatten(schema: type, tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Pairs of a dotted name and a value. Sections are flattened; values that are mappings stay whole."""
    hints = type_hints(schema)
    for name, value in tree.items():
        kind = hints.get(str(name))
        if isinstance(value, dict) and dataclasses.is_dataclass(kind):
            yield from _flatten(cast(type, kind), value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
