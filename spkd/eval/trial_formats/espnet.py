"""ESPnet's trial_label: both sides joined by an asterisk, then the label."""

from collections.abc import Sequence

from spkd.eval.formats import Format, Row, label_of


class ESPnet(Format):
    shape = "enrolment*test 1"

    def parse(self, fields: Sequence[str]) -> Row | None:
        if len(fields) != 2 or fields[0].count("*") != 1 or (label := label_of(fields[1])) is None:
            return None
        enrolment, _, test = fields[0].partition("*")
        return Row(enrolment, test, label) if enrolment and test else None
