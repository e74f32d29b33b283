"""Scores of SpeechBrain and 3D-Speaker."""

from spkd.eval.formats import Columns


class SpeechBrainScores(Columns):
    """Score file of SpeechBrain and 3D-Speaker."""

    shape = "enrolment test 1 score"
    width, label, score = 4, 2, 3
