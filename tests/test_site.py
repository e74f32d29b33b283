"""The documentation as a site: what it is made from, and, where the extra `site` is installed, the site itself."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pytest

import spkd as interface

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))
SITE = [importlib.util.find_spec(name) for name in ("mkdocs", "material", "mkdocstrings", "nbconvert", "ipykernel")]
# What the pages python.md and parts.md show.
SHOWN = [
    place
    for page in ("python.md", "parts.md")
    for place in re.findall(r"^::: (\S+)$", (ROOT / "docs" / page).read_text(), re.MULTILINE)
]


def found(place: str) -> Any:
    """Module, class or function of a dotted name."""
    module, _, name = place.rpartition(".")
    with contextlib.suppress(ImportError):
        return importlib.import_module(place)
    return getattr(importlib.import_module(module), name)


def members(place: str) -> Iterator[tuple[str, Any]]:
    """A name that a page shows, and every public class, function and method below it."""
    thing = found(place)
    yield place, thing
    for name, member in vars(thing).items() if inspect.isclass(thing) or inspect.ismodule(thing) else ():
        if name.startswith("_"):
            continue
        member = getattr(member, "__func__", member.fget if isinstance(member, property) else member)
        is_own = getattr(member, "__module__", None) == (
            thing.__name__ if inspect.ismodule(thing) else thing.__module__
        )
        if is_own and inspect.isclass(member):
            yield from members(f"{place}.{name}") if inspect.ismodule(thing) else [(f"{place}.{name}", member)]
        elif is_own and inspect.isfunction(member):
            yield f"{place}.{name}", member


def overrides(name: str) -> bool:
    """Whether a method is one of a base class, whose docstring holds for it."""
    holder, _, method = name.rpartition(".")
    module, _, kind = holder.rpartition(".")
    thing = getattr(found(module), kind, None)
    return inspect.isclass(thing) and any(method in vars(base) for base in thing.__mro__[1:])


def test_every_name_of_the_interface_is_on_the_page() -> None:
    names = {getattr(interface, name) for name in interface.__all__ if name != "__version__"}
    assert names <= {found(place) for place in SHOWN}


@pytest.mark.parametrize("place", SHOWN)
def test_what_the_pages_show_has_docstrings(place: str) -> None:
    every = dict(members(place))
    assert every
    lacking = [name for name, thing in every.items() if not thing.__doc__ and not overrides(name)]
    assert not lacking


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_without_outputs_and_explain_every_step(path: Path) -> None:
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
    assert "".join(cells[0]["source"]).startswith("# ")
    assert sum(cell["cell_type"] == "markdown" for cell in cells) >= len(code) / 2
    # A command of a cell that fails ends its notebook, and so the build.
    commands = ["".join(cell["source"]) for cell in code if "".join(cell["source"]).startswith("%%")]
    assert commands
    assert all(command.startswith("%%bash -e\n") for command in commands)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built from nothing, its notebooks executed."""
    if None in SITE:
        pytest.skip("needs the extra site")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def text_of(page: Path) -> str:
    return unescape(re.sub(r"<[^>]+>", "", page.read_text()))


@pytest.mark.slow
def test_tutorials_have_the_outputs_of_their_cells(site: Path) -> None:
    assert len(NOTEBOOKS) == 6
    for path in NOTEBOOKS:
        text = text_of(site / "tutorials" / path.stem / "index.html")
        assert "Traceback" not in text
        assert (site / "tutorials" / path.name).read_bytes() == path.read_bytes()  # to be run by the reader
    assert "EER" in text_of(site / "tutorials/distil/index.html")
    verify = text_of(site / "tutorials/verify/index.html")
    assert re.search(r"same=(True|False)", verify)  # of a small student, whose decisions may differ between machines
    assert re.search(": (the same speaker|different speakers)", verify)
    assert "%%bash" not in verify  # commands are shown, and copied, as they are typed
    assert "all checksums match" in text_of(site / "tutorials/share/index.html")


@pytest.mark.slow
def test_the_reference_has_every_key_that_help_prints(site: Path, spkd: Callable) -> None:
    for command in ("extract", "train", "eval", "export", "cache verify"):
        shown = spkd(*command.split(), "--help").ok().out
        keys = re.findall(r"^([a-z0-9_.]+)(?:, [a-z0-9_., ]+)?  .*, default ", shown, re.MULTILINE)
        assert len(keys) > 5
        page = (site / "reference/commands" / command.replace(" ", "-") / "index.html").read_text()
        assert not [key for key in keys if f"<code>{key}</code>" not in page]


@pytest.mark.slow
def test_pages_ask_no_other_server(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 40
    loaded = re.compile(r"<(?:script|img|iframe|source|audio|video)[^>]*\bsrc=\"?(https?:)?//[^\">]*|<link[^>]*>")
    for page in pages:
        for match in loaded.finditer(page.read_text()):
            tag = match[0]
            assert not tag.startswith("<link") or "canonical" in tag or "//" not in tag, (page, tag)
            assert tag.startswith("<link"), (page, tag)
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//|@import", style.read_text())
