"""Base class of the kinds of containers, and what an index takes from one."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from spkd.corpus.address import Address
from spkd.corpus.manifests.fields import SPEAKER
from spkd.corpus.ranges import Source
from spkd.corpus.stored import container
from spkd.errors import SpkdError

# Names of keys and columns that hold a speaker, the likeliest first: those of manifests, and those of public corpora.
SPEAKERS = (*SPEAKER, "client_id", "speaker_name", "spkid", "spkr", "speakerid", "speaker-id")
IDS = ("utt", "id", "utt_id", "utterance", "utterance_id", "key", "segment_id", "audio_id", "file_id")


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
    """

    name: str
    key: str
    address: Address
    speakers: Mapping[str, str] = field(default_factory=dict)


class Container(ABC):
    """Base class of the kinds of containers.

    Attributes:
        describes: name of the kind, for errors.
        suffixes: suffixes of such files, by which they are found in folders.
        left_out: name of each member with audio that is left out -> the reason; filled while it is read.
        unused: kind of members that nothing uses -> their number.
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

    def opened(self) -> Source:
        """The open file. Raises SpkdError where it cannot be opened."""
        try:
            return container(self.path)
        except OSError as error:
            raise SpkdError(f"{self.path}: {error.strerror or error}") from error
        except ValueError as error:
            raise SpkdError(f"{self.path}: {error}") from error
