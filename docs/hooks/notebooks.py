"""Tutorials of the site: notebooks, executed in one folder that begins with docs/tutorials/people."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[2]
SECTION = "Tutorials"  # of the navigation
PEOPLE = ROOT / "docs" / "tutorials" / "people"  # recordings beside the notebooks
KEPT = ROOT / "build" / "notebooks"  # executed notebooks, by what they and spkd were
LONGEST = 900  # seconds of a cell
PROGRESS = re.compile(r"^.*: \d+/\d+ .*\n|^\s*\n", re.MULTILINE)  # what a terminal shows while a command runs
log = logging.getLogger("mkdocs.hooks.notebooks")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page of each notebook. The notebook itself, without outputs, stays beside it."""
    places = [place for entry in next(s[SECTION] for s in config.nav if SECTION in s) for place in entry.values()]
    notebooks = [ROOT / "docs" / place.replace(".md", ".ipynb") for place in places]
    for place, made in zip(places, executed(notebooks), strict=True):
        name = Path(place).stem
        text, resources = MarkdownExporter().from_notebook_node(
            made, resources={"unique_key": name, "output_files_dir": f"{name}_files"}
        )
        note = f'Made by <a href="../{name}.ipynb" download>this notebook</a>, which runs as it is.\n'
        head, _, rest = text.lstrip().replace("```bash\n%%bash -e\n", "```bash\n").partition("\n")
        files.append(File.generated(config, place, content=f"{head}\n\n{note}\n{rest}"))
        for output, data in resources["outputs"].items():
            files.append(File.generated(config, f"tutorials/{output}", content=data))
    return files


def executed(notebooks: list[Path]) -> list[nbformat.NotebookNode]:
    """The notebooks with the outputs of their cells.

    Those of the last time are used where neither the notebooks nor spkd have changed since.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    kept = KEPT / f"{_digest(notebooks)}.json"
    if kept.is_file():
        return [nbformat.from_dict(made) for made in json.loads(kept.read_text())]
    every = [nbformat.read(path, as_version=4) for path in notebooks]
    # The environment that builds the site is the one in which the notebooks run, with its commands and this spkd.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(PEOPLE, Path(folder) / PEOPLE.name)
        for path, notebook in zip(notebooks, every, strict=True):
            began = time.monotonic()
            log.info("%s: is being executed, which takes a minute or two", path.name)
            NotebookClient(notebook, timeout=LONGEST, resources={"metadata": {"path": folder}}).execute()
            _tidy(notebook)
            log.info("%s: executed in %.0f s", path.name, time.monotonic() - began)
    KEPT.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(every))
    return every


def _tidy(notebook: nbformat.NotebookNode) -> None:
    """Put the pieces of each stream together, in place, and leave out lines of progress."""
    for cell in notebook.cells:
        whole: list[nbformat.NotebookNode] = []
        for output in cell.get("outputs", []):
            if output.output_type == "stream" and whole and whole[-1].get("name") == output.name:
                whole[-1].text += output.text
            else:
                whole.append(output)
        for output in whole:
            if output.output_type == "stream":
                output.text = PROGRESS.sub("", output.text)
        if "outputs" in cell:
            cell.outputs = whole


@functools.cache
def _code() -> bytes:
    return b"".join(path.read_bytes() for path in sorted((ROOT / "spkd").rglob("*.py")))


def _digest(notebooks: list[Path]) -> str:
    return hashlib.sha256(_code() + b"".join(path.read_bytes() for path in notebooks)).hexdigest()
