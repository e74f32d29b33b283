"""Base class of readers of manifests, and the file that they read."""

from __future__ import annotations

import csv
import shlex
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from spkd.corpus.address import file_of, state_of_container
from spkd.corpus.expected import expect, state_text
from spkd.corpus.manifests.fields import PATH, Names, utterance
from spkd.corpus.utterance import Utterance
from spkd.errors import SpkdError
from spkd.files.reading import parse_json
from spkd.files.text import MOST, numbered_lines, read_lines
from spkd.registry import MANIFEST_READERS

DELIMITERS = (",", "\t", ";", "|")
UNQUOTED = ("\t", "|")  # delimiters of tables in which a quotation mark is a letter, as in Common Voice's sentences
LONGEST_HEADER = 100_000  # characters; the module csv accepts no longer cell


class Source:
    """A file or folder that may be a manifest. The properties by which readers recognise it are read once.

    Attributes:
        folder: folder to which paths in the manifest are relative.
        suffix: suffix of the file, in lower case, without `.gz`.
        taken: characters that were read so far.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.folder, self.taken = path, path.parent, 0
        self.suffix = path.name.removesuffix(".gz").rpartition(".")[2].lower()

    @cached_property
    def first_line(self) -> str:
        """The first line that is neither empty nor a comment; "" for a folder, and for a file that is not text."""
        if not self.path.is_file():
            return ""
        try:
            return next((line for _, line in self.lines(comments=True)), "")
        except SpkdError:
            return ""

    @cached_property
    def first_object(self) -> Mapping[str, Any]:
        """The JSON object in the first line; {} where there is none."""
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
        """Lines that are not empty, with their numbers.

        Args:
            comments: whether lines that begin with `#` are comments, and left out.
        """
        for number, line in numbered_lines(self.path, comments=comments, most=MOST):
            self.taken += len(line) + 1
            yield number, line

    def text(self) -> Iterator[str]:
        """Every line, with a line feed at its end."""
        for line in read_lines(self.path, most=MOST):
            self.taken += len(line) + 1
            yield f"{line}\n"


def name_of_reader(source: Source) -> str | None:
    """Name in MANIFEST_READERS of the first reader that recognises a file; None where there is none."""
    return next((name for name, reader in MANIFEST_READERS.items() if reader.recognises(source)), None)


class Reader(ABC):
    """Base class of readers of manifests.

    Attributes:
        describes: name of the format, for errors.
        columns: further columns to keep as attributes.
        notes: remarks on the file for the user, filled while it is read.
        unused: column that is not used -> number of its values.
        differing: file and line of each utterance whose duration is not end - start.
        states: container that is as it was indexed -> its state then, and the file and line that says so.
    """

    describes: ClassVar[str]

    def __init__(self, source: Source, columns: Sequence[str]) -> None:
        self.source, self.columns = source, columns
        self.notes: list[str] = []
        self.unused: Counter[str] = Counter()
        self.differing: list[str] = []
        self.states: dict[str, tuple[str, str]] = {}

    @classmethod
    @abstractmethod
    def recognises(cls, source: Source) -> bool:
        """Whether a file is of this format. The first reader in the registry that recognises a file reads it."""

    @abstractmethod
    def utterances(self) -> Iterator[Utterance]:
        """The utterances, in order. An utterance with the id "" gets one from the name or path of its file.

        Raises:
            SpkdError: a malformed line (file and line named).
        """

    def utterance(self, row: Mapping[str, Any], names: Names, where: str) -> Utterance:
        """The utterance of one line (see fields.utterance). Its times are compared, and the state of its container.

        Raises:
            SpkdError: values that an utterance cannot have, or a container that changed since it was indexed.
        """
        made, differs = utterance(row, names, where, self.source.folder, self.columns)
        self.differing += [where] * differs
        if names.state is not None and (there := row[names.state]):
            self._check_state(made.path, str(there), where)
        return made

    def _check_state(self, path: str, there: str, where: str) -> None:
        known = self.states.get(path.rpartition("#")[0])
        if known is None or known[0] != there:
            self.check_container(file_of(path), there, where)

    def check_container(self, container: str, there: str, where: str) -> None:
        """Check that a container is as it was indexed. Raises SpkdError: it has changed.

        Args:
            there: its state then.
            where: file and line that says so.
        """
        if (state := state_of_container(container)) is not None and state_text(state) != there:
            raise SpkdError(
                f"{where}: {container} has changed since it was indexed ({there} then, {state_text(state)} now: bytes "
                f"and ns); index it again: spkd manifest CONTAINERS --out {shlex.quote(str(self.source.path))}"
            )
        expect(container, there)
        self.states[container] = there, where
