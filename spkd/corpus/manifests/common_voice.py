"""Tables of Mozilla Common Voice, separated by tabs, unquoted; speakers are client_id, the audio is in clips/."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from spkd.corpus.manifests.fields import names_of, refuse_fields, text, utterance
from spkd.corpus.manifests.reader import Source
from spkd.corpus.manifests.table import Table
from spkd.corpus.utterance import Utterance

SPEAKER = "client_id"
CLIPS = "clips"


class CommonVoice(Table):
    """Reader of tables with the columns `client_id path sentence ...`."""

    describes = "Common Voice's .tsv"

    @classmethod
    def recognises(cls, source: Source) -> bool:
        return {SPEAKER, "path"} <= set(source.table[1])

    def utterances(self) -> Iterator[Utterance]:
        names = names_of([name for name in self.source.table[1] if name != SPEAKER], f"{self.source.path}:1")
        refuse_fields(names, ("speaker",), f"{self.source.path}:1", SPEAKER)
        folder = self.source.folder / CLIPS if (self.source.folder / CLIPS).is_dir() else self.source.folder
        for where, row in self.rows():
            made, _ = utterance(row, names, where, folder, self.columns)
            self.unused.update(name for name in names.unused if row[name])
            yield replace(made, speaker=text(row, SPEAKER, where))
