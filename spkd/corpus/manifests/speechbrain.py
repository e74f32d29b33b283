"""SpeechBrain's tables: start and stop count samples of the file, and duration (s) is that of the whole file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

from spkd.corpus.audio import SAMPLE_RATE, AudioError, sample_rate
from spkd.corpus.manifests.fields import names_of, number, utterance
from spkd.corpus.manifests.reader import Source
from spkd.corpus.manifests.table import Table
from spkd.corpus.utterance import Utterance
from spkd.errors import SpkdError
from spkd.files.atomic import parse_json
from spkd.progress import track

COLUMNS = {"wav", "start", "stop"}
THREADS = 8


class SpeechBrainTable(Table):
    """`ID,duration,wav,start,stop,spk_id`."""

    describes = "SpeechBrain's .csv"

    @classmethod
    def recognises(cls, source: Source) -> bool:
        return {"id", *COLUMNS} <= set(source.table[1])

    def utterances(self) -> Iterator[Utterance]:
        return self.in_samples(self.source.table[1], list(self.rows()))

    def in_samples(self, columns: Iterable[str], rows: Sequence[tuple[str, Mapping[str, Any]]]) -> Iterator[Utterance]:
        """The utterances of rows whose start and stop count samples of their files."""
        length = ("duration", "length")  # of the whole file
        names = names_of([c for c in columns if c not in ("start", "stop", *length)], str(self.source.path))
        made = [(where, row, utterance(row, names, where, self.source.folder, self.columns)[0]) for where, row in rows]
        rates = self._rates({u.path for _, row, u in made if row.get("start") or row.get("stop")})
        for where, row, one in made:
            self.unused.update(name for name in names.unused if row.get(name) not in (None, ""))
            rate = rates.get(one.path, SAMPLE_RATE)
            start, stop = number(row, "start", where) or 0.0, number(row, "stop", where)
            if start < 0 or (stop is not None and stop <= start):
                raise SpkdError(f"{where}: stop is not after start")
            duration = None if stop is None else (stop - start) / rate
            yield _with_times(one, start / rate, duration)

    def _rates(self, paths: Iterable[str]) -> dict[str, int]:
        """The sampling rate of each file (Hz). One that cannot be read is rejected when it is measured or decoded."""
        found, files = dict[str, int](), sorted(paths)

        def rate(path: str) -> int:
            try:
                return sample_rate(path)
            except AudioError:
                return SAMPLE_RATE

        with track("reading sampling rates", len(files), "files") as bar, ThreadPoolExecutor(THREADS) as pool:
            for path, value in zip(files, pool.map(rate, files), strict=True):
                found[path] = value
                bar.advance(1)
        if other := sum(value != SAMPLE_RATE for value in found.values()):
            self.notes.append(
                f"start and stop count samples of the file; files that are not of {SAMPLE_RATE:,} Hz: {other:,}"
            )
        return found


class SpeechBrainJSON(SpeechBrainTable):
    """One JSON object of `"ID": {"wav": .., "length": seconds, "spk_id": ..}`, start and stop in samples."""

    describes = "SpeechBrain's .json"

    @classmethod
    def recognises(cls, source: Source) -> bool:
        first = source.first_object
        # Either indented, so that line 1 is no object yet, or one object of objects in a line.
        indented = source.suffix == "json" and source.first_line.lstrip().startswith("{") and not first
        return indented or (bool(first) and all(isinstance(value, dict) for value in first.values()))

    @cached_property
    def _tree(self) -> dict[str, Any]:
        tree = parse_json("".join(self.source.text()), str(self.source.path))
        if not isinstance(tree, dict) or not all(isinstance(row, dict) for row in tree.values()):
            raise SpkdError(f"{self.source.path}: neither JSON lines (one object a line) nor SpeechBrain's JSON")
        return tree

    def utterances(self) -> Iterator[Utterance]:
        rows = [(f"{self.source.path}: {name!r}", {**row, "id": name}) for name, row in self._tree.items()]
        columns = dict.fromkeys(name for _, row in rows for name in row)
        return self.in_samples(columns, rows)


def _with_times(one: Utterance, start: float, duration: float | None) -> Utterance:
    return Utterance(one.id, one.path, one.speaker, duration, start, one.channel, one.attributes)
