"""System output of NIST SRE, whose line 1 names the columns."""

from spkd.eval.trial_formats.nist import NIST


class NISTScores(NIST):
    shape = "modelid segmentid [side] LLR, as line 1 names the columns"
    score_names = ("llr", "score")
