"""Kaldi's lists, and those of SITW and CN-Celeb: the label last."""

from spkd.eval.formats import Columns


class Kaldi(Columns):
    shape = "enrolment test target"
    width, label = 3, 2
