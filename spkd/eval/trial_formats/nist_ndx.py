"""Indexes of trials of NIST SRE08 and SRE10: model, gender, and the segment with its side."""

from collections.abc import Sequence

from spkd.eval.formats import Format, Row
from spkd.eval.trial_formats.nist_key import SIDES

GENDERS = ("m", "f")


class NISTIndex(Format):
    shape = "model m segment:a"

    def parse(self, fields: Sequence[str]) -> Row | None:
        if len(fields) != 3 or fields[1].lower() not in GENDERS:
            return None
        segment, colon, side = fields[2].rpartition(":")
        return Row(fields[0], f"{segment}:{side.lower()}") if colon and side.lower() in SIDES else None
