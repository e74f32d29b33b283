"""Submissions to VoxSRC, with the score first."""

from spkd.eval.formats import Columns


class VoxSRCScores(Columns):
    shape = "score enrolment test"
    width, sides, score = 3, 1, 0
