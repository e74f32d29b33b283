"""Scores of Kaldi, and of spkd without labels."""

from spkd.eval.formats import Columns


class KaldiScores(Columns):
    shape = "enrolment test score"
    width, score, rival = 3, 2, "voxsrc"
