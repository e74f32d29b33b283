"""Trial lists and score files in the field's formats, read line by line: memory does not grow with the text.

A trial list has `1 a b` (VoxCeleb), `a b target` (Kaldi; also `a b 1`) or `a b` (unlabelled); a score file has
`a b score` (Kaldi), `a b score target` (WeSpeaker), `a b 1 score` (SpeechBrain) or `1 a b score`. Tables of NIST are
both: `modelid segmentid side`, with a key or scores, their columns named by the first line. All are read however tools
write them: gzipped, with a byte-order mark, any line ends, separated by spaces, tabs, commas or semicolons, with
comments and a header line, labels in any case. `-` is standard input.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spkd.errors import SpkdError, UsageError, did_you_mean
from spkd.files import digest
from spkd.files.text import finite_number, stream_lines

TARGET = ("1", "target", "tgt", "true", "same", "genuine", "positive", "yes")
NON_TARGET = ("0", "nontarget", "non-target", "non", "imp", "impostor", "imposter", "false", "different", "no")
LABELS = {**dict.fromkeys(TARGET, 1), **dict.fromkeys(NON_TARGET, 0)}
COLUMNS = (
    *("label", "target", "enrol", "enroll", "enrolment", "enrollment", "test", "trial", "same", "is_target"),
    *("modelid", "model", "segmentid", "segment", "score", "llr"),
)
NUMBERED = ("utt", "path", "file", "wav", "id", "audio", "utterance")
HEADER = {*COLUMNS, *(f"{word}{n}" for word in NUMBERED for n in (1, 2))}
SEPARATORS = (None, ",", "\t", ";")  # None: any white space
STDIN = "-"


@dataclass(frozen=True)
class Trials:
    """N trials in order.

    Attributes:
        names: of every side (an utterance, or a model that an enrolment map defines), once, in order of appearance.
        enrolment, test: (N,) their indices.
        label: (N,) 1 target, 0 non-target; None for an unlabelled list.
        line: (N,) of the file.
        source: the file.
        sha256: of the file.
    """

    names: list[str]
    enrolment: np.ndarray
    test: np.ndarray
    label: np.ndarray | None
    line: np.ndarray
    source: str
    sha256: str = ""

    def __len__(self) -> int:
        return len(self.enrolment)

    @property
    def has_both_kinds(self) -> bool:
        """Whether there are target and non-target trials."""
        return self.label is not None and 0 < int(self.label.sum()) < len(self.label)


Row = tuple[str, str, int | None, float | None]  # enrolment, test, label, score


def _label(word: str) -> int | None:
    return LABELS.get(word.lower())


def _voxceleb(parts: list[str]) -> Row | None:
    if len(parts) != 3 or (label := _label(parts[0])) is None:
        return None
    return parts[1], parts[2], label, None


def _kaldi(parts: list[str]) -> Row | None:
    if len(parts) != 3 or (label := _label(parts[2])) is None:
        return None
    return parts[0], parts[1], label, None


def _plain(parts: list[str]) -> Row | None:
    return (parts[0], parts[1], None, None) if len(parts) == 2 else None


def _table(columns: list[str], needs_score: bool) -> Callable[[list[str]], Row | None] | None:
    """The format of a NIST SRE table with these columns, None where they are no such table's: a trial list with or
    without key, or system output."""
    names = [column.lower() for column in columns]
    segment = next((i for i, name in enumerate(names) if name in ("segmentid", "segment")), None)
    label = names.index("targettype") if "targettype" in names else None
    score = names.index("llr") if "llr" in names else None
    if "modelid" not in names or segment is None or (needs_score and score is None):
        return None
    model = names.index("modelid")

    def parse(parts: list[str]) -> Row | None:
        if len(parts) != len(names):
            return None
        known = None if label is None else _label(parts[label])
        value = finite_number(parts[score]) if needs_score and score is not None else None
        if (label is not None and known is None) or (needs_score and value is None):
            return None
        return parts[model], parts[segment], known, value

    return parse


def _scored(label: int | None, score: int, width: int, first: int = 0) -> Callable[[list[str]], Row | None]:
    """A format of `width` columns with a label and a score in these columns, the utterances from column `first` on."""

    def parse(parts: list[str]) -> Row | None:
        if len(parts) != width or (value := finite_number(parts[score])) is None:
            return None
        known = None if label is None else _label(parts[label])
        return None if label is not None and known is None else (parts[first], parts[first + 1], known, value)

    return parse


Formats = dict[str, Callable[[list[str]], Row | None]]
FORMATS: Formats = {"voxceleb": _voxceleb, "kaldi": _kaldi, "plain": _plain}
SCORE_FORMATS: Formats = {
    "speechbrain": _scored(2, 3, 4),
    "wespeaker": _scored(3, 2, 4),
    "labelled": _scored(0, 3, 4, 1),
    "kaldi": _scored(None, 2, 3),
}
SHAPES = {
    "voxceleb": "1 enrolment test",
    "kaldi": "enrolment test target",
    "plain": "enrolment test",
    "nist": "the columns that line 1 names",
}
SCORE_SHAPES = {
    "speechbrain": "enrolment test 1 score",
    "wespeaker": "enrolment test score target",
    "labelled": "1 enrolment test score",
    "kaldi": "enrolment test score",
    "nist": "the columns that line 1 names",
}


def read(path: str | Path, form: str = "auto") -> Trials:
    """Read a trial list.

    Args:
        path: a file, or `-` for standard input.
        form: a name in FORMATS, or "auto": the one format that every line fits (VoxCeleb's where several do).
    Raises:
        UsageError: no such file or format. SpkdError: a malformed line (file and line named), or no trials.
    """
    if form != "auto" and form not in FORMATS:
        raise UsageError(f"format={form}{did_you_mean(form, [*FORMATS, 'auto'])}")
    return _read(path, FORMATS if form == "auto" else {form: FORMATS[form]}, SHAPES, "trial list")[0]


def read_scores(path: str | Path) -> tuple[Trials, np.ndarray]:
    """The trials of a score file, labelled where it has labels, and their scores (N,) in float64.

    Raises:
        UsageError: no such file. SpkdError: a malformed line (file and line named), or no scores.
    """
    trials, scores = _read(path, SCORE_FORMATS, SCORE_SHAPES, "score file")
    return trials, scores


def _read(path: str | Path, formats: Formats, shapes: dict[str, str], kind: str) -> tuple[Trials, np.ndarray]:
    if str(path) == STDIN:
        with tempfile.NamedTemporaryFile() as spool:  # formats are tried one after the other
            shutil.copyfileobj(sys.stdin.buffer, spool)
            spool.flush()
            return _first_that_fits(Path(spool.name), "standard input", formats, shapes, kind)
    if not Path(path).exists():
        raise UsageError(f"no {kind} {path}")
    return _first_that_fits(Path(path), str(path), formats, shapes, kind)


def _first_that_fits(
    path: Path, source: str, formats: Formats, shapes: dict[str, str], kind: str
) -> tuple[Trials, np.ndarray]:
    furthest, problem = -1, ""
    _, first = next(stream_lines(path, source), (0, ""))
    for separator in SEPARATORS:
        table = _table(_split(first, separator), formats is SCORE_FORMATS)
        for name, parse in (formats if table is None else {"nist": table}).items():
            found = _parsed(path, separator, parse, source, 0 if table is None else 1)
            if not isinstance(found, tuple):
                return found.trials, found.scores
            number, line = found
            # The format that got furthest is the one the file was meant to be in.
            if number > furthest:
                furthest, problem = number, f"{source}:{number}: {line[:200]!r} is not `{shapes[name]}`"
    if furthest < 0:
        raise SpkdError(f"{source}: holds no {'trials' if kind == 'trial list' else 'scores'}")
    raise SpkdError(problem)


@dataclass(frozen=True)
class _Found:
    trials: Trials
    scores: np.ndarray


def _parsed(
    path: Path, separator: str | None, parse: Callable[[list[str]], Row | None], source: str, header: int = 0
) -> _Found | tuple[int, str]:
    """The trials after so many lines of header; or the first line that is none of this format (-1 where there is no
    line at all)."""
    index_of: dict[str, int] = {}
    enrolment, test, label, lines, scores = array("i"), array("i"), array("b"), array("i"), array("d")
    for number, line in stream_lines(path, source):
        parts = _split(line, separator)
        if number <= header:
            continue
        row = parse(parts)
        if row is None or _is_header(parts, number):
            if not lines and _is_header(parts, number):
                continue
            return number, line
        enrolment.append(index_of.setdefault(row[0], len(index_of)))
        test.append(index_of.setdefault(row[1], len(index_of)))
        lines.append(number)
        if row[2] is not None:
            label.append(row[2])
        if row[3] is not None:
            scores.append(row[3])
    if not lines:
        return -1, ""
    left, right, places = (np.frombuffer(column, np.int32) for column in (enrolment, test, lines))
    labels = np.frombuffer(label, np.int8) if label else None
    trials = Trials(list(index_of), left, right, labels, places, source, digest.of_file(path))
    return _Found(trials, np.frombuffer(scores, np.float64) if scores else np.empty(0))


def _split(line: str, separator: str | None) -> list[str]:
    return line.split() if separator is None else [part.strip().strip('"') for part in line.split(separator)]


def _is_header(parts: list[str], number: int) -> bool:
    """Whether a first line names columns: at least two of its words are such names, and no word is an id."""
    return number == 1 and len(parts) in (2, 3, 4) and all(part.lower().strip('"') in HEADER for part in parts)


def pairs(trials: Trials) -> Iterator[tuple[str, str]]:
    """Names of enrolment and test of every trial."""
    names = trials.names
    return ((names[a], names[b]) for a, b in zip(trials.enrolment.tolist(), trials.test.tolist(), strict=True))


def in_order_of(trials: Trials, scored: Trials, scores: np.ndarray) -> np.ndarray:
    """The scores of a score file in the order of a trial list: (N,).

    Raises:
        SpkdError: a trial has no score (it is named), or several.
    """
    same = trials.names == scored.names and len(trials) == len(scored)
    if same and np.array_equal(trials.enrolment, scored.enrolment) and np.array_equal(trials.test, scored.test):
        return scores
    index_of = {name: index for index, name in enumerate(trials.names)}
    place = np.array([index_of.get(name, -1) for name in scored.names], np.int64)
    known = (place[scored.enrolment] >= 0) & (place[scored.test] >= 0)
    keys = place[scored.enrolment[known]] * len(trials.names) + place[scored.test[known]]
    order = np.argsort(keys, kind="stable")
    keys, ordered = keys[order], scores[known][order]
    wanted = trials.enrolment.astype(np.int64) * len(trials.names) + trials.test
    found = np.minimum(np.searchsorted(keys, wanted), max(len(keys) - 1, 0))
    missing = np.ones(len(trials), bool) if not len(keys) else keys[found] != wanted
    if missing.any():
        first = int(np.argmax(missing))
        pair = f"{trials.names[trials.enrolment[first]]} {trials.names[trials.test[first]]}"
        raise SpkdError(
            f"{scored.source}: no score of {pair!r} ({trials.source}:{trials.line[first]}), one of "
            f"{int(missing.sum()):,} trials without"
        )
    twice = keys[1:] == keys[:-1]
    if (twice & (ordered[1:] != ordered[:-1])).any():
        line = scored.line[known][order][1:][twice & (ordered[1:] != ordered[:-1])][0]
        raise SpkdError(f"{scored.source}:{line}: a trial that has another score before")
    return ordered[found]
