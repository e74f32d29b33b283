"""Trial lists in the field's formats: `1 a b` (VoxCeleb), `a b target` (Kaldi; also `a b 1`), `a b` (unlabelled).

Read however tools write them: gzipped, with a byte-order mark, any line ends, separated by spaces, tabs, commas or
semicolons, with comments and a header line, labels in any case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spkd.errors import SpkdError, UsageError, did_you_mean
from spkd.text import numbered_lines, read_text

TARGET = ("1", "target", "tgt", "true", "same", "genuine", "positive", "yes")
NON_TARGET = ("0", "nontarget", "non-target", "non", "imp", "impostor", "imposter", "false", "different", "no")
COLUMNS = ("label", "target", "enrol", "enroll", "enrolment", "enrollment", "test", "trial", "same", "is_target")
NUMBERED = ("utt", "path", "file", "wav", "id", "audio", "utterance")
HEADER = {*COLUMNS, *(f"{word}{n}" for word in NUMBERED for n in (1, 2))}
SEPARATORS = (None, ",", "\t", ";")  # None: any white space


@dataclass(frozen=True)
class Trials:
    """N trials in order.

    Attributes:
        utterances: ids of every utterance, once, in order of appearance.
        enrolment, test: (N,) their indices.
        label: (N,) 1 target, 0 non-target; None for an unlabelled list.
        line: (N,) of the file.
        source: the file.
    """

    utterances: list[str]
    enrolment: np.ndarray
    test: np.ndarray
    label: np.ndarray | None
    line: np.ndarray
    source: str

    def __len__(self) -> int:
        return len(self.enrolment)


Parsed = tuple[str, str, int | None]


def _label(word: str) -> int | None:
    word = word.lower()
    return 1 if word in TARGET else 0 if word in NON_TARGET else None


def _voxceleb(parts: list[str]) -> Parsed | None:
    return (parts[1], parts[2], _label(parts[0])) if len(parts) == 3 and _label(parts[0]) is not None else None


def _kaldi(parts: list[str]) -> Parsed | None:
    return (parts[0], parts[1], _label(parts[2])) if len(parts) == 3 and _label(parts[2]) is not None else None


def _plain(parts: list[str]) -> Parsed | None:
    return (parts[0], parts[1], None) if len(parts) == 2 else None


FORMATS: dict[str, Callable[[list[str]], Parsed | None]] = {
    "voxceleb": _voxceleb,
    "kaldi": _kaldi,
    "plain": _plain,
}
SHAPES = {"voxceleb": "1 enrolment test", "kaldi": "enrolment test target", "plain": "enrolment test"}


def read(path: str | Path, form: str = "auto") -> Trials:
    """Read a trial list.

    Args:
        form: a name in FORMATS, or "auto": the one format that every line fits (VoxCeleb's where several do).
    Raises:
        UsageError: no such file or format. SpkdError: a malformed line (file and line named), or no trials.
    """
    path = Path(path)
    if not path.exists():
        raise UsageError(f"no trial list {path}")
    if form != "auto" and form not in FORMATS:
        raise UsageError(f"format={form}{did_you_mean(form, [*FORMATS, 'auto'])}")
    text = read_text(path)
    candidates = FORMATS if form == "auto" else {form: FORMATS[form]}
    furthest, problem = -1, ""
    for separator in SEPARATORS:
        for name, parse in candidates.items():
            trials, number, line = _parsed(text, separator, parse, str(path))
            if trials is not None:
                return trials
            # The format that got furthest is the one the file was meant to be in.
            if number > furthest:
                furthest, problem = number, f"{path}:{number}: {line[:200]!r} is not `{SHAPES[name]}`"
    if furthest < 0:
        raise SpkdError(f"{path}: holds no trials")
    raise SpkdError(problem)


def _parsed(
    text: str, separator: str | None, parse: Callable[[list[str]], Parsed | None], source: str
) -> tuple[Trials | None, int, str]:
    """The trials; or None, with the first line that is none of this format (-1 where there is no line at all)."""
    index_of: dict[str, int] = {}
    enrolment, test, label, lines = list[int](), list[int](), list[int | None](), list[int]()
    for number, line in numbered_lines(text, comments=True):
        parts = _split(line, separator)
        found = parse(parts)
        if found is None or _is_header(parts, number):
            if not lines and _is_header(parts, number):
                continue
            return None, number, line
        enrolment.append(index_of.setdefault(found[0], len(index_of)))
        test.append(index_of.setdefault(found[1], len(index_of)))
        label.append(found[2])
        lines.append(number)
    if not lines:
        return None, -1, ""
    labels = None if label[0] is None else np.array(label, np.int8)
    pairs = (np.array(enrolment, np.int32), np.array(test, np.int32))
    return Trials(list(index_of), *pairs, labels, np.array(lines, np.int32), source), -1, ""


def _split(line: str, separator: str | None) -> list[str]:
    return line.split() if separator is None else [part.strip().strip('"') for part in line.split(separator)]


def _is_header(parts: list[str], number: int) -> bool:
    """Whether a first line names columns: at least two of its words are such names, and no word is an id."""
    words = [part.lower().strip('"') for part in parts]
    return number == 1 and len(words) in (2, 3) and all(word in HEADER for word in words)


def pairs(trials: Trials) -> Iterator[tuple[str, str]]:
    """Ids of enrolment and test of every trial."""
    names = trials.utterances
    return ((names[a], names[b]) for a, b in zip(trials.enrolment.tolist(), trials.test.tolist(), strict=True))
