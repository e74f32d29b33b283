"""The challenges of short-duration speaker verification (SdSV 2020 and 2021, DeepMine)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from spkd.corpus.layouts.base import Layout, Named, columns_of, list_of

STEM = re.compile(r"(?:trn|enr|evl)_\d+")
LABELS = "docs/train_labels.txt"  # lines of file, speaker and, in task 1, phrase


class SdSV(Layout):
    """`wav/train/trn_000001.wav`, `wav/enrollment/enr_000001.wav`, `wav/evaluation/evl_000001.wav`: the id is the stem.

    The speakers of the training data are those of docs/train_labels.txt; the others are unknown.
    """

    lists = re.escape(LABELS)

    @classmethod
    def read(cls, path: Path) -> Named | None:
        return (path.stem, None) if STEM.fullmatch(path.stem) else None

    @classmethod
    def names(cls, root: Path, files: Sequence[Path]) -> Iterator[Named | None]:
        speakers = {row[0]: row[1] for row in columns_of(list_of(root, LABELS), 2)}
        for path in files:
            named = cls.read(path)
            yield named and (named[0], speakers.get(named[0]))

    @classmethod
    def notes(cls, root: Path, files: Sequence[Path]) -> Iterator[str]:
        if list_of(root, LABELS) is None:
            yield f"no {LABELS} there or in the folder above: speakers are unknown"
