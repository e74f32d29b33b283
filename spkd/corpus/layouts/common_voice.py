"""Common Voice: the folder of a language, with tables beside `clips`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from spkd.corpus.layouts.base import Layout, Named
from spkd.files.text import MOST, numbered_lines

CLIPS = "clips"


class CommonVoice(Layout):
    """`clips/common_voice_en_1.mp3`: the id is the stem, the speaker the `client_id` of the tables beside `clips`.

    Files that no table names do not fit.
    """

    @classmethod
    def read(cls, path: Path) -> Named | None:
        """None: a path alone does not name a speaker."""
        return None

    @classmethod
    def detects(cls, root: Path, files: Sequence[Path]) -> bool:
        return bool(_tables(root)) and all(path.parts[0] == CLIPS for path in files)

    @classmethod
    def names(cls, root: Path, files: Sequence[Path]) -> Iterator[Named | None]:
        speakers: dict[str, str] = {}
        for table in _tables(root):
            lines = numbered_lines(table, comments=False, most=MOST)
            columns = next(lines)[1].split("\t")
            client, clip = columns.index("client_id"), columns.index("path")
            for _, line in lines:
                cells = line.split("\t")
                if len(cells) > max(client, clip) and cells[client]:
                    speakers[cells[clip]] = cells[client]
        for path in files:
            speaker = speakers.get(path.name)
            yield (path.stem, speaker) if speaker is not None else None


def _tables(root: Path) -> list[Path]:
    """Tables of the corpus with clips and their speakers."""
    found = []
    for table in sorted(root.glob("*.tsv")):
        _, first = next(numbered_lines(table, comments=False, most=MOST), (0, ""))
        if {"client_id", "path"} <= set(first.split("\t")):
            found.append(table)
    return found
