"""Common Voice: the folder of a language or of several ones, with tables beside each `clips`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from spkd.corpus.layouts.base import MOST_FITTING, Layout, Named
from spkd.files.text import MOST, numbered_lines

CLIPS = "clips"


class CommonVoice(Layout):
    """`clips/common_voice_en_1.mp3`: the id is the stem, the speaker the `client_id` of the tables beside `clips`.

    Files that no table names do not fit.
    """

    lists = r"[^/]*\.tsv"

    @classmethod
    def read(cls, path: Path) -> Named | None:
        """None: a path alone does not name a speaker."""
        return None

    @classmethod
    def detects(cls, root: Path, files: Sequence[Path]) -> bool:
        counts = Counter(_languages(root, files))
        fitting = sum(count for folder, count in counts.items() if folder is not None and _tables(folder))
        return fitting >= MOST_FITTING * len(files) > 0

    @classmethod
    def names(cls, root: Path, files: Sequence[Path]) -> Iterator[Named | None]:
        known: dict[Path | None, dict[str, str]] = {}
        for path, folder in zip(files, _languages(root, files), strict=True):
            if folder not in known:
                known[folder] = {} if folder is None else _speakers(folder)
            speaker = known[folder].get(path.name)
            yield (path.stem, speaker) if speaker is not None else None


def _languages(root: Path, files: Sequence[Path]) -> Iterator[Path | None]:
    """Folder of the language of each file, which has `clips` and the tables; None where the file is not in `clips`."""
    top = root.resolve()
    places: dict[Path, Path | None] = {}
    for path in files:
        if (parent := path.parent) not in places:
            clips = top / parent
            places[parent] = clips.parent if clips.name == CLIPS else None
        yield places[parent]


def _speakers(folder: Path) -> dict[str, str]:
    """Name of each clip of a language -> its speaker."""
    speakers: dict[str, str] = {}
    for table in _tables(folder):
        lines = numbered_lines(table, comments=False, most=MOST)
        columns = next(lines)[1].split("\t")
        client, clip = columns.index("client_id"), columns.index("path")
        for _, line in lines:
            cells = line.split("\t")
            if len(cells) > max(client, clip) and cells[client]:
                speakers[cells[clip]] = cells[client]
    return speakers


def _tables(folder: Path) -> list[Path]:
    """Tables of a language with clips and their speakers."""
    found = []
    for table in sorted(folder.glob("*.tsv")):
        _, first = next(numbered_lines(table, comments=False, most=MOST), (0, ""))
        if {"client_id", "path"} <= set(first.split("\t")):
            found.append(table)
    return found
