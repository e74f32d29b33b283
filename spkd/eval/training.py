"""How a student was trained, for reports: from model.json and log.jsonl of its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spkd.files.atomic import read_json
from spkd.pages import figures


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
    return kept | {"curves": figures.curves(Path(folder) / "log.jsonl")}
