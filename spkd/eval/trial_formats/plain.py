"""Lists without labels."""

from spkd.eval.formats import Columns


class Plain(Columns):
    """Trial list without labels."""

    shape = "enrolment test"
    width = 2
