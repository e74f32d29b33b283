"""Base class of the layouts of corpora on disk."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from spkd.files.text import MOST, numbered_lines

MANY = 20  # files: so many of one speaker are noted
MOST_FITTING = 0.9  # share of the files that fit a layout which is detected
Named = tuple[str, str | None]  # id and speaker of an utterance


class Layout(ABC):
    """Base class of layouts. Ids are those of the corpus's public trial lists, whatever format the audio is kept in.

    Attributes:
        lists: pattern of the names of the lists that it reads, from a folder of the corpus on; "" where there are none.
    """

    lists: ClassVar[str] = ""

    @classmethod
    @abstractmethod
    def read(cls, path: Path) -> Named | None:
        """Id and speaker of the utterance of a file, by its path; None where the path does not fit.

        Args:
            path: path from a folder within the corpus or above it.
        """

    @classmethod
    def fits(cls, path: Path) -> bool:
        """Whether a path is one of this layout; it may ask for more than `read` does."""
        return cls.read(path) is not None

    @classmethod
    def detects(cls, root: Path, files: Sequence[Path]) -> bool:
        """Whether the files below a folder have this layout.

        Args:
            files: their paths, relative to `root`.
        """
        left = len(files)  # of those that fit; most layouts are ruled out by the first files
        for path in anchored(root, files):
            left -= not cls.fits(path)
            if left < MOST_FITTING * len(files):
                return False
        return True

    @classmethod
    def names(cls, root: Path, files: Sequence[Path]) -> Iterator[Named | None]:
        """Id and speaker of each file; None where it does not fit. Arguments as of `detects`."""
        return map(cls.read, anchored(root, files))

    @classmethod
    def notes(cls, root: Path, files: Sequence[Path]) -> Iterator[str]:
        """Sentences on what was assumed. Arguments as of `detects`."""
        return iter(())


def anchored(root: Path, files: Sequence[Path]) -> Iterator[Path]:
    """Paths with the name of their folder before them, so that it may be the corpus or a folder within it."""
    name = root.resolve().name
    return (Path(name, path) for path in files)


def list_of(root: Path, name: str) -> Path | None:
    """A list that a corpus brings along, in its folder or in the one above; None where it is in neither."""
    return next((folder / name for folder in (root, root.resolve().parent) if (folder / name).is_file()), None)


def columns_of(path: Path | None, count: int) -> Iterator[list[str]]:
    """The lines of a list that have so many columns or more, split at spaces; none where there is no list."""
    if path is not None:
        rows = (line.split() for _, line in numbered_lines(path, comments=False, most=MOST))
        yield from (row for row in rows if len(row) >= count)
