"""Enrolment maps: which utterances define each model that trials name.

Kaldi's `model utterance utterance ...` (spk2utt; CN-Celeb's enroll.map), and NIST SRE's tables `modelid segment side`,
a line for each utterance.
"""

from __future__ import annotations

from pathlib import Path

from spkd.errors import SpkdError, UsageError
from spkd.files.text import stream_lines

SIDE = ("side", "channel")
COLUMNS = ("modelid", "model", "segment", "segmentid", "utterance", "utt", *SIDE)


def read_map(path: str | Path) -> dict[str, list[str]]:
    """The utterances of each model, in order, each once.

    Raises:
        UsageError: no such file. SpkdError: a line without an utterance, or no line.
    """
    path = Path(path)
    if not path.exists():
        raise UsageError(f"no enrolment map {path}")
    models: dict[str, list[str]] = {}
    dropped: int | None = None
    for number, line in stream_lines(path):
        separator = next((s for s in ("\t", ",", ";") if s in line), None)
        parts = [part.strip().strip('"') for part in line.split(separator)]
        parts = [part for part in parts if part]
        if number == 1 and all(part.lower() in COLUMNS for part in parts):
            dropped = next((i for i, part in enumerate(parts) if part.lower() in SIDE), None)
            continue
        if dropped is not None:
            parts = parts[:dropped] + parts[dropped + 1 :]
        if len(parts) < 2:
            raise SpkdError(f"{path}:{number}: {line[:200]!r} is not `model utterance ...`")
        known = models.setdefault(parts[0], [])
        known += [name for name in parts[1:] if name not in known]
    if not models:
        raise SpkdError(f"{path}: holds no models")
    return models
