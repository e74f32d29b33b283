"""Cells with audio in tables of the Parquet format, such as those of data sets on the Hugging Face hub.

A table is read by groups of rows, of which the column with audio is kept while its cells are asked for in turn.
"""

from __future__ import annotations

import bisect
import io
import json
from collections.abc import Callable
from itertools import accumulate
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np

from spkd.corpus.address import Address, is_elsewhere
from spkd.corpus.fetched import copies, opened_or_copied
from spkd.corpus.kept import Kept
from spkd.corpus.local import Opened
from spkd.corpus.ranges import Range
from spkd.files.atomic import PartFile
from spkd.files.reading import State

if TYPE_CHECKING:
    from types import ModuleType

MISSING = "needs pyarrow to be read: pip install 'spkd[parquet]'"
MOST_KEPT = 1 << 28  # bytes of groups of rows that are kept
MOST_OF_GROUP = 1 << 31  # bytes of a group of rows, decompressed
MOST_TABLES = 64  # tables whose metadata is kept
BYTES = "bytes"  # field of a struct with audio, beside `path`


class Table:
    """A table, of which the metadata is read.

    Attributes:
        metadata: its footer.
        schema: its columns, as of pyarrow.
        audio: path of the bytes in each column that can hold audio, by the column's name.
    Raises:
        ValueError: it is not a table, or pyarrow is missing.
    """

    def __init__(self, path: str) -> None:
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            raise ValueError(MISSING) from error
        self._path, self._parquet, self._error = path, parquet, pyarrow.ArrowException
        try:
            with parquet.ParquetFile(_source(path)) as file:
                self.metadata, self.schema = file.metadata, file.schema_arrow
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"not a table of Parquet ({' '.join(str(error).split())[:200]})") from error
        self.audio = {
            each.name: each.name if _is_binary(pyarrow, each.type) else f"{each.name}.{BYTES}"
            for each in self.schema
            if _is_binary(pyarrow, each.type) or _holds_bytes(pyarrow, each.type)
        }
        self._ends = list(accumulate(self.metadata.row_group(n).num_rows for n in range(self.metadata.num_row_groups)))

    def group_of(self, row: int) -> tuple[int, int]:
        """Number of the group of a row, and the row's place in it. Raises ValueError where there is no such row."""
        group = bisect.bisect_right(self._ends, row)
        if group == len(self._ends):
            raise ValueError(f"no row {row:,} in the table, which has {self.metadata.num_rows:,}")
        return group, row - (self._ends[group - 1] if group else 0)

    def read(self, group: int, columns: list[str]) -> Any:
        """Columns of a group, as a table of pyarrow. Raises ValueError where they are damaged or too large."""
        # Of a damaged column, pyarrow 26 ends the process where its own size is asked for.
        taken = self.metadata.row_group(group).total_byte_size
        if taken > MOST_OF_GROUP:
            raise ValueError(
                f"a group of rows with {taken:,} bytes, more than {MOST_OF_GROUP:,}; write the table again with fewer "
                "rows in each (row_group_size)"
            )
        try:
            source = _source(self._path)
            # Checksums of pages are compared where the table has some (as Spark writes them by default).
            with self._parquet.ParquetFile(source, metadata=self.metadata, page_checksum_verification=True) as file:
                return file.read_row_group(group, columns, use_threads=False)
        except (self._error, OSError) as error:
            raise ValueError(f"damaged ({' '.join(str(error).split())[:200]})") from error

    def lacks_none(self, group: int, column: str) -> bool:
        """Whether the statistics of a group say that every row has audio in a column."""
        columns = self.metadata.row_group(group)
        for number in range(columns.num_columns):
            if columns.column(number).path_in_schema == self.audio[column]:
                found = columns.column(number).statistics
                return found is not None and found.has_null_count and found.null_count == 0
        return False

    def cells(self, group: int, column: str) -> Any:
        """The bytes in a column with audio of a group, as an array of pyarrow; as `read`."""
        values = self.read(group, [self.audio[column]]).column(column).combine_chunks()
        return values if column == self.audio[column] else values.field(BYTES)


def _source(path: str) -> str | BinaryIO:
    """What pyarrow opens: the path of a file, or a file elsewhere."""
    if not is_elsewhere(path):
        return path
    file = opened_or_copied(path)
    return cast(BinaryIO, io.BufferedReader(Range(file, 0, file.size)))


def _is_binary(pyarrow: ModuleType, kind: Any) -> bool:
    types = pyarrow.types
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))


def _holds_bytes(pyarrow: ModuleType, kind: Any) -> bool:
    """Whether a type is a struct with binary `bytes`, as that of `datasets.Audio`."""
    if not pyarrow.types.is_struct(kind) or (at := kind.get_field_index(BYTES)) < 0:
        return False
    return _is_binary(pyarrow, kind.field(at).type)


_tables: Kept[Table] = Kept(MOST_TABLES, lambda _: 1)
_copied: Kept[Opened | None] = Kept(MOST_TABLES, lambda _: 1)
# Two stay, as the threads of a loader are at the end of one and at the beginning of the next.
_groups: Kept[Any] = Kept(MOST_KEPT, lambda values: int(values.nbytes), least=2)


def table(path: str, state: State | None) -> Table:
    """The metadata of a table, which is kept while the file stays the same. Raises as `Table`."""
    return _tables.get((path, state), lambda: Table(path))


def cell(address: Address, state: State | None) -> bytes:
    """Bytes of audio in a cell.

    Args:
        state: state of the file.
    Raises:
        ValueError: the table cannot be read, or the cell holds no audio.
    """
    rows = table(address.container, state)
    column = address.column or next(iter(rows.audio), "")
    if column not in rows.audio:
        raise ValueError(f"no column {column!r} of audio in the table")
    group, place = rows.group_of(address.offset)
    key = address.container, state, group, column
    if (copy := _copy(rows, *key)) is not None:
        begin, end = np.frombuffer(copy.read(8 * place, 16), "<i8").tolist()
        if begin < end:  # else it is empty, or there is none
            return copy.read(begin, end - begin)
    value = _groups.get(key, lambda: rows.cells(group, column))[place]
    if not value.is_valid:
        raise ValueError("no audio in this row")
    return bytes(value.as_buffer())


def _copy(rows: Table, path: str, state: State | None, group: int, column: str) -> Opened | None:
    """The cells of a group in a copy on this machine: the places of all, and their bytes.

    None where no folder of copies is set, or there is no room.
    """
    if (folder := copies()) is None:
        return None

    def make() -> tuple[int, Callable[[PartFile], None]]:
        cells = [value.as_buffer() if value.is_valid else b"" for value in rows.cells(group, column)]
        ends = np.cumsum([8 * (len(cells) + 1), *map(len, cells)], dtype="<i8")

        def fill(part: PartFile) -> None:
            part.file.write(ends.tobytes())
            part.file.writelines(cells)

        return int(ends[-1]), fill

    content = json.dumps([path, state, group, column])
    return _copied.get((folder, content), lambda: folder.copy(content, make))
