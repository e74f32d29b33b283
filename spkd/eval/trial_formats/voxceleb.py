"""Lists of VoxCeleb and VoxSRC, with the label first."""

from spkd.eval.formats import Columns


class VoxCeleb(Columns):
    """Trial list of VoxCeleb."""

    shape = "1 enrolment test"
    width, sides, label = 3, 1, 0
