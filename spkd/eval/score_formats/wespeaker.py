"""Scores of WeSpeaker: as `score.py`, `score_norm.py` and `score_calibration.py` write them."""

from spkd.eval.formats import Columns


class WeSpeakerScores(Columns):
    """Of `score.py`, of the calibration, and of spkd."""

    shape = "enrolment test score target"
    width, score, label = 4, 2, 3


class WeSpeakerNorm(Columns):
    """Of `score_norm.py`: magnitudes and cohort means of both sides follow."""

    shape = "enrolment test score target magnitude magnitude mean mean"
    width, score, label, numbers = 8, 2, 3, range(4, 8)


class WeSpeakerFactors(Columns):
    """Of `gather_calibration_factors`: twelve numbers for the calibration follow."""

    shape = "enrolment test target score and 12 numbers"
    width, score, label, numbers = 16, 3, 2, range(4, 16)
