"""Tables whose first line names the columns, separated by commas, tabs, semicolons or bars."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping

from spkd.corpus.manifests.fields import names_of
from spkd.corpus.manifests.reader import UNQUOTED, Reader, Source
from spkd.corpus.utterance import Utterance
from spkd.errors import SpkdError
from spkd.files.text import counted

SUFFIXES = ("csv", "tsv")


class Table(Reader):
    """Reader of tables with the columns `utt,path,speaker,duration[,start][,end][,channel]`.

    The columns may have any order; all but the path may be missing.
    """

    describes = ".csv and .tsv"

    @classmethod
    def recognises(cls, source: Source) -> bool:
        return source.suffix in SUFFIXES or len(source.table[1]) > 1

    def utterances(self) -> Iterator[Utterance]:
        where = f"{self.source.path}:1"
        if not self.source.table[1]:
            next(self.source.lines(), None)  # raises where this is no text at all
            raise SpkdError(f"{where}: the first line must name the columns utt,path,speaker,duration")
        names = names_of(self.source.table[1], where)
        for where, row in self.rows():
            self.unused.update(name for name in names.unused if row[name])
            yield self.utterance(row, names, where)

    def rows(self) -> Iterator[tuple[str, Mapping[str, str]]]:
        """File and line of each row, and its cells by column.

        Raises:
            SpkdError: a row with another number of cells, or text that is not a table.
        """
        path, (delimiter, header) = self.source.path, self.source.table
        quoted = delimiter not in UNQUOTED
        reader = csv.reader(
            self.source.text(),
            delimiter=delimiter,
            quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
            skipinitialspace=quoted,
            strict=True,
        )
        seen_header, line, spread = False, 0, []
        try:
            for cells in reader:
                where, previous, line = f"{path}:{reader.line_num}", line, reader.line_num
                if not any(cell.strip() for cell in cells) or (not seen_header and cells[0].lstrip().startswith("#")):
                    continue
                if not seen_header:
                    seen_header = True
                    continue
                if len(cells) != len(header):
                    raise SpkdError(f"{where}: expected {counted(len(header), 'column')}")
                if line > previous + 1:
                    spread.append(f"{path}:{previous + 1}")
                values = (cell.strip() if quoted else _unwrapped(cell.strip()) for cell in cells)
                yield where, dict(zip(header, values, strict=True))
        except csv.Error as error:
            raise SpkdError(f"{path}:{reader.line_num + 1}: not a table ({error})") from error
        if spread:
            self.notes.append(
                f"rows that go over several lines, as quotation marks enclose line ends: {len(spread):,} "
                f"(first: {spread[0]})"
            )


def _unwrapped(cell: str) -> str:
    """A cell without the quotation marks around it that pandas writes in some tables separated by tabs."""
    return cell[1:-1].replace('""', '"') if len(cell) > 1 and cell[0] == cell[-1] == '"' else cell
