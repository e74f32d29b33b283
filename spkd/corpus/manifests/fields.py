"""Fields of an utterance: their names in various tools, and their values.

Text is taken as it is written, since `NA` and `none` are names that people have. Only an empty cell and a JSON null
stand for an unknown text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spkd.corpus.address import is_elsewhere
from spkd.corpus.utterance import Utterance
from spkd.errors import SpkdError, did_you_mean

ID = ("utt", "id", "utt_id", "utterance", "utterance_id")
PATH = ("path", "audio_filepath", "wav", "audio", "file", "filename", "file_name", "file_path", "filepath")
SPEAKER = ("speaker", "spk", "spk_id", "speaker_id", "label")
START = ("start", "offset", "begin", "onset", "start_time", "begin_time", "start_s", "start_sec", "start_seconds")
END = ("end", "end_time", "end_s", "end_sec", "end_seconds")
DURATION = ("duration", "dur", "duration_s", "duration_sec", "duration_seconds")
CHANNEL = ("channel", "channel_selector")
HEADER = ("utt", "path", "speaker", "duration", "start")  # first columns of a manifest that is written as CSV
STATE = "container_state"  # size and time of the container of an address, as spkd writes them
ROLES = {
    "id": ID,
    "path": PATH,
    "speaker": SPEAKER,
    "start": START,
    "end": END,
    "duration": DURATION,
    "channel": CHANNEL,
    "state": (STATE,),
}

PLACEHOLDER = re.compile(r"\$\w+|\{\w+\}")  # at the start of a path of SpeechBrain's, for the corpus' folder
# Speakers that tools write where the speaker is unknown: NeMo, vocabularies of other toolkits, labels of data sets.
PLACEHOLDERS = ("infer", "UNK", "-", "-1")
# Words that may be of a speaker or stand for an unknown one, in lower case and without signs; within brackets
# (`<unk>`, `[none]`) they stand for an unknown one.
DOUBTFUL = re.compile(
    r"(?:speaker|spk)?(?:unk|unknown|notknown|unspecified|unidentified|undefined|unlabell?ed|unnamed|anon|anonymous|noise"
    r"|none|null|nan|na|nobody)(?:speaker|spk)?|no(?:speaker|spk)|"
)
BRACKETED = re.compile(r"<.*>|\[.*\]|\(.*\)|\{.*\}")
# Missing numbers, as pandas and other tools write them.
NO_NUMBER = ("", "nan", "none", "null", "na", "n/a", "<na>")
# Names of columns that bound an utterance within its file, whatever their unit.
_OF_TIME = (
    r"(?:t|x|ts|time|timestamp|seg|segment|utt|utterance|clip|audio|speech|turn|chunk|cut|crop|trim|vad|cue|mark)"
)
_UNIT = (
    r"(?:times?|timestamps?|m?secs?|seconds?|milliseconds?|ms|us|ns|s|frames?|samples?|pos|position|offset|point|index|idx|"
    r"at|\d)"
)
_EDGE = (
    r"(?:start(?:ing)?|strt|begin(?:ning)?|beg|bgn|end(?:ing)?|stop(?:ping)?|finish(?:ed)?|onset|offset|from|since|to|until|"
    r"till|seek|skip)"
)
BOUND = re.compile(
    rf"(?:^|[^a-z]){_OF_TIME}?_?{_EDGE}s?[_ -]?{_UNIT}?(?:$|[^a-z])"
    rf"|^(?:{_OF_TIME}[_ -]?)?(?:st|et|in|out|lower|upper)(?:[_ -]?{_UNIT})?$"
    rf"|^{_OF_TIME}(?:[_ -]?(?:min|max|first|last|left|right|lo|hi|low|high|\d)|[_ -][selr])$"
    rf"|^(?:min|max|first|last|left|right|lo|hi|low|high)(?:[_ -]{_UNIT}|(?:time|sec|sample|frame)s?)$"
    r"|^[se][_ -]?(?:time|sec|ms|frame|sample|pos)s?$"
)
LENGTH = re.compile(
    r"(?:^|[^a-z])(?:n|num)?_?(?:durs?|durations?|lengths?|lens?|samples|frames|m?secs?|seconds|milliseconds|ms|spans?)"
    r"(?:$|[^a-z])"
)
# Names of cells that hold one or several stretches, in words or as a list.
STRETCH = re.compile(
    r"(?:^|_)(?:vad|speech|time|timestamp|segment|interval|region|span|range|bound|turn|chunk|crop|window|boundar(?:y|ie))"
    r"s?(?:_(?:s|sec|secs|seconds|ms|samples|frames))?$"
)
ALIGNMENT = re.compile(r"word|align|ctm|token|phone|char")  # names of cells with the times of parts of the text
TWO_NUMBERS = re.compile(r"[\[(]*\s*\d+(?:\.\d+)?\s*(?:[-,; ]|to)\s*\d+(?:\.\d+)?\s*[\])]*")
ROUNDING = 0.011  # s by which end - start may differ from a duration that was rounded


@dataclass(frozen=True)
class Names:
    """Columns of the fields of an utterance.

    Attributes:
        id: column of the id; None where there is none, as for all other fields.
        start: column of the start (s).
        end: column of the end (s).
        duration: column of the duration (s).
        state: column of the state of the container in which the audio lies.
        unused: further columns.
    """

    id: str | None
    path: str | None
    speaker: str | None
    start: str | None
    end: str | None
    duration: str | None
    channel: str | None
    state: str | None
    unused: tuple[str, ...]


def names_of(columns: Sequence[str], where: str) -> Names:
    """Find the column of each field, by the first of its names that is there.

    Raises:
        SpkdError: no path, a column twice, or a column of times that is not understood.
    """
    if repeated := [name for index, name in enumerate(columns) if name and name in columns[:index]]:
        raise SpkdError(f"{where}: two columns are called {repeated[0]!r}")
    chosen = {role: next((name for name in names if name in columns), None) for role, names in ROLES.items()}
    if chosen["path"] is None:
        raise SpkdError(f"{where}: no audio path{did_you_mean('path', [name for name in columns if name])}")
    unused = tuple(name for name in columns if name not in chosen.values())
    unclear = [name for name in unused if BOUND.search(name)]
    if chosen["start"] is not None and chosen["end"] is None and chosen["duration"] is None:
        unclear += [name for name in unused if LENGTH.search(name)]
    if unclear:
        raise SpkdError(
            f"{where}: {unclear[0]!r} seems to bound utterances, but is not understood; give start and end, or start "
            "and duration, in seconds under these names, or leave the column out"
        )
    return Names(**chosen, unused=unused)


def utterance(
    row: Mapping[str, object], names: Names, where: str, folder: Path, columns: Sequence[str] = ()
) -> tuple[Utterance, bool]:
    """The utterance of one line.

    Args:
        row: cells of the line by column.
        folder: folder to which paths are relative.
        columns: further columns to keep as attributes.
    Returns:
        The utterance, with the id "" where the line has none; and whether its duration differs from end - start.
    Raises:
        SpkdError: values that an utterance cannot have.
    """
    # The path, and lines that stand for several utterances.
    path = text(row, names.path, where)
    if path is None:
        raise SpkdError(f"{where}: no audio path")
    if PLACEHOLDER.match(path) and not (folder / path).exists():
        raise SpkdError(f"{where}: {path[:80]!r} has a placeholder of SpeechBrain; put the corpus' folder there")
    for name in names.unused:
        if is_stretch(name, row.get(name)):
            raise SpkdError(
                f"{where}: {name!r} lists stretches of the file; write one line for each, with start and end"
            )
    # The times. Where an end is given, it decides.
    start = number(row, names.start, where) or 0.0
    end, duration = number(row, names.end, where), number(row, names.duration, where)
    duration = None if duration in (-1.0, 0.0) else duration  # tools write these for an unknown duration
    if start < 0 or (duration is not None and duration < 0):
        raise SpkdError(f"{where}: duration and start must not be negative")
    differs = False
    if end is not None:
        if end <= start:
            raise SpkdError(f"{where}: the end ({end:g} s) is not after the start ({start:g} s)")
        differs = duration is not None and abs(end - start - duration) > ROUNDING
        duration = end - start
    made = Utterance(
        text(row, names.id, where) or "",
        path if is_elsewhere(path) else str(folder / path),
        text(row, names.speaker, where),
        duration,
        start,
        channel(row, names.channel, where),
        attributes(row, columns),
    )
    return made, differs


def is_stretch(name: str, value: object) -> bool:
    """Whether a cell that no field takes bounds utterances: a list of pairs of times, or such a cell by its name."""
    if STRETCH.search(name):
        return (isinstance(value, list | dict) and bool(value)) or (
            isinstance(value, str) and bool(TWO_NUMBERS.fullmatch(value.strip()))
        )
    objects: list[Any] = value if isinstance(value, list) else [value]
    if objects and all(isinstance(item, dict) for item in objects) and not ALIGNMENT.search(name):
        return any(BOUND.search(str(key).lower()) for item in objects for key in item)
    pairs = value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
    return all(_is_pair(pair) for pair in pairs)


def _is_pair(value: object) -> bool:
    """Whether a value is a list of two numbers that rise from 0 or more."""
    if not isinstance(value, list) or len(value) != 2 or any(isinstance(word, bool) for word in value):
        return False
    first, last = value
    return isinstance(first, int | float) and isinstance(last, int | float) and 0 <= first < last


def refuse_fields(names: Names, roles: Sequence[str], where: str, besides: str) -> None:
    """Refuse fields that a format already has in columns of its own.

    Args:
        names: columns of the fields, without those of the format.
        roles: fields that must have no column.
        besides: columns of the format that give these fields.
    Raises:
        SpkdError: such a column.
    """
    for role in roles:
        if (name := getattr(names, role)) is not None:
            raise SpkdError(f"{where}: {name!r} in addition to {besides}; leave out the ones that do not count")


def attributes(row: Mapping[str, object], columns: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Values of a line in some columns, as printable text: pairs (column, value)."""
    values = ((name, row.get(name, row.get(name.lower()))) for name in columns)
    texts = ((name, "" if is_missing(value) else str(value)) for name, value in values)
    shown = ((name, "".join(c for c in value if c.isprintable())[:200].strip()) for name, value in texts)
    return tuple((name, value) for name, value in shown if value)


