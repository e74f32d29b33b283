"""How a student was trained, for reports: from model.json and log.jsonl of its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from spkd.files import read_json

MOST_POINTS = 200  # of a curve


def training_of(folder: str) -> dict[str, Any] | None:
    """Losses, steps, caches and curves of a student; None for other models.

    Returns:
        `settings`, `steps` and `last_terms` as in model.json, and `curves`: name -> [[step, value], ...].
    """
    path = Path(folder) / "model.json"
    if not path.is_file():
        return None
    tree = read_json(path)
    training = tree.get("training") if isinstance(tree, dict) else None
    kept = (
        {k: training[k] for k in ("settings", "steps", "last_terms") if k in training}
        if isinstance(training, dict)
        else {}
    )
    return kept | {"curves": _curves(Path(folder) / "log.jsonl")}


def _curves(path: Path) -> dict[str, list[list[float]]]:
    entries = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):  # a line that a kill left torn
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            entries.append(entry)
    every = max(len(entries) // MOST_POINTS, 1)
    curves: dict[str, list[list[float]]] = {}
    for entry in entries[::every]:
        for name, value in entry.items():
            if name != "step" and isinstance(value, int | float):
                curves.setdefault(name, []).append([entry["step"], value])
    return curves
