"""Trial lists and score files in the formats of spkd/eval/trial_formats and score_formats.

Files are read line by line, so that their text is never in memory as a whole. They may be gzipped, have a byte-order
mark, any line ends, comments and a header line, and labels in any case; fields are separated by spaces, tabs, commas or
semicolons. `-` is standard input.
"""

from __future__ import annotations

import shlex
import shutil
import sys
import tempfile
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from spkd.corpus.manifests.reader import Source
from spkd.errors import SpkdError, UsageError
from spkd.eval.formats import COLUMNS, Format
from spkd.files import digest
from spkd.files.text import counted, numbered_lines
from spkd.registry import SCORE_FORMATS, TRIAL_FORMATS

SEPARATORS = (None, ",", "\t", ";")  # None: any white space
STDIN = "-"


@dataclass(frozen=True)
class Trials:
    """N trials in order.

    Attributes:
        names: names of all sides (an utterance, or a model that an enrolment map defines), in order of appearance.
        enrolment: (N,) index of the enrolment side in `names`.
        test: (N,) index of the test side in `names`.
        label: (N,) 1 target, 0 non-target; None for an unlabelled list.
        line: (N,) line of the file.
    """

    names: list[str]
    enrolment: np.ndarray
    test: np.ndarray
    label: np.ndarray | None
    line: np.ndarray
    source: str
    sha256: str = ""
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.enrolment)

    @property
    def keys(self) -> np.ndarray:
        """(N,): one number for each pair of an enrolment and a test side."""
        return self.enrolment.astype(np.int64) * len(self.names) + self.test

    def keys_of(self, other: Trials) -> np.ndarray:
        """(M,): `keys` of this list for the pairs of another one; -1 for those with a name that is not here."""
        index_of = {name: index for index, name in enumerate(self.names)}
        place = np.array([index_of.get(name, -1) for name in other.names], np.int64)
        left, right = place[other.enrolment], place[other.test]
        return np.where((left < 0) | (right < 0), -1, left * len(self.names) + right)

    @property
    def has_both_kinds(self) -> bool:
        """Whether there are target and non-target trials."""
        return self.label is not None and 0 < int(self.label.sum()) < len(self.label)


def read(path: str | Path, form: str = "auto", known: Collection[str] = ()) -> Trials:
    """Read a trial list.

    Args:
        path: a file, or `-` for standard input.
        form: a name in TRIAL_FORMATS, or "auto": the first format that every line fits.
        known: ids of existing utterances, which distinguish a first trial from a header with the same words.
    Raises:
        UsageError: no such file or format, or two formats fit the file, whose names are numbers.
        SpkdError: a malformed line (the message names file and line), or no trials.
    """
    formats = TRIAL_FORMATS if form == "auto" else {form: TRIAL_FORMATS[form]}
    return _read(path, formats, "trial list", known, lambda: known)[0]


def read_scores(path: str | Path, names: Callable[[], Collection[str]] = tuple) -> tuple[Trials, np.ndarray]:
    """Read the trials of a score file, labelled where it has labels, and their scores (N,) in float64.

    Args:
        path: a file, or `-` for standard input.
        names: function that gives the names of utterances, called where two formats fit the file.
    Raises:
        UsageError: no such file, or names are needed to tell which of two formats it is in.
        SpkdError: a malformed line (the message names file and line), or no scores.
    """
    return _read(path, SCORE_FORMATS, "score file", (), names)


Formats = Mapping[str, type[Format]]


def _read(
    path: str | Path,
    formats: Formats,
    kind: str,
    known: Collection[str],
    names: Callable[[], Collection[str]],
) -> tuple[Trials, np.ndarray]:
    if str(path) == STDIN:
        with tempfile.NamedTemporaryFile() as spool:  # formats are tried one after the other
            shutil.copyfileobj(sys.stdin.buffer, spool)
            spool.flush()
            return _first_that_fits(Path(spool.name), "standard input", formats, kind, known, names)
    check_exists(path, kind)
    return _first_that_fits(Path(path), str(path), formats, kind, known, names)


def check_exists(path: str | Path, kind: str) -> None:
    """Check that a list, or standard input, is there. Raises UsageError where it is not."""
    if str(path) != STDIN and not Path(path).exists():
        raise UsageError(f"no {kind} {path}")


