"""NeMo's tarred manifests: JSON lines whose audio_filepath is a member of the tar with the number shard_id."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path, PurePosixPath

from spkd.corpus.manifests.fields import PATH, names_of
from spkd.corpus.manifests.json_lines import JSONLines
from spkd.corpus.manifests.reader import Source
from spkd.corpus.manifests.tars import addresses
from spkd.corpus.utterance import Utterance
from spkd.errors import SpkdError

SHARD = "shard_id"
SEGMENT = re.compile(r"-sub\d+$")  # behind the name of a member, for its second and further stretches


class TarredNeMo(JSONLines):
    """Reader of `{"audio_filepath": "a.wav", "shard_id": 0, ..}`, with the tars beside it or in the folder above."""

    describes = "NeMo's tarred manifests (shard_id)"

    @classmethod
    def recognises(cls, source: Source) -> bool:
        return SHARD in source.first_object and PATH[1] in source.first_object

    def __init__(self, source: Source, columns: Sequence[str]) -> None:
        super().__init__(source, columns)
        self._tars: dict[int, Path] = {}

    def utterances(self) -> Iterator[Utterance]:
        members = cache(addresses)
        made: list[tuple[int, str, Utterance]] = []
        seen = set[str]()
        for where, row in self.rows():
            number, name = row.pop(SHARD, None), row.get(PATH[1])
            if isinstance(number, bool) or not isinstance(number, int) or not isinstance(name, str):
                raise SpkdError(f"{where}: no {SHARD} and {PATH[1]}")
            tar = self._tar(number, where)
            if (address := _member(members(tar), name)) is None:
                raise SpkdError(f"{where}: no member {name[:80]!r} in {tar}")
            row[PATH[1]] = address
            names = names_of(tuple(row), where)
            utterance = self.utterance(row, names, where)
            self.unused.update(name for name in names.unused if row[name] not in (None, "", [], {}))
            key = utterance.id or f"{number}/{name}"
            if key in seen:  # at once, since a short gzipped file could repeat a line without end
                raise SpkdError(f"{where}: {name[:80]!r} of shard {number} is there twice")
            seen.add(key)
            made.append((number, name, utterance))
        # Ids are those that the files had, where these differ; else their names, or these with the number of the shard.
        nameless = [each for each in made if not each[2].id]
        ways: list[Callable[[int, str], str]] = [
            lambda number, name: PurePosixPath(name).stem,
            lambda number, name: name,
            lambda number, name: f"{number}/{name}",
        ]
        way = next(
            (way for way in ways if len({way(number, name) for number, name, _ in nameless}) == len(nameless)), ways[-1]
        )
        if way is ways[-1]:
            self.notes.append(
                f"utterances without an id, whose names repeat among the shards and whose ids are `shard/name`: "
                f"{len(nameless):,}"
            )
        for number, name, each in made:
            yield each if each.id else replace(each, id=way(number, name))

    def _tar(self, number: int, where: str) -> Path:
        """The tar of a number. Raises SpkdError where there is none, or several."""
        if number not in self._tars:
            folders = (self.source.folder, self.source.folder.absolute().parent)
            pattern = re.compile(rf"(?:|.*\D)0*{number}\.tar")
            found = [
                [each for each in sorted(folder.glob("*.tar")) if pattern.fullmatch(each.name)] for folder in folders
            ]
            tars = next((each for each in found if each), [])
            if len(tars) != 1:
                what = f"{tars[0]} and {tars[1]} have the number" if tars else "no tar beside it has the number"
                raise SpkdError(f"{where}: {what} {number} of {SHARD}, such as audio_{number}.tar")
            self._tars[number] = tars[0]
        return self._tars[number]


def _member(members: dict[str, str], name: str) -> str | None:
    """Address of the audio of a line; None where it is not in the tar."""
    path = PurePosixPath(name)
    whole = path.with_name(SEGMENT.sub("", path.stem) + path.suffix)
    return next((members[str(each)] for each in (path, whole) if str(each) in members), None)
