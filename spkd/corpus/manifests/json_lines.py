"""JSON lines with NeMo's keys, a format that spkd also writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from spkd.corpus.manifests.fields import Names, names_of
from spkd.corpus.manifests.reader import Reader, Source
from spkd.corpus.utterance import Utterance
from spkd.errors import SpkdError
from spkd.files.reading import parse_json


class JSONLines(Reader):
    """Reader of `{"audio_filepath": .., "duration": .., "offset": .., "speaker" or "label": ..}`, one object a line."""

    describes = ".jsonl (NeMo's keys)"

    @classmethod
    def recognises(cls, source: Source) -> bool:
        return source.suffix in ("jsonl", "json") or bool(source.first_object)

    def utterances(self) -> Iterator[Utterance]:
        known = dict[tuple[str, ...], Names]()
        for where, row in self.rows():
            keys = tuple(row)
            names = known.get(keys) or known.setdefault(keys, names_of(keys, where))
            made = self.utterance(row, names, where)
            self.unused.update(name for name in names.unused if row[name] not in (None, "", [], {}))
            yield made

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """File and line of each object, and the object with its keys in lower case.

        Raises:
            SpkdError: a line is not a JSON object, or has a key twice.
        """
        for number, line in self.source.lines():
            where = f"{self.source.path}:{number}"
            if line.lstrip().startswith("["):
                raise SpkdError(f"{where}: a JSON array; write one object a line (jq -c '.[]' FILE > manifest.jsonl)")
            row = parse_json(line, where)
            if not isinstance(row, dict):
                raise SpkdError(f"{where}: expected a JSON object")
            yield where, lower_keys(row, where)


def lower_keys(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """An object with its keys in lower case. Raises SpkdError where two keys are then the same."""
    lowered = {key.lower(): value for key, value in row.items()}
    if len(lowered) < len(row):
        raise SpkdError(f"{where}: two keys are the same but for capital letters")
    return lowered
