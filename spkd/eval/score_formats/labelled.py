"""Lines of a VoxCeleb list, with a score at the end."""

from spkd.eval.formats import Columns


class LabelledScores(Columns):
    shape = "1 enrolment test score"
    width, sides, label, score = 4, 1, 0, 3
