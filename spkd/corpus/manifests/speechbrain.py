"""SpeechBrain's tables, where start and stop count samples of the file, and duration (s) is that of the whole file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
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
    """Reader of tables with the columns `ID,duration,wav,start,stop,spk_id`."""

    describes = "SpeechBrain's .csv"

    @classmethod
    def recognises(cls, source: Source) -> bool:
        return {"id", *COLUMNS} <= set(source.table[1])

    def utterances(self) -> Iterator[Utterance]:
        return self.in_samples(self.source.table[1], list(self.rows()))

    def in_samples(self, columns: Iterable[str], rows: Sequence[tuple[str, Mapping[str, Any]]]) -> Iterator[Utterance]:
        """The utterances of rows whose start and stop count samples of their files.

        Args:
            columns: names of the columns.
            rows: file and line of each row, and its cells by column.
        Raises:
            SpkdError: values that an utterance cannot have.
        """
        length = ("duration", "length")  # columns with the duration of the whole file
        names = names_of([c for c in columns if c not in ("start", "stop", *length)], str(self.source.path))
        made = [(where, row, utterance(row, names, where, self.source.folder, self.columns)[0]) for where, row in rows]
        rates = self._rates({u.path for _, row, u in made if row.get("start") or row.get("stop")})
        for where, row, whole in made:
            self.unused.update(name for name in names.unused if row.get(name) not in (None, ""))
            rate = rates.get(whole.path, SAMPLE_RATE)
            start, stop = number(row, "start", where) or 0.0, number(row, "stop", where)
            if start < 0 or (stop is not None and stop <= start):
                raise SpkdError(f"{where}: stop is not after start")
            duration = None if stop is None else (stop - start) / rate
            yield replace(whole, start=start / rate, duration=duration)

    def _rates(self, paths: Iterable[str]) -> dict[str, int]:
        """Path of each file -> its sampling rate (Hz).

        A file that cannot be read is rejected later, when it is measured or decoded.
        """
        rates, files = dict[str, int](), sorted(paths)

        def rate(path: str) -> int:
            try:
                return sample_rate(path)
            except AudioError:
                return SAMPLE_RATE

        with track("reading sampling rates", len(files), "files") as bar, ThreadPoolExecutor(THREADS) as pool:
            for path, value in zip(files, pool.map(rate, files), strict=True):
                rates[path] = value
                bar.advance(1)
        if count := sum(value != SAMPLE_RATE for value in rates.values()):
            self.notes.append(
                f"start and stop count samples of the file; files that are not of {SAMPLE_RATE:,} Hz: {count:,}"
            )
        return rates


class SpeechBrainJSON(SpeechBrainTable):
    """Reader of one JSON object of `"ID": {"wav": .., "length": seconds, "spk_id": ..}`, start and stop in samples."""

    describes = "SpeechBrain's .json"

    @classmethod
    def recognises(cls, source: Source) -> bool:
        first = source.first_object
        # Either indented, so that the first line is not an object, or an object of objects in a single line.
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
