"""JSON lines with NeMo's keys, a format that spkd also writes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from spkd.corpus.manifests.fields import Names, names_of, utterance
from spkd.corpus.manifests.reader import Reader, Source
from spkd.corpus.utterance import Utterance
from spkd.errors import SpkdError
from spkd.files.atomic import parse_json

PLACEHOLDER = "infer"  # label that NeMo writes for recordings with unknown speakers


class JSONLines(Reader):
    """Reader of `{"audio_filepath": .., "duration": .., "offset": .., "speaker" or "label": ..}`, one object a line."""

    describes = ".jsonl (NeMo's keys)"

    @classmethod
    def recognises(cls, source: Source) -> bool:
        return source.suffix in ("jsonl", "json") or bool(source.first_object)

    def utterances(self) -> Iterator[Utterance]:
        placeholders, differing, known = 0, list[str](), dict[tuple[str, ...], Names]()
        for where, named in self.rows():
            row = {key.lower(): value for key, value in named.items()}
            keys = tuple(row)
            if len(row) < len(named):
                raise SpkdError(f"{where}: two keys are the same but for capital letters")
            names = known.get(keys) or known.setdefault(keys, names_of(keys, where))
            made, differs = utterance(row, names, where, self.source.folder, self.columns)
            differing += [where] * differs
            self.unused.update(name for name in names.unused if row[name] not in (None, "", [], {}))
            if made.speaker == PLACEHOLDER and names.speaker == "label":
                placeholders += 1
                made = replace(made, speaker=None)
            yield made
        if placeholders:
            self.notes.append(
                f"utterances whose speaker is NeMo's placeholder {PLACEHOLDER!r}, unknown: {placeholders:,}"
            )
        if differing:
            self.notes.append(
                f"durations that are not end - start, which counts: {len(differing):,} (first: {differing[0]})"
            )

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """File and line of each object, and the object.

        Raises:
            SpkdError: a line is not a JSON object.
        """
        for number, line in self.source.lines():
            where = f"{self.source.path}:{number}"
            if line.lstrip().startswith("["):
                raise SpkdError(f"{where}: a JSON array; write one object a line (jq -c '.[]' FILE > manifest.jsonl)")
            row = parse_json(line, where)
            if not isinstance(row, dict):
                raise SpkdError(f"{where}: expected a JSON object")
            yield where, row
