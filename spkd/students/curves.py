"""Training curves of a student's folder, from its log.jsonl."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import UnionType

LOG = "log.jsonl"
MOST_POINTS = 400  # points of a curve

Points = tuple[tuple[int, float], ...]  # step and value


def read_curves(folder: str | Path) -> dict[str, Points]:
    """Values by training step, at most `MOST_POINTS` for each name.

    Lines that a kill left incomplete are skipped, and so are values that are not finite.
    """
    path = Path(folder) / LOG
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not isinstance(entry, dict) or not _is_number(step := entry.pop("step", None), int):
            continue
        for name, value in entry.items():
            if _is_number(value, int | float):
                curves.setdefault(name, []).append((step, float(value)))
    return {name: tuple(points[:: max(len(points) // MOST_POINTS, 1)]) for name, points in curves.items()}


def _is_number(value: object, kind: type | UnionType) -> bool:
    """Whether a value is a finite number of a type; an integer must have at most 64 bits."""
    if not isinstance(value, kind) or isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 2**63 if isinstance(value, int) else math.isfinite(value)
