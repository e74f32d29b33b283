"""Base class of the kinds of containers, and what an index takes from one."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

from spkd.corpus.address import Address
from spkd.corpus.manifests.fields import BOUND, CHANNEL, DURATION, END, SPEAKER, START, channel, number
from spkd.corpus.ranges import Source
from spkd.corpus.stored import container
from spkd.errors import SpkdError

# Names of keys and columns that hold a speaker, the likeliest first: those of manifests, and those of public corpora.
SPEAKERS = (*SPEAKER, "client_id", "speaker_name", "spkid", "spkr", "speakerid", "speaker-id")
IDS = ("utt", "id", "utt_id", "utterance", "utterance_id", "key", "segment_id", "audio_id", "file_id")
MOST_KINDS, LONGEST_KIND = 40, 60  # kinds of members, or columns, that are counted, and characters of one
Bounds = tuple[float, float | None]  # start and duration (s) that are given beside audio; None: to its end


@dataclass(frozen=True)
class Wanted:
    """What is taken from containers.

    Attributes:
        suffixes: suffixes of audio that is taken; other audio is not mentioned.
        speaker: name of the member, key or column that holds speakers; "" takes what is found.
        id: name of the column that holds ids; "" takes what is found.
        audio: name of the column that holds audio; "" takes the only one.
    """

    suffixes: frozenset[str]
    speaker: str = ""
    id: str = ""
    audio: str = ""


@dataclass(frozen=True)
class Entry:
    """Audio in a container.

    Attributes:
        name: its path within the container, or its name there.
        key: its id, unless a layout gives another one.
        speakers: where a speaker is named -> the speaker.
        bounds: the stretch of it that columns or keys beside it give; None where there are none.
        channel: the channel that they give, counted from 0; None where they give none.
    """

    name: str
    key: str
    address: Address
    speakers: Mapping[str, str] = field(default_factory=dict)
    bounds: Bounds | None = None
    channel: int | None = None


def of_place(names: Collection[str]) -> set[str]:
    """Those of the names that give the stretch of a row (`Container.bounds`), or its channel (`Container.channel`).

    Args:
        names: names in lower case.
    """
    return {next((name for name in kinds if name in names), "") for kinds in (START, END, DURATION, CHANNEL)} - {""}


@lru_cache(1 << 10)
def seems_to_bound(name: str) -> bool:
    """Whether a column seems to bound audio by its name, in lower case."""
    return BOUND.search(name) is not None


class Container(ABC):
    """Base class of the kinds of containers.

    Attributes:
        describes: name of the kind, for errors.
        suffixes: suffixes of such files, by which they are found in folders.
        left_out: name of each member with audio that is left out -> the reason; filled while it is read.
        unused: kind of members that nothing uses -> their number.
        columns: column or JSON key beside the audio that nothing uses -> number of its values.
        bounding: those of them that seem to bound the audio, but are not understood.
        has_names: whether names are paths, of which a layout may read ids and speakers.
        lists: pattern of the names of members that are lists of a corpus.
        found_lists: name of each member that is such a list -> its address.
        share: function of the share of it that was read so far, called now and then.
    """

    describes: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]

    def __init__(self, path: str, wanted: Wanted) -> None:
        self.path, self.wanted = path, wanted
        self.left_out: dict[str, str] = {}
        self.has_names = True
        self.unused: Counter[str] = Counter()
        self.columns: Counter[str] = Counter()
        self.bounding: Counter[str] = Counter()
        self.lists: re.Pattern[str] | None = None
        self.found_lists: dict[str, Address] = {}
        self.share: Callable[[float], None] = lambda done: None

    @classmethod
    @abstractmethod
    def recognises(cls, path: str, begin: bytes) -> bool:
        """Whether a file is of this kind.

        Args:
            begin: its first 1,024 bytes.
        """

    @abstractmethod
    def entries(self) -> Iterator[Entry]:
        """The audio, in the order in which it lies.

        Raises:
            SpkdError: nothing of it can be read.
        """

    def bounds(self, row: Mapping[str, Any]) -> Bounds | None:
        """The stretch that a row gives by start, end and duration, of which the names are those of manifests.

        Args:
            row: values by names in lower case.
        """
        start, end, duration = (next((name for name in names if name in row), None) for names in (START, END, DURATION))
        try:
            first = number(row, start, "") or 0.0
            last, length = number(row, end, ""), number(row, duration, "")
            length = last - first if last is not None else None if length in (-1.0, 0.0) else length  # -1, 0: unknown
            if first < 0 or (length is not None and length <= 0):
                raise SpkdError("no stretch")
        except SpkdError:
            self.count(self.bounding, f"{end or duration or start} (no times)")
            return None
        return None if length is None and not first else (first, length)

    def channel(self, row: Mapping[str, Any]) -> int | None:
        """The channel that a row gives; None where it gives none, or all.

        Args:
            row: values by names in lower case.
        """
        name = next((name for name in CHANNEL if name in row), None)
        try:
            return channel(row, name, "")
        except SpkdError:
            self.count(self.columns, f"{name} (no channel)")
            return None

    def count(self, counter: Counter[str], kind: str, number: int = 1) -> None:
        """Count members or columns of a kind; those of many kinds together."""
        known = kind in counter or (len(counter) < MOST_KINDS and len(kind) < LONGEST_KIND)
        counter[kind if known and kind.isprintable() else "others"] += number

    def opened(self) -> Source:
        """The open file. Raises SpkdError where it cannot be opened."""
        try:
            return container(self.path)
        except OSError as error:
            raise SpkdError(f"{self.path}: {error.strerror or error}") from error
        except ValueError as error:
            raise SpkdError(f"{self.path}: {error}") from error
