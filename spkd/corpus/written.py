"""Rows of manifests as spkd writes them: tables of commas, and JSON lines with NeMo's keys."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from spkd.corpus.manifests.fields import STATE

# Keys of their JSON lines -> columns of their tables.
KEYS = {
    "id": "utt",
    "audio_filepath": "path",
    "duration": "duration",
    "speaker": "speaker",
    "offset": "start",
    "channel": "channel",
    STATE: STATE,
}
Write = Callable[[Mapping[str, Any]], None]


def row_writer(file: BinaryIO, path: Path, columns: Sequence[str]) -> Write:
    """Function that writes a row, by the columns of tables, after the header of a table.

    Args:
        path: of the manifest, whose suffix tells its format.
        columns: of a table; JSON lines have the keys of the values that are known.
    """
    return _table(file, columns) if path.suffix == ".csv" else partial(_write_object, file)


def _table(file: BinaryIO, columns: Sequence[str]) -> Write:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()

    def write(row: Mapping[str, Any]) -> None:
        writer.writerow({name: "" if value is None else value for name, value in row.items()})
        file.write(text.getvalue().encode())
        text.seek(0)
        text.truncate()

    return write


def _write_object(file: BinaryIO, row: Mapping[str, Any]) -> None:
    named = {key: row.get(name) for key, name in KEYS.items()}
    file.write(json.dumps({key: value for key, value in named.items() if value is not None}).encode() + b"\n")
