"""No teacher: a cache of views and fbank alone, for students that learn from labels only."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from spkd.extract.teacher import Teacher


class NoTeacher(Teacher):
    """Says nothing; extract then stores the fbank of every view."""

    family = "none"

    def __init__(self) -> None:
        self.targets = {}

    def card(self) -> dict[str, Any]:
        return {
            "family": self.family,
            "weights_sha256": "",
            "licence": "none",
            "source": "no teacher",
            "preprocessing": "80-mel Kaldi fbank, 25/10 ms",
        }

    def run(self, waves: Tensor, names: list[str]) -> dict[str, Tensor]:
        return {}
