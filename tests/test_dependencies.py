"""constraints.txt against pyproject.toml."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LINES = (ROOT / "constraints.txt").read_text().splitlines()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def required(*extras: str) -> Iterator[Requirement]:
    """What the project and some extras require, with the extras that these name."""
    for extra in extras:
        for requirement in map(Requirement, PROJECT["optional-dependencies"][extra]):
            if requirement.name == PROJECT["name"]:
                yield from required(*requirement.extras)
            else:
                yield requirement


def test_constraints_are_names_and_versions_alone() -> None:
    for line in LINES:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line), line
    names = [canonicalize_name(line.split("==")[0]) for line in LINES]
    assert len(names) == len(set(names))


def test_constraints_fix_what_the_tests_need_within_its_limits() -> None:
    version = {canonicalize_name(name): number for name, number in (line.split("==") for line in LINES)}
    needed = [*map(Requirement, PROJECT["dependencies"]), *required("dev", "oracles")]
    assert len(needed) > 30
    for requirement in needed:
        name = canonicalize_name(requirement.name)
        assert name in version, f"{name} is not in constraints.txt"
        assert requirement.specifier.contains(version[name]), f"{requirement}: {version[name]} in constraints.txt"
