"""Lists without labels."""

from spkd.eval.formats import Columns


class Plain(Columns):
    shape = "enrolment test"
    width = 2
