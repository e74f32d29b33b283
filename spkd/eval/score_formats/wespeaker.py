"""Scores of WeSpeaker, as `score.py`, `score_norm.py` and `score_calibration.py` write them."""

from spkd.eval.formats import Columns


class WeSpeakerScores(Columns):
    """Scores of WeSpeaker's `score.py` and of its calibration; spkd writes them too."""

    shape = "enrolment test score target"
    width, score, label = 4, 2, 3


class WeSpeakerNorm(Columns):
    """Scores of `score_norm.py`, followed by magnitudes and cohort means of both sides."""

    shape = "enrolment test score target magnitude magnitude mean mean"
    width, score, label, numbers = 8, 2, 3, range(4, 8)


class WeSpeakerFactors(Columns):
    """Scores of `gather_calibration_factors`, followed by twelve numbers for the calibration."""

    shape = "enrolment test target score and 12 numbers"
    width, score, label, numbers = 16, 3, 2, range(4, 16)
