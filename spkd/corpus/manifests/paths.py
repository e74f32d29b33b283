"""Lists of audio paths, one a line; and of a speaker (clovaai's train_list.txt) or an id in front of each path."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from spkd.corpus.audio import AUDIO_SUFFIXES
from spkd.corpus.manifests.fields import ROLES, names_of, utterance
from spkd.corpus.manifests.reader import Reader, Source
from spkd.corpus.utterance import Utterance
from spkd.errors import SpkdError

SUFFIXES = ("txt", "lst", "list")
SEPARATORS = re.compile(r"[\s,;|]+")
NO_SPEAKERS = {"0", "1", "2", "3"}  # labels, and the parts of VoxCeleb1's iden_split.txt
HEADERS = {name for names in ROLES.values() for name in names}  # words that name columns


def _is_audio(word: str) -> bool:
    return Path(word.strip('"')).suffix.lower() in AUDIO_SUFFIXES


class PathList(Reader):
    """Reader of a list with one path a line, which is also the id."""

    describes = ".txt, .lst and .list (paths)"

    @classmethod
    def recognises(cls, source: Source) -> bool:
        return source.suffix in SUFFIXES

    def utterances(self) -> Iterator[Utterance]:
        names = names_of(("id", "path", "speaker"), str(self.source.path))
        for number, line in self.source.lines(comments=True):
            where = f"{self.source.path}:{number}"
            row = self.row(line.strip(), where)
            self._check_path(row["path"], where)
            yield utterance(row, names, where, self.source.folder)[0]

    def _check_path(self, path: str, where: str) -> None:
        """Refuse a line with words in addition to a path, unless there is a file of such a name.

        Raises:
            SpkdError: `path speaker`, `path 0`, a trial, or the names of columns.
        """
        words = SEPARATORS.split(path)
        audio = [_is_audio(word) for word in words]
        is_header = all(word.strip('"').lower() in HEADERS for word in words)
        alone = len(words) == 1 or (audio[-1] and sum(audio) == 1)
        if (alone and not is_header) or (self.source.folder / path).is_file():
            return
        if is_header:
            raise SpkdError(f"{where}: {path[:80]!r} looks like a header; name the file .csv, or leave the line out")
        if sum(audio) > 1:
            raise SpkdError(f"{where}: {path[:80]!r} has two paths, as a trial; a manifest has one a line")
        if any(audio):
            raise SpkdError(f"{where}: {path[:80]!r} has words after its path; write `speaker path`, or the path alone")

    def row(self, line: str, where: str) -> dict[str, str]:
        """The fields of one line."""
        return {"id": line, "path": line}


class SpeakerPathList(PathList):
    """Reader of a list with `speaker path` a line. The path is the id, as in the trial lists of VoxCeleb.

    Where each first word is there once, and is no folder of its path, the lines are `id path`, as in Kaldi's wav.scp
    and in the enrolment lists of CN-Celeb and SITW.
    """

    describes = "clovaai's train_list.txt (speaker path), id path"

    @classmethod
    def recognises(cls, source: Source) -> bool:
        words = source.first_line.split()
        if source.suffix not in SUFFIXES or len(words) != 2:
            return False
        speaker = "/" not in words[0] and not _is_audio(words[0])
        # A path may contain a space: then the whole line names a file.
        return _is_audio(words[1]) and speaker and not (source.folder / source.first_line.strip()).is_file()

    def utterances(self) -> Iterator[Utterance]:
        if all(word in NO_SPEAKERS for word, _ in self._lines()):
            words = ", ".join(sorted({word for word, _ in self._lines()}))
            raise SpkdError(
                f"{self.source.path}: the words before the paths are {words}: parts of a corpus (VoxCeleb1's "
                "iden_split.txt) or labels; leave them out, or, if they are speakers, give a table with the columns "
                "path,speaker"
            )
        if self._has_ids:
            count = sum(1 for _ in self._lines())
            self.notes.append(
                "lines taken as `id path` of unknown speakers, as each name is there once and is no folder of its "
                f"path: {count:,}"
            )
        yield from super().utterances()

    def row(self, line: str, where: str) -> dict[str, str]:
        words = line.split(maxsplit=1)
        if len(words) != 2 or (_is_audio(words[0]) and not _is_audio(words[1])):
            raise SpkdError(f"{where}: {line[:200]!r} is not `speaker path`, as line 1 is")
        if self._has_ids:
            return {"id": words[0], "path": words[1]}
        return {"id": words[1], "path": words[1], "speaker": words[0]}

    @cached_property
    def _has_ids(self) -> bool:
        """Whether the first words are ids of the paths, not speakers."""
        seen = set[str]()
        for word, path in self._lines():
            if word in seen or word in Path(path).parts[:-1]:
                return False
            seen.add(word)
        return True

    def _lines(self) -> Iterator[tuple[str, str]]:
        """First word of each line, and the rest."""
        for _, line in self.source.lines(comments=True):
            word, *path = line.split(maxsplit=1)
            yield word, "".join(path).strip()