def _first_that_fits(
    path: Path,
    source: str,
    formats: Formats,
    kind: str,
    known: Collection[str],
    names: Callable[[], Collection[str]],
) -> tuple[Trials, np.ndarray]:
    lines = numbered_lines(path, source)
    (first_number, first), (_, second) = next(lines, (0, "")), next(lines, (0, ""))
    if not first_number:
        raise SpkdError(f"{source}: holds no {'trials' if kind == 'trial list' else 'scores'}")
    furthest, shape, line = -1, "", ""
    for separator, form in _ways(first, formats):
        parsed = _parsed(path, source, separator, form, known)
        if not isinstance(parsed, _Malformed):
            name = getattr(form, "rival", "")
            other = _parsed(path, source, separator, formats[name], known) if name in formats else None
            if other is None or isinstance(other, _Malformed):
                return parsed
            remedy = "name a trial list, or the manifest of the audio (manifest=FILE)"
            if kind == "trial list":
                own = next(key for key in formats if formats[key] is form)
                remedy = f"name the right one by format={own} or format={name}"
            return _which_fits(parsed, other, names(), (form.shape, formats[name].shape), remedy)
        # The format that got furthest is the one the file was meant to be in.
        if parsed.number > furthest:
            furthest, shape, line = parsed.number, form.shape, parsed.line
    if furthest <= first_number:  # no format fits even the first line
        furthest, line = first_number, first
        shapes = [f"`{form.shape}`" for form in formats.values()]
        expected = f"{', '.join(shapes[:-1])} or {shapes[-1]}" if len(shapes) > 1 else shapes[0]
        rows = ((form, _split(second, separator)) for separator, form in _ways(second, formats))
        if any(_columns(_split(first, separator)) for separator in SEPARATORS):
            expected += f"; its words name columns that no {kind} has together"
        elif any(form(fields).parse(fields) for form, fields in rows if not form.header):
            expected += "; it looks like a header that is not known, leave it out"
    else:
        expected = f"`{shape}`"
    if (manifest := Source(path)).table[1] or manifest.first_object:
        raise UsageError(f"{source}: a manifest, not a {kind}; it goes with one as manifest={shlex.quote(source)}")
    raise SpkdError(f"{source}:{furthest}: {line[:200]!r} is not {expected}")


def _which_fits(
    first: tuple[Trials, np.ndarray],
    second: tuple[Trials, np.ndarray],
    known: Collection[str],
    shapes: tuple[str, str],
    remedy: str,
) -> tuple[Trials, np.ndarray]:
    """Choose between two ways to read a file of numbers: by known names, or since names have no decimals.

    Args:
        shapes: forms of a line of both ways, for the error.
        remedy: what to do, for the error.
    Raises:
        UsageError: neither tells the ways apart.
    """
    for is_name in (known.__contains__, str.isdecimal):
        shares = [sum(map(is_name, trials.names)) / len(trials.names) for trials, _ in (first, second)]
        if shares[0] != shares[1]:
            return first if shares[0] > shares[1] else second
    if digest_of_pairs(first[0]) == digest_of_pairs(second[0]):
        return first
    raise UsageError(f"{first[0].source}: may be `{shapes[0]}` or `{shapes[1]}`, since its names are numbers; {remedy}")


def _ways(first: str, formats: Formats) -> list[tuple[str | None, type[Format]]]:
    """Separators and formats to try for a file with this first line, in order.

    Where tabs separate fewer fields than white space does, names may have spaces. Then tabs are tried first, except for
    lists without labels, since a single tab may also stand among spaces.
    """
    ways = [(separator, name) for separator in SEPARATORS for name in formats]
    if "\t" in first and len(_split(first, "\t")) < len(first.split()):
        ways.sort(key=lambda way: way[0] != "\t" or way[1] == "plain")
    return [
        (separator, formats[name]) for separator, name in ways if formats[name].recognises(_split(first, separator))
    ]


@dataclass(frozen=True)
class _Malformed:
    """First line that does not fit a format; number 0 where a file has only a header."""

    number: int
    line: str