def stands_for_unknown(speaker: str) -> bool:
    """Whether a speaker's name is a placeholder of an unknown one."""
    return speaker in PLACEHOLDERS or (bool(BRACKETED.fullmatch(speaker)) and may_be_unknown(speaker))


def may_be_unknown(speaker: str) -> bool:
    """Whether a speaker's name may stand for an unknown one."""
    return bool(DOUBTFUL.fullmatch(re.sub(r"[\W_]", "", speaker.lower())))


def is_missing(value: object) -> bool:
    """Whether a value is unknown: an empty cell, a JSON null, or the number NaN."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def text(row: Mapping[str, object], name: str | None, where: str) -> str | None:
    """A text of a line; None where it is unknown.

    Args:
        name: the column; None where there is none.
    Raises:
        SpkdError: the value is no text, too long, or has control characters.
    """
    value = None if name is None else row.get(name)
    if is_missing(value):
        return None
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise SpkdError(f"{where}: {name} is no text ({str(value)[:60]}); write it in quotation marks")
    words = str(value).strip()
    if not words.isprintable() or len(words) > 4096:
        raise SpkdError(f"{where}: {name} holds control characters, or more than 4,096 characters")
    return words or None


def number(row: Mapping[str, object], name: str | None, where: str) -> float | None:
    """A number of a line; None where it is unknown.

    Args:
        name: the column; None where there is none.
    Raises:
        SpkdError: the value is not a finite number.
    """
    value = None if name is None else row.get(name)
    if is_missing(value) or isinstance(value, bool):
        return None
    if isinstance(value, str) and value.strip().lower() in NO_NUMBER:
        return None
    try:
        parsed = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError) as error:
        raise SpkdError(f"{where}: {name} is not a number ({str(value)[:60]!r})") from error
    if not math.isfinite(parsed):
        raise SpkdError(f"{where}: {name} is not finite ({value})")
    return parsed


def channel(row: Mapping[str, object], name: str | None, where: str) -> int | None:
    """The channel that a line names, counted from 0; None for all channels.

    Args:
        name: the column; None where there is none.
    Raises:
        SpkdError: the value is not one channel.
    """
    value = None if name is None else row.get(name)
    if isinstance(value, list):
        value = value[0] if len(value) == 1 else "several"
    if is_missing(value) or str(value).strip().lower() in (*NO_NUMBER, "average"):
        return None
    if str(value).strip() in ("A", "B"):
        return "AB".index(str(value).strip())
    try:
        chosen = int(str(value))
    except ValueError as error:
        raise SpkdError(f"{where}: channel {str(value)[:40]!r} is not one channel, counted from 0") from error
    if not 0 <= chosen < 1024:
        raise SpkdError(f"{where}: channel {chosen} is not one channel, counted from 0")
    return chosen
