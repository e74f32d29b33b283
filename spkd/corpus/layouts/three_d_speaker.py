"""3D-Speaker, whose lists name the files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from spkd.corpus.layouts.base import MOST_FITTING, Layout, Named, columns_of, list_of

PARTS = ("train", "test")


class ThreeDSpeaker(Layout):
    """Files of `files/train_wav.scp` and `files/test_wav.scp`, with ids and speakers as these and utt2spk have them."""

    lists = r"files/(?:train|test)_(?:wav\.scp|utt2spk)"

    @classmethod
    def read(cls, path: Path) -> Named | None:
        """None: a path alone does not name an utterance."""
        return None

    @classmethod
    def detects(cls, root: Path, files: Sequence[Path]) -> bool:
        if all(list_of(root, f"files/{part}_wav.scp") is None for part in PARTS):
            return False
        return sum(named is not None for named in cls.names(root, files)) >= MOST_FITTING * len(files) > 0

    @classmethod
    def names(cls, root: Path, files: Sequence[Path]) -> Iterator[Named | None]:
        named: dict[str, Named] = {}
        for part in PARTS:
            speakers = {row[0]: row[1] for row in columns_of(list_of(root, f"files/{part}_utt2spk"), 2)}
            for row in columns_of(list_of(root, f"files/{part}_wav.scp"), 2):
                named[str(Path(row[1]))] = (row[0], speakers.get(row[0]))
        return (named.get(str(path)) for path in files)
