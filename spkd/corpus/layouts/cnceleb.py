"""CN-Celeb1 and 2."""

from __future__ import annotations

import re
from pathlib import Path

from spkd.corpus.layouts.base import Layout, Named


class CNCeleb(Layout):
    """`data/id00000/singing-01-001.flac`, `eval/enroll/id00800-enroll.flac`, `eval/test/id00800-singing-01-001.flac`.

    Ids as in trials.lst: `id00800-enroll`, `test/id00800-singing-01-001.wav`; training: `id00000/singing-01-001`.
    """

    @classmethod
    def read(cls, path: Path) -> Named | None:
        folder = path.parent.name
        match = re.match(r"(id\d{5})-", path.name)
        if folder == "enroll" and match:
            return path.stem, match[1]
        if folder == "test" and match:
            return f"test/{path.stem}.wav", match[1]
        return (f"{folder}/{path.stem}", folder) if re.fullmatch(r"id\d{5}", folder) else None
