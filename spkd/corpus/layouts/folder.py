"""Corpora of which nothing is known but that there is a folder for each speaker."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from spkd.corpus.layouts.base import Layout, Named
from spkd.errors import SpkdError, first_few
from spkd.files.text import counted

# Folders that hold parts of a corpus, or all of it, and not a speaker: its name or sets, a kind of speech or of people.
PART = re.compile(
    r"(?:train|dev|val|valid|eval|test|enrol+)(?:ing|elopment|idation|uation|ment)?"
    r"(?:[-_. ]?(?:set|clean|other|\d+)|[-_.]\w+)*"
    r"|(?:wav|flac|sph|audio|clip|recording|data|corpus|speech)s?(?:[-_]?\d+k?)?(?:_silence_trimmed)?|dr[1-8]"
    r"|speechdata|data_aishell\d?|timit|mls_[a-z]+"  # dr and timit: TIMIT; HI-MIA, AISHELL-1, MLS
    r"|(?:fe)?male|m|f|(?:wo)?m[ae]n|boys?|girls?|adults?|child(?:ren)?"
    r"|(?:session|sess|ses|split|fold|part|disc|disk|day|visit|phase|round|channel|mic)s?[-_ ]?\d+"
    r"|clean|noisy|noise|phone|telephone|microphone|near|far|close|distant|indoors?|outdoors?|read|spontaneous",
    re.IGNORECASE,
)
# Those of them that hold speakers, where they lie within other folders: parts within a speaker are sessions, say.
SET = re.compile(
    r"(?:train|dev|val|valid|eval|test|enrol+)(?:[-_. ]?(?:set|clean|other|\d+)|[-_.]\w+)*"
    r"|(?:wav|flac|audio|clip|data)s?(?:[-_]?\d+k?)?",
    re.IGNORECASE,
)
FEW = 10  # folders: so many speakers or fewer, which have folders within, are noted


class Folder(Layout):
    """`ann/any/depth/1.wav`: the first folder is the speaker, unless it is a part of the corpus."""

    @classmethod
    def read(cls, path: Path) -> Named | None:
        return (str(path), path.parts[0]) if len(path.parts) >= 2 else None

    @classmethod
    def names(cls, root: Path, files: Sequence[Path]) -> Iterator[Named | None]:
        """Id and speaker of each file. Raises SpkdError: there are several parts, and no folders within them."""
        level = level_of_speakers(root, files)
        for path in files:
            named = cls.read(path)
            yield named and (named[0], path.parts[level])

    @classmethod
    def detects(cls, root: Path, files: Sequence[Path]) -> bool:
        return True

    @classmethod
    def notes(cls, root: Path, files: Sequence[Path]) -> Iterator[str]:
        level = level_of_speakers(root, files)
        deeper = [file for file in files if len(file.parts) > level + 1]
        if level:
            parts = sorted({"/".join(file.parts[:level]) for file in files})
            shown = ", ".join(parts[:4]) + (", ..." if len(parts) > 4 else "")
            yield f"speakers are the folders within {shown}, which are taken for parts of the corpus"
            names = Counter(place[-1] for place in {file.parts[: level + 1] for file in deeper})
            if several := sorted(name for name, count in names.items() if count > 1):
                yield f"speakers in several of them, each taken for one person: {first_few(several)}"
        stems = Counter(file.with_suffix("") for file in files if len(file.parts) > 1)
        if twice := [str(file) for file in files if stems[file.with_suffix("")] > 1]:
            suffix = Path(twice[0]).suffix.lstrip(".")
            yield (
                f"files that differ in their suffix alone are an utterance each: {first_few(twice)}; if they are one "
                f"recording, choose with --suffix {suffix}"
            )
        yield from notes_on_speakers([file.parts[level:-1] for file in deeper])


def level_of_speakers(root: Path, files: Sequence[Path]) -> int:
    """Number of levels of folders above those of the speakers, which hold parts of the corpus (train, dev, test).

    Raises:
        SpkdError: there are several parts, and no folders within them.
    """
    level = 0
    while _are_parts(files, level) or _are_corpora(files, level):
        names = sorted({file.parts[level] for file in files if len(file.parts) > level + 1})
        if any(len(file.parts) <= level + 2 for file in files):
            if len(names) > 1 or level:
                raise SpkdError(
                    f"{root}: by the layout folder the speakers would be {', '.join(names[:4])}; make a manifest of "
                    "each, or a table with the columns path,speaker"
                )
            break
        level += 1
    return level


def _are_parts(files: Sequence[Path], level: int) -> bool:
    """Whether all folders at a level have names of parts of a corpus."""
    return all(PART.fullmatch(file.parts[level]) for file in files if len(file.parts) > level + 1)


def _are_corpora(files: Sequence[Path], level: int) -> bool:
    """Whether the folders at a level are few, and in each there are sets, in which there are more folders than these.

    LibriTTS/train-clean-100/19 and VCTK/wav48/p225, but not ann/wav/1.wav.
    """
    below = [file.parts[level:-1] for file in files]
    names = {folders[0] for folders in below if folders}
    if not names or len(names) > FEW or not all(len(folders) > 2 and SET.fullmatch(folders[1]) for folders in below):
        return False
    inner = {next((name for name in folders[2:] if not PART.fullmatch(name)), None) for folders in below}
    return None not in inner and len(inner) > len(names)


def notes_on_speakers(folders: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Sentences on folders that are taken for speakers and may be something else.

    Args:
        folders: of each file, the folder that is taken for its speaker and those within.
    """
    names = sorted({path[0] for path in folders})
    within = {path[:2] for path in folders if len(path) > 1}
    instead = "if not, make a manifest of each part, or a table with the columns path,speaker"
    if parts := [name for name in names if PART.fullmatch(name)]:
        beside = next((name for name in names if name not in parts), None)
        if beside is not None:
            yield f"{', '.join(parts[:4])} beside {beside} are taken for speakers; {instead}"
    few = len(names) <= FEW and {name for name, _ in within} == set(names)
    sessions = all(PART.fullmatch(folder) and not SET.fullmatch(folder) for _, folder in within)
    if few and (not sessions or len(within) >= 2 * len(names)):
        yield (
            f"the speakers are {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}, and not the "
            f"{counted(len(within), 'folder')} within ({'/'.join(min(within))}{', ...' if len(within) > 1 else ''}); "
            f"{instead}"
        )
