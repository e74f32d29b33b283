"""A large manifest as a file that is mapped: it is parsed once, and takes no memory of any process from then on.

The file follows from a manifest of spkd's own formats, and lies in the user's cache folder. Where the manifest has
changed, whoever reads it writes the file anew. What is in it is compared with its checksums when it is opened.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spkd.corpus.columns import NUMBERS, Columns
from spkd.errors import SpkdError
from spkd.files import digest
from spkd.files.atomic import check_no_links, remove_unused, users_files
from spkd.files.mapped import MappedFile, Sections, write_mapped
from spkd.files.packed import PackedTexts, Places
from spkd.files.reading import parse_json, state_of
from spkd.files.spool import stretches
from spkd.version import __version__

LEAST = 1 << 22  # bytes of a manifest from which on it is kept so
FORMAT = 1  # of what follows from a manifest
FOLDER = "manifests"  # in the user's cache folder
# Columns of texts and of numbers, with the types of the numbers; the lists of texts beside them.
TEXTS = ("ids", "folders", "names")
TYPES = {name: np.dtype(kind).str for name, kind in NUMBERS.items()} | {"ends": "<i8", "stretches": "<i8"}
LISTS = ("speakers", "kinds", "notes", "states", "digest")
INDEX = {"hashes": "<u8", "order": "<i8"}  # of the ids, as of `Places`

Stated = tuple[str, str, str]  # a container, its state when it was indexed, and where the manifest says so


@dataclass(frozen=True)
class Content:
    """What is read from a manifest.

    Attributes:
        notes: for the user.
        states: states of containers, which are compared whenever the manifest is read.
        digest: as of `Manifest`.
    """

    columns: Columns
    notes: Sequence[str]
    states: Sequence[Stated]
    digest: str


class MappedManifest:
    """The mapped file of a manifest, whether it is there or not.

    Args:
        path: the manifest, as it was given: its audio lies relative to it.
        columns: further columns that are kept.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        given = [str(path), list(columns)]
        self._manifest, self._state = path, state_of(path)
        self._paths = users_files(FOLDER, f"{digest.of_tree([str(path.absolute()), *given])}.mapped")
        self._content = {"manifest": digest.of_tree([FORMAT, __version__, *given, digest.of_file(path)])}

    @classmethod
    def of(cls, path: Path, columns: Sequence[str]) -> MappedManifest | None:
        """The mapped file of a manifest; None of one that is small, which is parsed in no time."""
        return cls(path, columns) if path.stat().st_size >= LEAST else None

    def read(self) -> Content | None:
        """What was read from the manifest before; None where it was not, has changed since, or the file is damaged."""
        for path in self._paths:
            try:
                file = MappedFile(path, self._content, {})
                return _content(file, str(path))
            except (SpkdError, ValueError):
                continue
        return None

    def write(self, content: Content) -> None:
        """Keep what was read from the manifest, unless this has changed meanwhile, or there is no place for it."""
        if state_of(self._manifest) != self._state:
            return
        for path in self._paths:
            try:
                check_no_links(path.parent.parent, [path.parent.name])
                write_mapped(path, self._content, _sections(content))
            except (SpkdError, OSError):
                continue
            remove_unused(path.parent)


def _content(file: MappedFile, where: str) -> Content:
    """What a mapped file holds, all of it checked. Raises SpkdError or ValueError: it is damaged."""

    def texts(name: str) -> PackedTexts:
        return PackedTexts(file.whole(name)["value"], file.whole(_end_of(name))["value"])

    def parsed(name: str) -> list[Any]:
        return [parse_json(text, where) for text in texts(name)]

    values: dict[str, Any] = {name: file.whole(name)["value"] for name in TYPES}
    values |= {"stretches": values["stretches"].reshape(-1, 2)} | {name: texts(name) for name in TEXTS}
    columns = Columns(
        **values,
        speakers=texts("speakers"),
        kinds=[tuple((name, value) for name, value in each) for each in parsed("kinds")],
    )
    columns.ids.places = Places(columns.ids, *(file.whole(name)["value"] for name in INDEX))
    states = [(container, state, place) for container, state, place in parsed("states")]
    return Content(columns, list(texts("notes")), states, texts("digest")[0])


def _sections(content: Content) -> Sections:
    columns, places = content.columns, content.columns.ids.places
    lists = {
        "speakers": columns.speakers,
        "kinds": map(json.dumps, columns.kinds),
        "notes": content.notes,
        "states": map(json.dumps, content.states),
        "digest": [content.digest],
    }
    arrays = {name: (kind, getattr(columns, name)) for name, kind in TYPES.items()}
    arrays |= {name: (kind, getattr(places, name)) for name, kind in INDEX.items()}
    for name, texts in [(name, getattr(columns, name)) for name in TEXTS] + list(lists.items()):
        packed = PackedTexts.of(texts)
        arrays |= {name: ("u1", packed.data), _end_of(name): ("<i8", packed.ends)}
    sections = {}
    # The wide ones first, so that each begins at a multiple of its width.
    for name, (kind, values) in sorted(arrays.items(), key=lambda item: -np.dtype(item[1][0]).itemsize):
        flat = values.reshape(-1)
        sections[name] = np.dtype([("value", kind)]), len(flat), stretches(flat)
    return sections


def _end_of(name: str) -> str:
    """Section with the ends of texts."""
    return f"{name}_end"
