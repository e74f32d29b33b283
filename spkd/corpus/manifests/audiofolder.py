"""Folders of audio as `datasets` has them (AudioFolder): metadata.csv or metadata.jsonl with file_name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from spkd.corpus.manifests.json_lines import JSONLines
from spkd.corpus.manifests.reader import Reader, Source
from spkd.corpus.manifests.table import Table
from spkd.corpus.utterance import Utterance

METADATA = ("metadata.csv", "metadata.jsonl")
FILE = "file_name"


class AudioFolder(Reader):
    """Reader of the metadata in a folder and in the folders within it, which are the splits."""

    describes = "a folder with metadata.csv or metadata.jsonl (file_name), as datasets has it"

    @classmethod
    def recognises(cls, source: Source) -> bool:
        return source.path.is_dir() and bool(_metadata(source.path))

    def utterances(self) -> Iterator[Utterance]:
        found = _metadata(self.source.path)
        for source in found:
            reader = (Table if source.suffix == "csv" else JSONLines)(source, self.columns)
            yield from reader.utterances()
            self.unused.update(reader.unused)
            self.notes += reader.notes
        if len(found) > 1:
            self.notes.append(f"read from {', '.join(str(s.path.relative_to(self.source.path)) for s in found)}")


def _metadata(folder: Path) -> list[Source]:
    """Files with metadata in a folder, or else in those within it."""
    for pattern in ("", "*/"):
        files = [Source(path) for name in METADATA for path in sorted(folder.glob(f"{pattern}{name}"))]
        if named := [each for each in files if FILE in each.table[1] or FILE in each.first_object]:
            return named
    return []
