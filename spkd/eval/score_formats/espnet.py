"""Scores of ESPnet: both sides joined by an asterisk, the score, then the label."""

from collections.abc import Sequence

from spkd.eval.formats import Format, Row, label_of
from spkd.files.text import finite_number


class ESPnetScores(Format):
    shape = "enrolment*test score 1"

    def parse(self, fields: Sequence[str]) -> Row | None:
        if len(fields) != 3 or fields[0].count("*") != 1:
            return None
        enrolment, _, test = fields[0].partition("*")
        score, label = finite_number(fields[1]), label_of(fields[2])
        return (
            None if not enrolment or not test or score is None or label is None else Row(enrolment, test, label, score)
        )