def _parsed(
    path: Path,
    source: str,
    separator: str | None,
    kind: type[Format],
    known: Collection[str],
    first_is_trial: bool = False,
) -> tuple[Trials, np.ndarray] | _Malformed:
    """Trials and scores of a file, or the first line that does not fit this format.

    Args:
        separator: separator of the fields; None: white space.
        known: ids of existing utterances.
        first_is_trial: whether the first line is taken as a trial even if its words could name columns.
    """
    # Rows are collected in arrays of numbers, so that no line stays in memory as text.
    form, header = None, None  # header: the trial that the first line would be, its number and its text
    fits = True  # whether the format has the columns that the header names
    index_of: dict[str, int] = {}
    enrolment, test, label, lines, scores = array("i"), array("i"), array("b"), array("i"), array("d")
    for number, line in numbered_lines(path, source):
        fields = _split(line, separator)
        if form is None:
            form = kind(fields)
            if form.header:
                continue
            columns = _columns(fields)
            if not first_is_trial and (columns or form.is_header(fields)):
                fits = form.follow(columns) if columns else True
                header = (form.parse(fields), number, line)
                continue
        row = form.parse(fields)
        if row is None:
            return _Malformed(number, line) if fits or header is None else _Malformed(*header[1:])
        enrolment.append(index_of.setdefault(row.enrolment, len(index_of)))
        test.append(index_of.setdefault(row.test, len(index_of)))
        lines.append(number)
        if row.label is not None:
            label.append(row.label)
        if row.score is not None:
            scores.append(row.score)
    # A first line whose words could name columns is a trial where its utterances are known.
    notes = []
    if header is not None:
        trial, number, line = header
        names = () if trial is None else (trial.enrolment, trial.test)
        if names and (not lines or any(name in index_of or _is_known(name, known) for name in names)):
            return _parsed(path, source, separator, kind, known, first_is_trial=True)
        if not fits:
            return _Malformed(*header[1:])
        if names:
            notes.append(f"line {number}, {line[:100]!r}, is taken for a header")
    if form is None or not lines:
        return _Malformed(0, "")
    names_of_sides, more = form.finish(list(index_of))
    left, right, places = (np.frombuffer(column, np.int32) for column in (enrolment, test, lines))
    labels = np.frombuffer(label, np.int8) if label else None
    notes += more
    trials = Trials(names_of_sides, left, right, labels, places, source, digest.of_file(path), tuple(notes))
    return trials, np.frombuffer(scores, np.float64) if scores else np.empty(0)


def _split(line: str, separator: str | None) -> list[str]:
    return line.split() if separator is None else [field.strip().strip('"') for field in line.split(separator)]


def _columns(fields: Sequence[str]) -> list[str]:
    """Content of each column, by the words of a first line; [] where a word is no usual name of a column."""
    columns = [COLUMNS.get(field.lower().strip('"'), "") for field in fields]
    return columns if 2 <= len(fields) <= 4 and all(columns) else []


def _is_known(name: str, known: Collection[str]) -> bool:
    """Whether an utterance has this name as its id, or as its file name with or without the suffix."""
    return name in known or any(
        name in (PurePosixPath(known_id).name, PurePosixPath(known_id).stem) for known_id in known
    )


def notes_on(trials: Trials, of_models: bool = False) -> tuple[str, ...]:
    """Notes on a list: assumptions when it was read, and trials that it should not have.

    These are trials of an utterance with itself, repeated trials, and pairs that are both target and non-target trials.
    The order of the two utterances of a pair does not matter.

    Args:
        of_models: whether the enrolment side names models, so that the same name on the test side is something else.
    """
    notes = list(trials.notes)

    def note(count: int, what: str, places: np.ndarray) -> None:
        if count:
            notes.append(f"{what}: {count:,} (first: line {int(trials.line[places].min())})")

    keys = trials.keys
    if not of_models:
        same = np.flatnonzero(trials.enrolment == trials.test)
        note(len(same), "trials of an utterance with itself", same)
        low, high = (take(trials.enrolment, trials.test) for take in (np.minimum, np.maximum))
        keys = low.astype(np.int64) * len(trials.names) + high
    order = np.argsort(keys, kind="stable")
    # Places, in this order, of trials that repeat the previous one.
    again = np.flatnonzero(np.diff(keys[order]) == 0) + 1
    note(len(again), "trials that repeat a pair", order[again])
    if trials.label is not None and len(again):
        pairs_there = np.unique(keys[order[again]])
        repeated = np.flatnonzero(np.isin(keys, pairs_there))
        pair = np.searchsorted(pairs_there, keys[repeated])
        targets = np.bincount(pair, trials.label[repeated], len(pairs_there))
        both = (targets > 0) & (targets < np.bincount(pair, minlength=len(pairs_there)))
        note(int(both.sum()), "pairs that are target and non-target trials", repeated[both[pair]])
    return tuple(f"{trials.source}: {text}" for text in notes)


