"""What uses which extra, from the code: an error that says that a package is missing names the extra to install."""

from __future__ import annotations

import re
from pathlib import Path

from spkd import config
from spkd.registry import COMMANDS, CONTAINERS, DETECTORS, EXPORTS, LOSSES, STUDENTS, TEACHERS

ROOT = Path(config.__file__).parent
CHOSEN = (TEACHERS, STUDENTS, LOSSES, EXPORTS, DETECTORS, CONTAINERS)
NAMED = re.compile(r"""spkd\[([a-z0-9,-]+)\]["']""")
IMPORTS = re.compile(r"^\s*(?:from|import) (spkd\.[\w.]+)", re.MULTILINE)


def users() -> dict[str, list[str]]:
    """Name of each extra that the code names -> what uses it.

    A choice, such as `to=litert`, uses the extras that its module names, or one that this imports from its own folder.
    A choice that has the name of an extra uses it: `engine=ray`; but not `device=cpu`, which needs no FAISS. Other
    modules are described by their docstring.
    """
    found: dict[str, list[str]] = {}
    covered: set[Path] = set()
    for registry in CHOSEN:
        for name, line in registry.ours.items():
            files = _of_folder(_file((line if isinstance(line, str) else line[0]).partition(":")[0]))
            for extra in {extra for file in files for extra in _named(file)}:
                found.setdefault(extra, []).append(f"{registry.key}={name}")
            covered |= files
    choices = {
        choice: f"{key.name}={choice}"
        for command in COMMANDS
        for key in config.keys(COMMANDS[command])
        for choice in key.choices
        if key.name != "device" and not any(choice in registry for registry in CHOSEN)
    }
    for file in sorted(ROOT.rglob("*.py")):
        for extra in _named(file) if file not in covered else ():
            if extra not in found:
                found[extra] = [choices.get(extra, _title(file))]
    return {extra: list(dict.fromkeys(phrases)) for extra, phrases in found.items()}


def _file(module: str) -> Path:
    path = ROOT.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _of_folder(file: Path) -> set[Path]:
    """A module and those of its folder that it imports, directly or not."""
    found: set[Path] = set()
    waiting = [file]
    while waiting:
        each = waiting.pop()
        if each not in found:
            found.add(each)
            imported = map(_file, IMPORTS.findall(each.read_text()))
            waiting += [other for other in imported if other.parent == file.parent and other.name != "__init__.py"]
    return found


def _named(file: Path) -> list[str]:
    """Extras that a module names, in the order of the text."""
    found = [name for names in NAMED.findall(file.read_text()) for name in names.split(",")]
    return list(dict.fromkeys(found))


def _title(file: Path) -> str:
    """First sentence of a module's docstring, without its stop."""
    quoted = file.read_text().partition('"""')[2].partition('"""')[0].partition("\n\n")[0]
    return " ".join(quoted.split()).rstrip(".")
