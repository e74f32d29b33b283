"""Base class of readers of manifests, and the file that they read."""

from __future__ import annotations

import csv
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from spkd.corpus.manifests.fields import PATH
from spkd.corpus.utterance import Utterance
from spkd.errors import SpkdError
from spkd.files.atomic import parse_json
from spkd.files.text import MOST, numbered_lines, read_lines

DELIMITERS = (",", "\t", ";", "|")
UNQUOTED = ("\t", "|")  # tables so separated have quotation marks as any other letter, as Common Voice's sentences do
LONGEST_HEADER = 100_000  # characters; csv takes no longer cell


class Source:
    """A file or folder that may be a manifest. What a reader looks at to recognise it is read once.

    Attributes:
        path: of the file or folder.
        folder: to which paths inside are relative.
        suffix: of the file, in lower case, without `.gz`.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.folder = path, path.parent
        self.suffix = path.name.removesuffix(".gz").rpartition(".")[2].lower()

    @cached_property
    def first_line(self) -> str:
        """The first line of text that is not empty; "" for a folder, and for what is no text."""
        if not self.path.is_file():
            return ""
        try:
            return next((line for _, line in self.lines(comments=True)), "")
        except SpkdError:
            return ""

    @cached_property
    def first_object(self) -> Mapping[str, Any]:
        """The JSON object of the first line; {} where there is none."""
        if not self.first_line.lstrip().startswith("{"):
            return {}
        try:
            tree = parse_json(self.first_line, str(self.path))
        except SpkdError:
            return {}
        return tree if isinstance(tree, dict) else {}

    @cached_property
    def table(self) -> tuple[str, list[str]]:
        """Delimiter and column names of a table whose first line names a path; ("", []) for any other file."""
        for delimiter in DELIMITERS:
            line = self.first_line[:LONGEST_HEADER]
            cells = (
                line.split(delimiter) if delimiter in UNQUOTED else next(csv.reader([line], delimiter=delimiter), [])
            )
            names = [name.strip().strip('"').lower() for name in cells]
            if any(name in names for name in PATH):
                return delimiter, names
        return "", []

    def lines(self, comments: bool = False) -> Iterator[tuple[int, str]]:
        """Numbered lines that are not empty; those that begin with `#` are left out where these are comments."""
        return numbered_lines(self.path, comments=comments, most=MOST)

    def text(self) -> Iterator[str]:
        """Every line, with a line feed at its end."""
        return (f"{line}\n" for line in read_lines(self.path, most=MOST))


class Reader(ABC):
    """Base class of readers of manifests.

    Attributes:
        describes: the files that it reads, in a few words, for errors.
        source: the file.
        columns: further columns to keep as attributes.
        notes: what a user should know of the file, filled while it is read.
        unused: how many values there are of each column that nothing uses.
    """

    describes: ClassVar[str]

    def __init__(self, source: Source, columns: Sequence[str]) -> None:
        self.source, self.columns = source, columns
        self.notes: list[str] = []
        self.unused: Counter[str] = Counter()

    @classmethod
    @abstractmethod
    def recognises(cls, source: Source) -> bool:
        """Whether a file is of this format. Readers are asked in the order of their registry."""

    @abstractmethod
    def utterances(self) -> Iterator[Utterance]:
        """The utterances in order; an id of "" stands for the file's name, or for its path where names repeat.

        Raises:
            SpkdError: a malformed line (file and line named).
        """