def trials_of_enrolled(trials: Trials, members: Mapping[str, Sequence[str]]) -> np.ndarray:
    """Places of the trials whose test side is one of the utterances that define their model."""
    index_of = {name: index for index, name in enumerate(trials.names)}
    pairs_of = (
        index_of[model] * len(trials.names) + index_of[name]
        for model in trials.names
        for name in members.get(model, ())
        if name in index_of
    )
    return np.flatnonzero(np.isin(trials.keys, np.fromiter(pairs_of, np.int64)))


def digest_of_pairs(trials: Trials) -> str:
    """Digest of the pairs of a list and of their labels, in any order of the trials and of their sides."""
    labels = [""] * len(trials) if trials.label is None else map(str, trials.label.tolist())
    lines = ("\t".join((*sorted(pair), label)) for pair, label in zip(pairs(trials), labels, strict=True))
    return digest.of_bytes("\n".join(sorted(lines)).encode(errors="surrogatepass"))


def as_written(names: Iterable[str]) -> tuple[list[str], str]:
    """Names as written in a file that `read_scores` reads, and the separator of its fields.

    The separator is a space, or a tab where a name has a space or is quoted since it would begin a comment.
    """
    names = list(names)
    if all(len(name.split()) == 1 and not name.startswith("#") for name in names):
        return names, " "
    return [f'"{name}"' if name.startswith("#") else name for name in names], "\t"


def pairs(trials: Trials) -> Iterator[tuple[str, str]]:
    """Names of the enrolment and the test side of every trial."""
    names = trials.names
    return ((names[a], names[b]) for a, b in zip(trials.enrolment.tolist(), trials.test.tolist(), strict=True))


def without_trial(trials: Trials, scored: Trials) -> int:
    """Number of rows of a score file that belong to no trial of a list."""
    return 0 if trials is scored else int((~np.isin(trials.keys_of(scored), trials.keys)).sum())


def labelled_otherwise(trials: Trials, scored: Trials) -> np.ndarray:
    """Places of the rows of a score file whose label no trial of the same pair has in a list."""
    if trials is scored or trials.label is None or scored.label is None:
        return np.empty(0, np.int64)
    keys = trials.keys_of(scored)
    here, there = 2 * trials.keys + trials.label, 2 * keys + scored.label
    return np.flatnonzero(np.isin(keys, trials.keys) & ~np.isin(there, here))


def in_order_of(trials: Trials, scored: Trials, scores: np.ndarray) -> np.ndarray:
    """Scores (N,) of a score file in the order of a trial list.

    Raises:
        SpkdError: a trial has no score, or several; the message names it.
    """
    same = trials.names == scored.names and len(trials) == len(scored)
    if same and np.array_equal(trials.enrolment, scored.enrolment) and np.array_equal(trials.test, scored.test):
        return scores
    keys, wanted = trials.keys_of(scored), trials.keys
    order = np.argsort(keys, kind="stable")
    order = order[np.searchsorted(keys[order], 0) :]  # without pairs that are not in the list
    keys, ordered = keys[order], scores[order]
    places = np.minimum(np.searchsorted(keys, wanted), max(len(keys) - 1, 0))
    missing = np.ones(len(trials), bool) if not len(keys) else keys[places] != wanted
    if missing.any():
        first = int(np.argmax(missing))
        pair = f"{trials.names[trials.enrolment[first]]} {trials.names[trials.test[first]]}"
        raise SpkdError(
            f"{scored.source}: no score of {pair!r} ({trials.source}:{trials.line[first]}), one of "
            f"{counted(int(missing.sum()), 'trial')} without"
        )
    twice = keys[1:] == keys[:-1]
    if (twice & (ordered[1:] != ordered[:-1])).any():
        line = scored.line[order][1:][twice & (ordered[1:] != ordered[:-1])][0]
        raise SpkdError(f"{scored.source}:{line}: a trial that has another score before")
    return ordered[places]
