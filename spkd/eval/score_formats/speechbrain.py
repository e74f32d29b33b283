"""Scores of SpeechBrain and 3D-Speaker."""

from spkd.eval.formats import Columns


class SpeechBrainScores(Columns):
    shape = "enrolment test 1 score"
    width, label, score, rival = 4, 2, 3, "labelled"
