"""Keys of NIST SRE08, SRE10 and SRE12: model, segment, channel, label, and flags of conditions."""

from collections.abc import Sequence

from spkd.eval.formats import Format, Row, label_of

SIDES = ("a", "b", "x")
FLAGS = ("y", "n")


class NISTKey(Format):
    """Keys of NIST SRE08, SRE10 and SRE12. The test side is named `segment:a`, as in NIST's indexes."""

    shape = "model,segment,a,target[,Y,N,...]"

    def __init__(self, first: Sequence[str]) -> None:
        super().__init__(first)
        self._flags = 0

    def is_header(self, first: Sequence[str]) -> bool:
        return len(first) > 3 and "model" in first[0].lower() and label_of(first[3]) is None

    def parse(self, fields: Sequence[str]) -> Row | None:
        if len(fields) < 4 or fields[2].lower() not in SIDES or (label := label_of(fields[3])) is None:
            return None
        if any(flag.lower() not in FLAGS for flag in fields[4:]):
            return None
        self._flags = max(self._flags, len(fields) - 4)
        return Row(fields[0], f"{fields[1]}:{fields[2].lower()}", label)

    def finish(self, names: list[str]) -> tuple[list[str], list[str]]:
        flags = f"columns of Y and N, not used, so that trials of every condition are scored: {self._flags}"
        return names, [flags] * bool(self._flags)
