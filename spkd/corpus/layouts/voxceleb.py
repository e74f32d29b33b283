"""VoxCeleb1 and 2, VoxBlink and VoxBlink2: a folder for each speaker and each video."""

from __future__ import annotations

import re
from pathlib import Path

from spkd.corpus.layouts.base import Layout, Named

SPEAKER = re.compile(r"id\d{5,6}")  # six digits: VoxBlink2


class VoxCeleb(Layout):
    """`.../id10270/5r0dWxy17C8/00001.wav`: the id is the last three parts, as in veri_test2.txt."""

    @classmethod
    def read(cls, path: Path) -> Named | None:
        speaker = path.parts[-3] if len(path.parts) >= 3 else ""
        return ("/".join(path.with_suffix(".wav").parts[-3:]), speaker) if SPEAKER.fullmatch(speaker) else None
