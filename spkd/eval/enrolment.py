"""Enrolment maps: the utterances that define each model that trials name.

Three formats are read: Kaldi's `model utterance utterance ...` (spk2utt; CN-Celeb's enroll.map), with one line or
several for each model; tables whose line 1 names the columns, such as NIST SRE's `modelid segmentid side` and SdSV's
`model-id [phrase-id] enroll-file-ids ...`; and the lists of NIST SRE08 and SRE10, `model m segment:a,segment:b`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from spkd.errors import SpkdError, UsageError
from spkd.eval.formats import BETWEEN, with_sides
from spkd.files.text import finite_number, numbered_lines

MODEL = re.compile(r"model[-_]?(id)?")
MEMBER = re.compile(r"(enroll?(ment)?[-_])?(segment|utterance|utt|file)([-_]?ids?)?[-_]?\d*|\.\.\.")
SIDE = ("side", "channel")
NOT_USED = re.compile(r"phrase[-_]?id|gender|sex")
NIST_LIST = re.compile(r"(\S+)\s+[mf]\s+(\S+:[abx](?:\s*,\s*\S+:[abx])*)", re.IGNORECASE)


@dataclass(frozen=True)
class EnrolmentMap:
    """Utterances of each model.

    Attributes:
        members: utterances of each model, in order, each once.
    """

    members: Mapping[str, Sequence[str]]
    notes: tuple[str, ...] = ()


def read_map(path: str | Path) -> EnrolmentMap:
    """Read an enrolment map.

    Raises:
        UsageError: no such file.
        SpkdError: a line without an utterance, or with times, or an empty file.
    """
    path = Path(path)
    if not path.exists():
        raise UsageError(f"no enrolment map {path}")
    models: dict[str, dict[str, None]] = {}
    header: list[str] | None = None
    repeated = 0
    for number, line in numbered_lines(path):
        fields = _split(line)
        if header is None:
            header = [part.lower() for part in fields] if _is_header(fields) else []
            if header:
                continue
        model, members = _row(fields, line, header, f"{path}:{number}")
        known = models.setdefault(model, {})
        before = len(known)
        known.update(dict.fromkeys(members))
        repeated += len(members) - (len(known) - before)
    if not models:
        raise SpkdError(f"{path}: holds no models")
    names = list(dict.fromkeys(name for members in models.values() for name in members))
    renamed, notes = with_sides(names)
    name_of = dict(zip(names, renamed, strict=True))
    if repeated:
        notes.append(f"utterances named again for one model, which count once: {repeated:,}")
    if unused := [name for name in header or [] if NOT_USED.fullmatch(name)]:
        notes.append(f"columns not used: {', '.join(unused)}")
    return EnrolmentMap({model: [name_of[name] for name in some] for model, some in models.items()}, tuple(notes))


def _split(line: str) -> list[str]:
    separator = next((s for s in ("\t", ",", ";") if s in line), None)
    return [field.strip().strip('"') for field in line.split(separator)]


def _is_header(fields: Sequence[str]) -> bool:
    first, *names = [field.lower() for field in fields if field]
    known = all(name in SIDE or NOT_USED.fullmatch(name) or MEMBER.fullmatch(name) for name in names)
    return bool(names) and MODEL.fullmatch(first) is not None and known


def _row(fields: Sequence[str], line: str, header: Sequence[str], where: str) -> tuple[str, list[str]]:
    """Model of a line, and its utterances.

    Args:
        line: the line, for other formats and for errors.
        header: names of the columns; [] without a header.
    """
    if match := NIST_LIST.fullmatch(line.strip()):
        pairs = (item.strip().rpartition(":") for item in match[2].split(","))
        return match[1], [f"{segment}:{side.lower()}" for segment, _, side in pairs]
    # Columns beyond the header are utterances: SdSV's header has one name and dots for all of them.
    names = [*header, *[""] * (len(fields) - len(header))][: len(fields)]
    kept = [
        field
        for field, name in zip(fields, names, strict=True)
        if field and name not in SIDE and not NOT_USED.fullmatch(name)
    ]
    if len(kept) < 2:
        raise SpkdError(f"{where}: {line[:200]!r} is not `model utterance ...`")
    if len(kept) == 4 and all("." in word and finite_number(word) is not None for word in kept[2:]):
        raise SpkdError(
            f"{where}: {line[:200]!r} seems to be `model file start end` (SITW's assist): list each stretch in the "
            "manifest, with start and duration, and give its id here"
        )
    side = next((field.lower() for field, name in zip(fields, names, strict=True) if name in SIDE), None)
    return kept[0], kept[1:] if side is None else [f"{name}{BETWEEN}{side}" for name in kept[1:]]
