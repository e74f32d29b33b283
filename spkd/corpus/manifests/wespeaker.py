"""WeSpeaker's raw.list: JSON lines with key, wav, spk, and optionally vad, the segments of speech in seconds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from spkd.corpus.manifests.fields import names_of, number, refuse_fields
from spkd.corpus.manifests.json_lines import JSONLines
from spkd.corpus.manifests.reader import Source
from spkd.corpus.utterance import Utterance
from spkd.errors import SpkdError


class WeSpeaker(JSONLines):
    """Reader of `{"key": .., "wav": .., "spk": ..}`. Each of several segments in vad is an utterance, `key@start`."""

    describes = "WeSpeaker's raw.list"

    @classmethod
    def recognises(cls, source: Source) -> bool:
        return {"key", "wav"} <= source.first_object.keys() or {"key", "feat"} <= source.first_object.keys()

    def utterances(self) -> Iterator[Utterance]:
        several = 0
        for where, row in self.rows():
            if "wav" not in row:
                raise SpkdError(f"{where}: no wav; a list of features (feat) holds no audio, make a raw.list")
            stretches = self._stretches(row.pop("vad", None), where)
            row["id"] = row.pop("key", None)
            names = names_of(tuple(name for name, value in row.items() if value is not None), where)
            if stretches:
                refuse_fields(names, ("start", "end"), where, "vad")
                self.unused.update([names.duration] if names.duration is not None else [])
            made = self.utterance(row, names, where)
            self.unused.update(name for name in names.unused if row[name] not in (None, ""))
            if not stretches:
                yield made
                continue
            several += len(stretches) > 1
            for start, end in stretches:
                name = made.id if len(stretches) == 1 else f"{made.id}@{start}"
                yield replace(made, id=name, start=start, duration=end - start)
        if several:
            self.notes.append(
                f"lines with several stretches of speech (vad), each an utterance `key@start`: {several:,}"
            )

    def _stretches(self, vad: Any, where: str) -> list[tuple[float, float]]:
        if vad is None:
            return []
        if not isinstance(vad, list) or not vad or not all(isinstance(pair, list) and len(pair) == 2 for pair in vad):
            raise SpkdError(f"{where}: vad is not a list of [start, end] in seconds")
        pairs = [tuple(number({"vad": word}, "vad", where) or 0.0 for word in pair) for pair in vad]
        if any(start < 0 or end <= start for start, end in pairs):
            raise SpkdError(f"{where}: a stretch of vad does not end after its start")
        return [(start, end) for start, end in pairs]
