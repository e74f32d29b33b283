"""LibriSpeech and Multilingual LibriSpeech."""

from __future__ import annotations

import re
from pathlib import Path

from spkd.corpus.layouts.base import Layout, Named


class LibriSpeech(Layout):
    """`.../1688/142285/1688-142285-0000.flac`: the id is the file's stem."""

    @classmethod
    def read(cls, path: Path) -> Named | None:
        match = re.fullmatch(r"(\d+)-\d+-\d+", path.stem)
        return (path.stem, match[1]) if match else None

    @classmethod
    def fits(cls, path: Path) -> bool:
        """Whether the file is in the folders of its speaker and its chapter, as dates have the same form."""
        above = path.parts[-3:-1]
        return cls.read(path) is not None and list(above) == path.stem.split("-")[:2][-len(above) :]
