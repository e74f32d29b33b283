"""Links of the site: pages link as in the repository, and what they name outside of docs/ becomes part of it."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(\]\()([^)#\s:]+)((?:#[^)\s]*)?\))")
ELSEWHERE = "repository/"  # place in the site of files outside of docs/
FIRST = [f"{ELSEWHERE}{name}" for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "manifests/README.md")]
HIDDEN = "---\nsearch:\n  exclude: true\n---\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add every file outside of docs/ to which a page links, and those of the navigation."""
    pages = [file.src_uri for file in files.documentation_pages()]
    waiting = [*FIRST, *(target for page in pages for target in _targets(page, _path(page).read_text()))]
    while waiting:
        place = waiting.pop()
        path = _path(place.removesuffix(".py.md") + ".py" if place.endswith(".py.md") else place)
        if files.get_file_from_path(place) is not None or not path.is_file():
            continue
        if place.endswith(".py.md"):  # a page, where browsers would offer a script as a download
            text = f"{HIDDEN}# {path.relative_to(ROOT)}\n\n````python\n{path.read_text()}````\n"
            files.append(File.generated(config, place, content=text))
            continue
        files.append(File.generated(config, place, abs_src_path=str(path)))
        if place.endswith(".md"):
            waiting += _targets(place, path.read_text())
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page with links to places in the site. A link to a folder, which has no page, becomes its text."""
    here = page.file.src_uri

    def replaced(match: re.Match[str]) -> str:
        target = _target(here, match[2])
        return f"{match[1]}{posixpath.relpath(target, posixpath.dirname(here) or '.')}{match[3]}"

    return LINK.sub(replaced, re.sub(r"(?<!!)\[([^]]*)\]\(([^)#\s:]+)\)", lambda m: _without_folder(here, m), markdown))


def _without_folder(here: str, match: re.Match[str]) -> str:
    return match[1] if _path(_target(here, match[2])).is_dir() else match[0]


def _targets(here: str, text: str) -> Iterator[str]:
    """Places in the site of everything outside of docs/ to which a page links."""
    for match in LINK.finditer(text):
        if (target := _target(here, match[2])).startswith(ELSEWHERE):
            yield target


def _target(here: str, link: str) -> str:
    """Place in the site of what a page links to, relative to its own place in the repository."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(here), link))
    if here.startswith(ELSEWHERE):
        path = posixpath.normpath(posixpath.join(posixpath.dirname(here.removeprefix(ELSEWHERE)), link))
    if path.startswith("docs/"):
        return path.removeprefix("docs/").replace(".ipynb", ".md")  # the page of a notebook
    return f"{ELSEWHERE}{path}.md" if path.endswith(".py") else f"{ELSEWHERE}{path}"


def _path(place: str) -> Path:
    """File or folder of the repository that is at a place in the site."""
    return ROOT / place.removeprefix(ELSEWHERE) if place.startswith(ELSEWHERE) else ROOT / "docs" / place
