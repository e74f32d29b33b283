"""log.jsonl of a student's folder: values by training step, a line each with its checksum."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from types import UnionType
from typing import Any

from spkd.errors import SpkdError
from spkd.files.reading import parse_json, read_bytes

LOG = "log.jsonl"
CHECK = "check"
MOST_POINTS = 400  # points of a curve

Points = tuple[tuple[int, float], ...]  # step and value


def log_line(step: int, values: dict[str, float]) -> str:
    """Line of the log."""
    entry = {"step": step, **values}
    return json.dumps(entry | {CHECK: _checksum(entry)}) + "\n"


def read_log(path: Path, size: int | None = None) -> list[dict[str, Any]]:
    """Values of a log, each with its step; [] where there is no log.

    Args:
        size: bytes to read, at the end of a line; None: all. What lies behind may be anything after a power cut.
    Raises:
        SpkdError: a line was changed. A last line that a kill cut off is skipped.
    """
    data = read_bytes(path) if path.is_file() else b""
    lines = data[:size].decode(errors="replace").split("\n")
    if "}" not in lines[-1]:  # "", or a line that a kill cut off
        lines.pop()
    entries = []
    for number, line in enumerate(lines, 1):
        if (entry := _entry(line)) is None:
            raise SpkdError(f"{path}:{number}: damaged; remove the file to go on without the curves so far")
        entries.append(entry)
    if data and size is not None and len(data) < size:
        raise SpkdError(f"{path}: damaged (lines are missing); remove the file to go on without the curves so far")
    return entries


def _entry(line: str) -> dict[str, Any] | None:
    """What a line holds; None where it was changed."""
    try:
        entry = parse_json(line, LOG)
    except SpkdError:
        return None
    if not isinstance(entry, dict) or entry.pop(CHECK, None) != _checksum(entry):
        return None
    return entry


def _checksum(entry: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(entry).encode()):08x}"


def read_curves(folder: str | Path) -> dict[str, Points]:
    """Values by training step, at most `MOST_POINTS` for each name. Values that are not finite are skipped.

    Raises:
        SpkdError: as `read_log`.
    """
    curves: dict[str, list[tuple[int, float]]] = {}
    for entry in read_log(Path(folder) / LOG):
        if not _is_number(step := entry.pop("step", None), int):
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
