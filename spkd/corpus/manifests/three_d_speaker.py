"""3D-Speaker's table (`prepare_data_csv.py`), where start and stop are in seconds, and dur (s) is of the whole file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from spkd.corpus.manifests.fields import names_of, number, refuse_fields
from spkd.corpus.manifests.reader import Source
from spkd.corpus.manifests.table import Table
from spkd.corpus.utterance import Utterance
from spkd.errors import SpkdError


class ThreeDSpeaker(Table):
    """Reader of tables with the columns `ID,dur,path,start,stop,spk`."""

    describes = "3D-Speaker's .csv"

    @classmethod
    def recognises(cls, source: Source) -> bool:
        return {"id", "dur", "path", "start", "stop", "spk"} <= set(source.table[1])

    def utterances(self) -> Iterator[Utterance]:
        columns = [name for name in self.source.table[1] if name not in ("dur", "stop")]
        names = names_of(columns, f"{self.source.path}:1")
        refuse_fields(names, ("end", "duration"), f"{self.source.path}:1", "start and stop")
        for where, row in self.rows():
            made = self.utterance(row, names, where)
            stop = number(row, "stop", where)
            if stop is not None and stop <= made.start:
                raise SpkdError(f"{where}: stop is not after start")
            self.unused.update(name for name in names.unused if row[name])
            yield replace(made, duration=None if stop is None else stop - made.start)
