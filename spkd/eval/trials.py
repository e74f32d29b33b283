"""Trial lists in the field's formats: `1 a b` (VoxCeleb), `a b target` (Kaldi; also `a b 1`), `a b` (unlabelled)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spkd.errors import SpkdError, UsageError, did_you_mean

_LABELS = {"1": 1, "0": 0, "target": 1, "nontarget": 0}


@dataclass(frozen=True)
class Trials:
    """Trials in order.

    Attributes:
        enrolment, test: ids of the utterances.
        label: (N,) 1 target, 0 non-target; None for an unlabelled list.
        line: of the file.
        source: the file.
    """

    enrolment: list[str]
    test: list[str]
    label: np.ndarray | None
    line: list[int]
    source: str

    def __len__(self) -> int:
        return len(self.enrolment)

    @property
    def utterances(self) -> list[str]:
        """Every utterance once, in order of appearance."""
        return list(dict.fromkeys(u for pair in zip(self.enrolment, self.test, strict=True) for u in pair))


def _voxceleb(parts: list[str]) -> tuple[str, str, int | None] | None:
    return (parts[1], parts[2], int(parts[0])) if len(parts) == 3 and parts[0] in ("0", "1") else None


def _kaldi(parts: list[str]) -> tuple[str, str, int | None] | None:
    return (parts[0], parts[1], _LABELS[parts[2]]) if len(parts) == 3 and parts[2] in _LABELS else None


def _plain(parts: list[str]) -> tuple[str, str, int | None] | None:
    return (parts[0], parts[1], None) if len(parts) == 2 else None


FORMATS: dict[str, Callable[[list[str]], tuple[str, str, int | None] | None]] = {
    "voxceleb": _voxceleb,
    "kaldi": _kaldi,
    "plain": _plain,
}


def read(path: str | Path, form: str = "auto") -> Trials:
    """Read a trial list.

    Args:
        form: a name in FORMATS, or "auto": the one format that every line fits (VoxCeleb's where several do).
    Raises:
        UsageError: no such file or format. SpkdError: a malformed line (file and line named), or no trials.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"no trial list {path}")
    if form != "auto" and form not in FORMATS:
        raise UsageError(f"format={form}{did_you_mean(form, [*FORMATS, 'auto'])}")
    try:
        text = path.read_text()
    except UnicodeDecodeError as error:
        raise SpkdError(f"{path}: not a text file") from error
    lines = [(number, line.split()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise SpkdError(f"{path}: holds no trials")
    candidates = FORMATS if form == "auto" else {form: FORMATS[form]}
    failures = {}
    for name, parse in candidates.items():
        parsed = [parse(parts) for _, parts in lines]
        if None not in parsed:
            enrolment, test, label = zip(*parsed, strict=True)
            labels = None if name == "plain" else np.array(label, np.int8)
            return Trials(list(enrolment), list(test), labels, [n for n, _ in lines], str(path))
        failures[name] = parsed.index(None)
    # The format that got furthest is the one the file was meant to be in.
    name, index = max(failures.items(), key=lambda item: item[1])
    shape = {"voxceleb": "1 enrolment test", "kaldi": "enrolment test target", "plain": "enrolment test"}[name]
    raise SpkdError(f"{path}:{lines[index][0]}: {' '.join(lines[index][1])!r} is not `{shape}`")
