"""Containers of audio by themselves, and lists of them, such as WeSpeaker's shard.list."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from spkd.corpus import shards
from spkd.corpus.manifests.json_lines import JSONLines
from spkd.corpus.manifests.reader import Reader, Source
from spkd.corpus.utterance import Utterance


class Containers(Reader):
    """Reader of a container, and of a list with the path of a container a line, which are indexed as a command does."""

    describes = "a container of audio, WeSpeaker's shard.list"

    @classmethod
    def recognises(cls, source: Source) -> bool:
        if not source.path.is_file():
            return False
        if f".{source.suffix}" in shards.LISTS:
            return source.first_line.strip().endswith(shards.suffixes())
        return source.path.name.endswith(shards.suffixes()) and shards.kind_of(str(source.path)) is not None

    def utterances(self) -> Iterator[Utterance]:
        self.notes.append("indexed for this run; `spkd manifest` does so once for all")
        with tempfile.TemporaryDirectory() as folder:
            index = Path(folder) / "index.jsonl"
            left_out = shards.index(shards.find([self.source.path]), index).left_out
            if left_out:
                name, reason = next(iter(left_out.items()))
                self.notes.append(f"left out: {len(left_out):,} (first: {name}: {reason})")
            yield from JSONLines(Source(index), self.columns).utterances()
