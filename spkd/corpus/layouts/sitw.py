"""Speakers in the Wild (SITW)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from spkd.corpus.layouts.base import Layout, Named

LISTS = ("lists", "keys")  # folders beside `audio`


class SITW(Layout):
    """`eval/audio/unaob.flac`, beside the folders `lists` and `keys`: the id is `audio/unaob.flac`, as in these."""

    lists = rf"(?:{'|'.join(LISTS)})/[^/]+"

    @classmethod
    def read(cls, path: Path) -> Named | None:
        return (f"audio/{path.stem}.flac", None) if path.parent.name == "audio" else None

    @classmethod
    def detects(cls, root: Path, files: Sequence[Path]) -> bool:
        if not super().detects(root, files):
            return False
        beside = {(root / path).resolve().parent.parent for path in files}
        return all((place / name).is_dir() for place in beside for name in LISTS)

    @classmethod
    def notes(cls, root: Path, files: Sequence[Path]) -> Iterator[str]:
        yield "speakers are unknown: a recording may hold several people, whom the lists of the trials name"
