"""Lists of Kaldi, SITW and CN-Celeb, with the label last."""

from spkd.eval.formats import Columns


class Kaldi(Columns):
    shape = "enrolment test target"
    width, label = 3, 2
