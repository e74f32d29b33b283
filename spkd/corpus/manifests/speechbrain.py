"""SpeechBrain's tables, where start and stop count samples of the file, and duration (s) is that of the whole file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from typing import Any

from spkd.corpus.audio import SAMPLE_RATE, AudioError, sample_rate
from spkd.corpus.manifests.fields import DURATION, END, START, Names, names_of, number, refuse_fields
from spkd.corpus.manifests.json_lines import lower_keys
from spkd.corpus.manifests.reader import Source
from spkd.corpus.manifests.table import Table
from spkd.corpus.utterance import Utterance
from spkd.errors import SpkdError
from spkd.files.reading import parse_json
from spkd.progress import track

COLUMNS = {"wav", "start", "stop"}
LEAST = 400  # samples: a shorter stretch is rather one in seconds
THREADS = 8


class SpeechBrainTable(Table):
    """Reader of tables with the columns `ID,duration,wav,start,stop,spk_id`."""

    describes = "SpeechBrain's .csv"

    @classmethod
    def recognises(cls, source: Source) -> bool:
        return {"id", *COLUMNS} <= set(source.table[1])

    def utterances(self) -> Iterator[Utterance]:
        names = names_of(_without_times(self.source.table[1]), f"{self.source.path}:1")
        refuse_fields(names, ("start", "end", "duration"), f"{self.source.path}:1", "start and stop")
        rows = dict[str, tuple[str, Mapping[str, Any], Names]]()
        for where, row in self.rows():
            name = row["id"] or where
            if name in rows:  # at once, since a short gzipped file could repeat a row without end
                raise SpkdError(f"{where}: duplicate utterance id {name!r}")
            rows[name] = (where, row, names)
        return self.in_samples(list(rows.values()))

    def in_samples(self, rows: Sequence[tuple[str, Mapping[str, Any], Names]]) -> Iterator[Utterance]:
        """The utterances of rows whose start and stop count samples of their files.

        Args:
            rows: file and line of each row, its cells by column, and the columns of its fields without times.
        Raises:
            SpkdError: values that an utterance cannot have.
        """
        made = [self.utterance(row, names, where) for where, row, names in rows]
        timed = (whole for (_, row, _), whole in zip(rows, made, strict=True) if row.get("start") or row.get("stop"))
        rates = self._rates({whole.path for whole in timed})
        for (where, row, names), whole in zip(rows, made, strict=True):
            self.unused.update(name for name in names.unused if row.get(name) not in (None, ""))
            rate = rates.get(whole.path, SAMPLE_RATE)
            start, stop = number(row, "start", where) or 0.0, number(row, "stop", where)
            if start < 0 or (stop is not None and stop <= start):
                raise SpkdError(f"{where}: stop is not after start")
            whole_numbers = start.is_integer() and (stop is None or stop.is_integer())
            if not whole_numbers or (stop is not None and stop - start < LEAST):
                shown = f"{start:g} to {'the end' if stop is None else f'{stop:g}'}"
                raise SpkdError(
                    f"{where}: start and stop count samples of the file, but {shown} looks like seconds; "
                    "call times in seconds start and end"
                )
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


def _without_times(columns: Iterable[str]) -> list[str]:
    """The columns but start and stop, and those with the duration of the whole file (s)."""
    return [name for name in columns if name not in ("start", "stop", "duration", "length")]


class SpeechBrainJSON(SpeechBrainTable):
    """Reader of one JSON object of `"ID": {"wav": .., "length": seconds, "spk_id": ..}`, start and stop in samples.

    Times under other names are in seconds, as in JSON lines.
    """

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
        rows = []
        for name, tree in self._tree.items():
            where = f"{self.source.path}: {name!r}"
            rows.append((where, {key: v for key, v in lower_keys(tree, where).items() if v is not None} | {"id": name}))
        counted = []
        for where, row in rows:
            if row.keys() >= COLUMNS - {"wav"}:
                names = names_of(_without_times(row), where)
                refuse_fields(names, ("start", "end", "duration"), where, "start and stop")
                counted.append((where, row, names))
        in_samples = self.in_samples(counted)
        for where, row in rows:
            yield next(in_samples) if row.keys() >= COLUMNS - {"wav"} else self._in_seconds(row, where)

    def _in_seconds(self, row: dict[str, Any], where: str) -> Utterance:
        """The utterance of a row without a stop."""
        if "length" in row and not any(name in row for name in (*START, *END, *DURATION)):
            row["duration"] = row.pop("length")  # of the whole file
        names = names_of(tuple(row), where)
        if names.start is not None and names.end is None and names.duration is None:
            raise SpkdError(
                f"{where}: {names.start!r} without its end; give start and stop in samples, or start and end"
            )
        self.unused.update(name for name in names.unused if row[name] not in ("", [], {}))
        return self.utterance(row, names, where)
