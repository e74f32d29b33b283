"""JSON lines with NeMo's keys, a format that spkd also writes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from spkd.corpus.manifests.fields import Names, names_of, utterance
from spkd.corpus.manifests.reader import Reader, Source
from spkd.corpus.utterance import Utterance
from spkd.errors import SpkdError
from spkd.files.atomic import parse_json

PLACEHOLDERS = ("infer", "UNK", "-")  # speakers that NeMo writes for recordings with unknown speakers


class JSONLines(Reader):
    """Reader of `{"audio_filepath": .., "duration": .., "offset": .., "speaker" or "label": ..}`, one object a line."""

    describes = ".jsonl (NeMo's keys)"

    @classmethod
    def recognises(cls, source: Source) -> bool:
        return source.suffix in ("jsonl", "json") or bool(source.first_object)

    def utterances(self) -> Iterator[Utterance]:
        placeholders, differing, known = Counter[str](), list[str](), dict[tuple[str, ...], Names]()
        for where, row in self.rows():
            keys = tuple(row)
            names = known.get(keys) or known.setdefault(keys, names_of(keys, where))
            made, differs = utterance(row, names, where, self.source.folder, self.columns)
            differing += [where] * differs
            self.unused.update(name for name in names.unused if row[name] not in (None, "", [], {}))
            if made.speaker in PLACEHOLDERS:
                placeholders[made.speaker] += 1
                made = replace(made, speaker=None)
            yield made
        self.notes += [
            f"utterances whose speaker is NeMo's placeholder {name!r}, unknown: {count:,}"
            for name, count in placeholders.items()
        ]
        if differing:
            self.notes.append(
                f"durations that are not end - start, which counts: {len(differing):,} (first: {differing[0]})"
            )

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
