"""Reference of the site: every command, key and recipe, from the code."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from spkd import config as settings
from spkd.cli import app

FOLDER = "reference"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The navigation, with a page of each command below Reference."""
    reference = next(section["Reference"] for section in config.nav if "Reference" in section)
    reference += [{"Recipes": f"{FOLDER}/recipes.md"}, {"Commands": [{n: _place(n)} for n, _ in commands()]}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""
    pages = {_place(name): page(name, command) for name, command in commands()}
    pages[f"{FOLDER}/recipes.md"] = recipes()
    for place, text in pages.items():
        files.append(File.generated(config, place, content=text))
    return files


def commands() -> Iterator[tuple[str, Any]]:
    """Name of every command, such as `cache verify` -> the command."""
    for name, command in typer.main.get_command(app).commands.items():
        below = getattr(command, "commands", None)
        yield from [(name, command)] if below is None else ((f"{name} {n}", c) for n, c in below.items())


def page(name: str, command: Any) -> str:
    """Page of a command: what it does, its arguments, options and keys, an example."""
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option"]
    usage = " ".join([f"spkd {name}", *(_metavar(p) for p in arguments)])
    parts = [f"# spkd {name}", command.help, f"    {usage}{' [OPTIONS]' if options else ''}"]
    if command.epilog:
        parts += [f"Example:\n\n    {command.epilog.removeprefix('Example: ')}"]
    if described := [p for p in arguments if p.help]:
        rows = [[f"`{_metavar(p)}`", p.help] for p in described]
        parts += [table(["argument", "meaning"], rows)]
    if options:
        rows = [[" ".join([*(f"`{o}`" for o in p.opts), _default(p.default)]), p.help or ""] for p in options]
        parts += [table(["option, default", "meaning"], rows)]
    if (schema := getattr(command, "schema", None)) is not None:
        parts += ["## Keys", "Written `key=value`.", keys(settings.keys(schema))]
        owned = sorted(settings.component_keys(schema), key=lambda key: key.owner)
        for owner, of_owner in groupby(owned, key=lambda key: key.owner):
            parts += [f"### With `{owner}`", keys(of_owner)]
    return "\n\n".join(part for part in parts if part) + "\n"


def keys(every: Iterator[settings.Key]) -> str:
    """Table of keys with type, default and meaning."""
    rows = [[f"`{key.name}`", f"{key.kind} {_default(key.default)}", key.meaning + _limits(key)] for key in every]
    return table(["key", "type, default", "meaning"], rows)


def _limits(key: settings.Key) -> str:
    """The values that a key takes, in brackets."""
    low, high = key.limits.get("low"), key.limits.get("high")
    limits = [", ".join(f"`{choice}`" for choice in key.choices)] if key.choices else []
    limits += ["above 0"] if key.limits.get("positive") else []
    limits += [f"at least {low:g}"] if low is not None else []
    limits += [f"at most {high:g}"] if high is not None else []
    return f" ({', '.join(limits)})" if limits else ""


def _default(value: Any) -> str:
    """A default as a user would write it; "" where there is none."""
    if value is None or value is ... or value is False or value in ("", [], {}):
        return ""
    return f"`[{','.join(map(str, value))}]`" if isinstance(value, list) else f"`{value}`"


def _metavar(argument: Any) -> str:
    name = argument.metavar or argument.name.upper()
    return name if argument.required or name.startswith("[") else f"[{name}]"


def recipes() -> str:
    """Page of the recipes."""
    parts = ["# Recipes", "Settings of a paper, or of the best results here: `--recipe NAME`."]
    for name in settings.recipes():
        parts += [f"## {name}", f"```yaml\n{settings.recipe(name).read_text()}```"]
    return "\n\n".join(parts) + "\n"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Table in Markdown."""
    lines = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _place(name: str) -> str:
    return f"{FOLDER}/commands/{name.replace(' ', '-')}.md"
