"""Base classes of the formats of trial lists and score files, and the words that they share."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import ClassVar, NamedTuple

from spkd.errors import first_few
from spkd.files.text import finite_number

TARGET = ("1", "target", "tgt", "true", "same", "genuine", "positive", "yes")
NON_TARGET = ("0", "nontarget", "non-target", "non", "imp", "impostor", "imposter", "false", "different", "no")
CERTAIN = ("target", "nontarget", "non-target", "tgt", "imp")  # words that are no values of other columns
LABELS = {**dict.fromkeys(TARGET, 1), **dict.fromkeys(NON_TARGET, 0)}

# Words that name columns in lists whose columns have a fixed order, so that another order is recognised.
NUMBERED = ("utt", "path", "file", "wav", "id", "audio", "utterance")
COLUMNS = {
    **dict.fromkeys(("enrol", "enroll", "enrolment", "enrollment", "modelid", "model"), "enrolment"),
    **dict.fromkeys(("test", "trial", "segmentid", "segment"), "test"),
    **dict.fromkeys(("label", "target", "same", "is_target"), "label"),
    **dict.fromkeys(("score", "llr"), "score"),
    **{f"{word}{n}": side for word in NUMBERED for n, side in ((1, "enrolment"), (2, "test"))},
}


class Row(NamedTuple):
    """Content of one line.

    Attributes:
        label: 1 target, 0 non-target; None in a list without labels.
        score: the score; None in a trial list.
    """

    enrolment: str
    test: str
    label: int | None = None
    score: float | None = None


class Format:
    """Base class of the formats of trial lists and score files. An instance reads one file.

    Attributes:
        shape: form of a line, for errors and docs.
        header: whether line 1 names the columns.
    """

    shape: ClassVar[str]
    header: ClassVar[bool] = False

    def __init__(self, first: Sequence[str]) -> None:
        """
        Args:
            first: fields of line 1.
        """

    @classmethod
    def recognises(cls, first: Sequence[str]) -> bool:
        """Whether a file with this line 1 may be of the format."""
        return True

    def is_header(self, first: Sequence[str]) -> bool:
        """Whether line 1 names columns in a format whose files need not have such a line."""
        return False

    def follow(self, columns: Sequence[str]) -> bool:
        """Take the fields of a line from the columns that line 1 names.

        Args:
            columns: content of each column, as in COLUMNS.
        Returns:
            Whether the format has these columns, in some order.
        """
        return False

    def parse(self, fields: Sequence[str]) -> Row | None:
        """Row of a line; None where the line is not of this format."""
        raise NotImplementedError

    def finish(self, names: list[str]) -> tuple[list[str], list[str]]:
        """Final names of all sides, and notes on the file. Called after the last line.

        Args:
            names: names as `parse` gave them.
        """
        return names, []


def label_of(word: str) -> int | None:
    """Label of a word: 1, 0, or None where it is not a label."""
    return LABELS.get(word.lower())


class Columns(Format):
    """Base class of formats with a fixed number of fields, in which sides, label and score have fixed places.

    Attributes:
        width: number of fields.
        sides: place of the enrolment side; the test side follows.
        label: place of the label; None without labels.
        score: place of the score; None without scores.
        numbers: places of further numbers, which are not used.
        rival: name of the format that its files fit as well where their names are numbers; "" without one.
    """

    width: ClassVar[int]
    sides: ClassVar[int] = 0
    label: ClassVar[int | None] = None
    score: ClassVar[int | None] = None
    numbers: ClassVar[Sequence[int]] = ()
    rival: ClassVar[str] = ""

    def __init__(self, first: Sequence[str]) -> None:
        super().__init__(first)
        self._sides, self._label, self._score = (self.sides, self.sides + 1), self.label, self.score

    def follow(self, columns: Sequence[str]) -> bool:
        own = ["enrolment", "test"] + ["label"] * (self.label is not None) + ["score"] * (self.score is not None)
        if sorted(columns) != sorted(own):
            return False
        self._sides = columns.index("enrolment"), columns.index("test")
        self._label = None if self.label is None else columns.index("label")
        self._score = None if self.score is None else columns.index("score")
        return True

    def parse(self, fields: Sequence[str]) -> Row | None:
        if len(fields) != self.width:
            return None
        if self.numbers and any(finite_number(fields[place]) is None for place in self.numbers):
            return None
        label = None if self._label is None else label_of(fields[self._label])
        score = None if self._score is None else finite_number(fields[self._score])
        if (self._label is not None and label is None) or (self._score is not None and score is None):
            return None
        enrolment, test = self._sides
        return Row(fields[enrolment], fields[test], label, score)

    def finish(self, names: list[str]) -> tuple[list[str], list[str]]:
        return names, [f"further columns of numbers, not used: {len(self.numbers)}"] * bool(self.numbers)


BETWEEN = "\0"  # separates a segment and its side, until it is known whether the side is needed


class NamedColumns(Format):
    """Base class of tables whose line 1 names the columns, in any order. Names are in lower case.

    Attributes:
        side_names: possible names of the column of the channel.
        labels: label of each word.
    """

    header = True
    enrolment_names: ClassVar[Collection[str]]
    test_names: ClassVar[Collection[str]]
    side_names: ClassVar[Collection[str]] = ()
    label_names: ClassVar[Collection[str]] = ()
    score_names: ClassVar[Collection[str]] = ()
    labels: ClassVar[dict[str, int]] = LABELS

    def __init__(self, first: Sequence[str]) -> None:
        self._names, self._seen = [name.lower() for name in first], False
        self._enrolment, self._test, self._side, self._label, self._score = (
            next((place for place, name in enumerate(self._names) if name in known), None)
            for known in (
                self.enrolment_names,
                self.test_names,
                self.side_names,
                self.label_names,
                self.score_names,
            )
        )

    @classmethod
    def recognises(cls, first: Sequence[str]) -> bool:
        table = cls(first)
        return (
            table._enrolment is not None
            and table._test is not None
            and (table._score is not None or not cls.score_names)
        )

    def parse(self, fields: Sequence[str]) -> Row | None:
        assert self._enrolment is not None
        assert self._test is not None
        if len(fields) != len(self._names):
            return None
        if self._label is None and self.label_names and not self._seen:
            # A column with labels under another name must not be ignored.
            self._label = next((place for place, field in enumerate(fields) if field.lower() in CERTAIN), None)
        self._seen = True
        label = None if self._label is None else self.labels.get(fields[self._label].lower())
        score = None if self._score is None else finite_number(fields[self._score])
        if (self._label is not None and label is None) or (self._score is not None and score is None):
            return None
        side = "" if self._side is None else f"{BETWEEN}{fields[self._side].lower()}"
        return Row(fields[self._enrolment], fields[self._test] + side, label, score)

    def finish(self, names: list[str]) -> tuple[list[str], list[str]]:
        names, notes = with_sides(names)
        places = (self._enrolment, self._test, self._side, self._label, self._score)
        unused = [name for place, name in enumerate(self._names) if place not in places]
        if unused:
            notes.append(f"columns not used: {first_few(unused, most=8)}")
        return names, notes


def with_sides(names: list[str]) -> tuple[list[str], list[str]]:
    """Names of segments, with their sides where a segment has two, and notes on that.

    Args:
        names: names of both sides of trials; those of test segments may end in BETWEEN and the channel.
    """
    segments = [name.partition(BETWEEN) for name in names]
    sided = [(segment, side) for segment, between, side in segments if between]
    if not sided:
        return names, []
    if len({segment for segment, _ in sided}) < len(sided):
        return [f"{segment}:{side}" if between else segment for segment, between, side in segments], [
            "segments are tested on both sides: their names are `segment:side`"
        ]
    not_a = sum(side != "a" for _, side in sided)
    notes = [f"the side is not used, as each segment has one; segments whose side is not `a`: {not_a:,}"] * bool(not_a)
    return [segment for segment, _, _ in segments], notes
