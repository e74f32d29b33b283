"""Lists of audio paths, one a line; and clovaai's train_list.txt, with the speaker before each path."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from spkd.corpus.audio import AUDIO_SUFFIXES
from spkd.corpus.manifests.fields import names_of, utterance
from spkd.corpus.manifests.reader import Reader, Source
from spkd.corpus.utterance import Utterance
from spkd.errors import SpkdError

SUFFIXES = ("txt", "lst", "list")


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
            if row["path"].endswith(".tar"):
                raise SpkdError(f"{where}: a list of tars (WeSpeaker's shard.list); give the raw.list they are made of")
            yield utterance(row, names, where, self.source.folder)[0]

    def row(self, line: str, where: str) -> dict[str, str]:
        """The fields of one line."""
        return {"id": line, "path": line}


class SpeakerPathList(PathList):
    """Reader of a list with `speaker path` a line. The path is the id, as in the trial lists of VoxCeleb."""

    describes = "clovaai's train_list.txt (speaker path)"

    @classmethod
    def recognises(cls, source: Source) -> bool:
        words = source.first_line.split()
        if source.suffix not in SUFFIXES or len(words) != 2:
            return False
        is_path = Path(words[1]).suffix.lower() in AUDIO_SUFFIXES
        speaker = "/" not in words[0] and Path(words[0]).suffix.lower() not in AUDIO_SUFFIXES
        # A path may contain a space: then the whole line names a file.
        return is_path and speaker and not (source.folder / source.first_line.strip()).is_file()

    def row(self, line: str, where: str) -> dict[str, str]:
        words = line.split(maxsplit=1)
        if len(words) != 2:
            raise SpkdError(f"{where}: {line[:200]!r} is not `speaker path`, as line 1 is")
        return {"id": words[1], "path": words[1], "speaker": words[0]}
