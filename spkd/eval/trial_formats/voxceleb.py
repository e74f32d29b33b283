"""Lists of VoxCeleb and VoxSRC, with the label first."""

from spkd.eval.formats import Columns


class VoxCeleb(Columns):
    shape = "1 enrolment test"
    width, sides, label, rival = 3, 1, 0, "kaldi"
