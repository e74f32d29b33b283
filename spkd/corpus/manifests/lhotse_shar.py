"""Lhotse Shar: folders of cuts.NUMBER.jsonl.gz with recording.NUMBER.tar."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from spkd.corpus.manifests.lhotse import LhotseCuts, shar_tar
from spkd.corpus.manifests.reader import Reader, Source
from spkd.corpus.utterance import Utterance


class SharFolder(Reader):
    """Reader of all shards of a folder, in the order of their numbers."""

    describes = "a folder of Lhotse Shar (cuts.*.jsonl.gz, recording.*.tar)"

    @classmethod
    def recognises(cls, source: Source) -> bool:
        return source.path.is_dir() and any(shar_tar(path) is not None for path in _cuts(source.path))

    def utterances(self) -> Iterator[Utterance]:
        without = 0
        for path in _cuts(self.source.path):
            reader = LhotseCuts(Source(path), self.columns)
            yield from reader.utterances()
            self.unused.update(reader.unused)
            without += reader.without
        if without:
            self.notes.append(f"cuts without a recording, left out: {without:,}")


def _cuts(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("cuts*.jsonl*") if path.is_file())
