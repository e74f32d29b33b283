"""Tables of Parquet that name files of audio and hold none, as `datasets` writes them where it embeds no audio."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from spkd.corpus.address import state_of_container
from spkd.corpus.containers.container import SPEAKERS
from spkd.corpus.containers.parquet import MAGIC, PATH_OF_AUDIO, class_name, class_names
from spkd.corpus.manifests.fields import ID, PATH, SPEAKER
from spkd.corpus.manifests.json_lines import JSONLines, lower_keys
from spkd.corpus.manifests.reader import Source
from spkd.corpus.rows import Table, table
from spkd.errors import SpkdError


class ParquetPaths(JSONLines):
    """Reader of a table with paths in a column, or in the structs `{bytes, path}` of a column without bytes.

    The columns have the names of those of other tables.
    """

    describes = "a table of Parquet with paths of audio"

    @classmethod
    def recognises(cls, source: Source) -> bool:
        if not source.path.is_file():
            return False
        with open(source.path, "rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                return False
        try:
            rows = _opened(source)
            return bool(_paths(rows)) and not any(_holds_audio(rows, column) for column in rows.audio)
        except ValueError:  # damaged, or pyarrow is missing, which the reader of containers says
            return False

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        path = self.source.path
        try:
            rows = _opened(self.source)
            places, classes, number = _paths(rows), class_names(rows.schema.metadata), 0
            others = [name for name in rows.schema.names if name not in rows.audio and name not in places.values()]
            speaker = _speaker([name.lower() for name in rows.schema.names])
            for group in range(rows.metadata.num_row_groups):
                within = [name if name not in rows.audio else f"{name}.{PATH_OF_AUDIO}" for name in places.values()]
                part = rows.read(group, [*others, *within])
                values = {name: part.column(name).to_pylist() for name in others}
                for key, name in places.items():
                    cells = part.column(name).combine_chunks()
                    values[key] = (cells if name not in rows.audio else cells.field(PATH_OF_AUDIO)).to_pylist()
                for row in range(part.num_rows):
                    number += 1
                    where = f"{path}: row {number}"
                    found = {name: class_name(cells[row], classes.get(name, ())) for name, cells in values.items()}
                    lowered = lower_keys(found, where)
                    if speaker in lowered:
                        lowered[SPEAKER[0]] = lowered.pop(speaker)
                    yield where, {key: _whole(value) if key in NAMES else value for key, value in lowered.items()}
                self.source.taken = round(path.stat().st_size * (group + 1) / rows.metadata.num_row_groups)
        except ValueError as error:
            raise SpkdError(f"{path}: {error}") from error


NAMES = (*ID, *SPEAKER)


def _opened(source: Source) -> Table:
    return table(str(source.path), state_of_container(str(source.path)))


def _paths(rows: Table) -> dict[str, str]:
    """Key of a row -> its column, for the columns with paths: those of this name, and structs with a path."""
    named = {name.lower(): name for name in rows.schema.names if name.lower() in PATH and name not in rows.audio}
    structs = [
        column
        for column, place in rows.audio.items()
        if place != column and rows.schema.field(column).type.get_field_index(PATH_OF_AUDIO) >= 0
    ]
    named |= {column.lower(): column for column in structs if column.lower() in PATH and column.lower() not in named}
    return named or ({PATH[0]: structs[0]} if structs else {})


def _holds_audio(rows: Table, column: str) -> bool:
    """Whether any cell of a column holds bytes."""
    groups = range(rows.metadata.num_row_groups)
    if any(rows.lacks_none(group, column) for group in groups):
        return True
    return any(len(cells) > cells.null_count for group in groups if (cells := rows.cells(group, column)) is not None)


def _speaker(names: list[str]) -> str:
    """Column with speakers that has no name of tables', such as `client_id`; "" where there is none."""
    if any(name in SPEAKER for name in names):
        return ""
    return next((name for name in SPEAKERS if name in names), "")


def _whole(value: Any) -> Any:
    """A number of a column of whole numbers with gaps, which pandas writes as floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
