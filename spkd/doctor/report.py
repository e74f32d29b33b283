"""The report of `spkd doctor`: one block that a bug report can hold, without names of users, tokens or addresses."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import textwrap
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

from spkd.doctor import checks, machine, packages
from spkd.doctor.needs import users
from spkd.errors import printable
from spkd.files.text import counted
from spkd.version import __version__

WIDTH = 100


@dataclass(frozen=True)
class Report:
    """State of an installation.

    Attributes:
        machine: as of machine.describe.
        versions: installed package that spkd can use -> its version.
        devices: description of each device, and of what torch was built for.
        works: names of the checks that succeeded.
        problems: what is installed and does not work, each with what to do.
        missing: name of each extra that is not complete -> its missing packages, what uses them, and the line of pip.
        notes: what is worth knowing.
    """

    machine: dict[str, Any]
    versions: dict[str, str]
    devices: list[str] = field(default_factory=list)
    works: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    missing: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The report as JSON, with `ok`."""
        return {"spkd": __version__, "ok": not self.problems, **vars(self)}

    def text(self) -> str:
        """The report as lines for people."""
        of = self.machine
        cores, memory = of["cores"], of["memory_gib"]
        threads = [f"{name}={value}" for name, value in of["variables"].items()]
        threads += [f"{name} set" for name in of["settings"]]
        driver = f", NVIDIA driver {of['nvidia_driver']}" if of["nvidia_driver"] else ""
        lines = [
            f"spkd {__version__}, {of['python']}, {of['system']}",
            f"{cores['usable']} of {cores['of_machine']} cores, "
            f"{memory['usable']} of {memory['of_machine']} GiB of memory{driver}",
            *(["; ".join(threads)] if threads else []),
            *(["devices: " + "; ".join(self.devices)] if self.devices else []),
            *_wrapped("packages: " + ", ".join(f"{name} {version}" for name, version in self.versions.items())),
            *_wrapped("works: " + ", ".join(self.works)),
        ]
        for each in self.missing.values():
            use = f", used by {', '.join(each['used_by'])}" if each["used_by"] else ""
            lines += [*_wrapped(f"not installed: {', '.join(each['packages'])}{use}:"), f"    {each['install']}"]
        lines += [line for note in self.notes for line in _wrapped(f"note: {note}")]
        lines += [line for problem in self.problems for line in _wrapped(f"broken: {problem}")]
        return "\n".join(lines)


def examine() -> Report:
    """The state of this installation."""
    of_machine = machine.describe()
    notes: list[str] = []
    problems: list[str] = []
    works: list[str] = []
    try:
        every = packages.needed()
    except PackageNotFoundError:
        every = []
        notes.append("spkd is imported from a folder and not installed: which packages it needs is not known")
    installed = {each.name: each.version for each in every if each.version is not None}
    # Import what is installed, and use the devices.
    modules = {packages.module_of(name): name for name in installed}
    devices: list[str] = []
    results = checks.run([*modules])
    for result in results:
        devices = result.found or devices
        if result.error is None:
            works += [] if result.name in modules else [result.name]
        elif result.name == checks.LOCKS:
            notes.append(f"{result.name} failed: {result.error}")
        elif result.name == checks.DEVICES:
            problems.append(f"torch {installed['torch']} does not work on a device ({result.error})")
        else:
            name = modules[result.name]
            way = f'pip install --force-reinstall --no-deps "{name}=={installed[name]}"'
            problems.append(f"{name} {installed[name]} cannot be imported ({result.error}): {way}")
    imported = sum(result.name in modules and result.error is None for result in results)
    works = [f"import of {counted(imported, 'package')}", *works]
    # Compare versions, and write.
    problems += packages.conflicts(every)
    written = checks.writing()
    works += [] if written.error else [written.name]
    notes += [f"{written.name} failed: {written.error}"] if written.error else []
    if of_machine["nvidia_driver"] and devices and not any(each.startswith("cuda") for each in devices):
        notes.append(f"there is a driver of NVIDIA, but torch sees no GPU ({devices[-1]})")
    report = Report(
        of_machine, installed, devices, works, problems, _missing(every, bool(of_machine["nvidia_driver"])), notes
    )
    return Report(**{name: _anonymous(value) for name, value in vars(report).items()})


def _missing(every: list[packages.Package], has_gpu: bool) -> dict[str, dict[str, Any]]:
    """Extras that are not complete, with what uses them; what spkd itself lacks is under "spkd"."""
    of_extra, use = packages.missing(every, has_gpu), users()
    return {
        extra or "spkd": {
            "packages": names,
            "used_by": use.get(extra, []),
            "install": f'pip install "spkd[{extra}]"' if extra else f"pip install {' '.join(names)}",
        }
        for extra, names in of_extra.items()
    }


def _anonymous(value: Any) -> Any:
    """A value of the report without credentials, and without the folders of this user."""
    if isinstance(value, dict):
        return {name: _anonymous(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_anonymous(part) for part in value]
    if not isinstance(value, str):
        return value
    places = {sys.prefix: "ENVIRONMENT", tempfile.gettempdir(): "TEMPORARY", os.getcwd(): ".", str(Path.home()): "~"}
    for place, word in places.items():
        value = value.replace(place, word) if len(place) > 1 else value
    names = {os.environ.get(name, "") for name in ("USER", "LOGNAME", "USERNAME")} - {""}
    for user in names:
        value = re.sub(rf"(?<=/){re.escape(user)}(?=/|$)", "USER", value)
    return printable(value)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
