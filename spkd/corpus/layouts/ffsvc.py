"""The far-field speaker verification challenge of 2022 (FFSVC22)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from spkd.corpus.layouts.base import Layout, Named, columns_of, list_of

STEM = re.compile(r"ffsvc22_(?:dev|eval)_\d+")
ORIGINAL = re.compile(r"[A-Z](\d+)_.+")  # F0336_336I-1.5M_1_0009_fast: the first number is the speaker
LISTS = ("dev_meta_list", "dev_meta_list.txt")  # lines of original name and file


class FFSVC(Layout):
    """`dev/ffsvc22_dev_000001.wav`: the id is the file's name, as in the trials; dev_meta_list has the speakers."""

    lists = r"dev_meta_list(?:\.txt)?"

    @classmethod
    def read(cls, path: Path) -> Named | None:
        return (f"{path.stem}.wav", None) if STEM.fullmatch(path.stem) else None

    @classmethod
    def names(cls, root: Path, files: Sequence[Path]) -> Iterator[Named | None]:
        matches = [(ORIGINAL.fullmatch(row[0]), row[1]) for row in columns_of(_list(root), 2)]
        speakers = {f"{stem.removesuffix('.wav')}.wav": match[1] for match, stem in matches if match}
        for path in files:
            named = cls.read(path)
            yield named and (named[0], speakers.get(named[0]))

    @classmethod
    def notes(cls, root: Path, files: Sequence[Path]) -> Iterator[str]:
        if _list(root) is None:
            yield f"no {LISTS[0]} there or in the folder above: speakers are unknown"


def _list(root: Path) -> Path | None:
    return next(filter(None, (list_of(root, name) for name in LISTS)), None)
