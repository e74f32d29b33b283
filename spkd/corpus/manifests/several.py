"""Manifests that a pattern names, one after the other: NeMo's manifest__OP_0..127_CL_.json, train-{0..9}.csv."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from spkd.corpus import shards
from spkd.corpus.manifests.reader import Reader, Source, name_of_reader
from spkd.corpus.utterance import Utterance
from spkd.errors import SpkdError, UsageError
from spkd.registry import MANIFEST_READERS


class Several(Reader):
    """Reader of all files of a pattern with braces, each in its own format."""

    describes = "a pattern of manifests, such as train-{0..9}.csv"

    @classmethod
    def recognises(cls, source: Source) -> bool:
        return not source.path.exists() and shards.BRACES.search(str(source.path)) is not None

    def utterances(self) -> Iterator[Utterance]:
        names, notes = shards.expanded(str(self.source.path)), Counter[str]()
        for name in names:
            source = Source(Path(name))
            if not source.path.exists():
                raise UsageError(f"{name}: no such manifest")
            if (kind := name_of_reader(source)) is None:
                raise SpkdError(f"{name}: unknown manifest format")
            reader: Reader = MANIFEST_READERS[kind](source, self.columns)
            yield from reader.utterances()
            self.unused.update(reader.unused)
            self.differing += reader.differing
            notes.update(reader.notes)
        self.notes += [f"{text} (in {count:,} of {len(names):,} files)" for text, count in notes.items()]
