"""Members of archives, and those that belong together: audio, and what is beside it under the same key.

The key of a member is its name up to the first dot after its folders, as WebDataset has it; WeSpeaker's shards hold
`KEY.wav`, `KEY.spk` and `KEY.txt`, with keys that may have dots (`id10270/5r0dWxy17C8/00001.wav` in its recipe of
VoxCeleb), so that the key is all before the last dot where there is a `.spk` of this name.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from spkd.corpus.address import CRC, DEFLATE, Address
from spkd.corpus.audio import OTHER_SUFFIXES
from spkd.corpus.containers.container import SPEAKERS, Bounds, Container, Entry, of_place, seems_to_bound
from spkd.corpus.manifests.fields import is_stretch
from spkd.corpus.stored import read
from spkd.errors import SpkdError
from spkd.files.reading import parse_json

KEY = re.compile(r"((?:.*/|)[^./][^./]*)\.[^/]*", re.DOTALL)
BESIDE = ("spk", "json", "cls", "txt")  # suffixes of members that may name a speaker
LARGEST = 1 << 16  # bytes of such a member that is read
LONGEST = 200  # characters of a speaker
STEP = 256  # members between two reports of progress


@dataclass(frozen=True, slots=True)
class Member:
    """Regular file in an archive.

    Attributes:
        offset: place of its first byte in the archive.
        length: bytes that it takes there.
        compressed: whether it is compressed by deflate.
        crc: CRC-32 of its content; None where the archive has none.
    """

    name: str
    offset: int
    length: int
    compressed: bool = False
    crc: int | None = None

    def address(self, container: str) -> Address:
        suffix = PurePosixPath(self.name).suffix.lower().lstrip(".")
        crc = "" if self.crc is None else f":{self.crc:08x}"
        storage = f".{DEFLATE}{crc}" if self.compressed else f".{CRC}{crc}" if crc else ""
        return Address(container, self.offset, self.length, suffix + storage)


class Archive(Container):
    """Base class of containers whose members have names, as files in folders."""

    def entries(self) -> Iterator[Entry]:
        # The member that lies last under a name is the one that unpacking leaves.
        kept: dict[str, Member] = {}
        for member in self.members():
            name = member.name
            if (earlier := kept.pop(name, None)) is not None and _suffix(name) in self.wanted.suffixes:
                self.left_out[f"{name} (at byte {earlier.offset:,})"] = "replaced by a later member of the same name"
            kept[name] = member
        audio, beside = defaultdict[str, list[Member]](list), defaultdict[str, dict[str, Member]](dict)
        for member in kept.values():
            suffix, match = _suffix(member.name), KEY.fullmatch(member.name)
            key = "" if match is None else _key(member.name, match[1], kept)
            if suffix in self.wanted.suffixes:
                if (reason := _unusable(member.name)) is not None or match is None:
                    self.left_out[_shown(member.name)] = reason or "a hidden file"
                else:
                    audio[key].append(member)
            elif suffix in OTHER_SUFFIXES:
                self.left_out[_shown(member.name)] = f"{suffix} is not decoded here; convert it to WAV or FLAC"
            elif self.lists is not None and self.lists.fullmatch(member.name) and not _unusable(member.name):
                self.found_lists[member.name] = member.address(self.path)
            elif match is not None and (end := member.name[len(key) + 1 :].lower()) in BESIDE:
                beside[key][end] = member
            else:
                self.count(self.unused, suffix or "without a suffix")
        placed = [(member, key, len(group) == 1) for key, group in audio.items() for member in group]
        placed.sort(key=lambda each: each[0].offset)
        for number, (member, key, alone) in enumerate(placed):
            place = self._beside(beside.get(key, {}))
            if number % STEP == 0:
                self.share(0.5 + number / len(placed) / 2)
            yield Entry(member.name, key if alone else member.name, member.address(self.path), *place)

    def members(self) -> Iterator[Member]:
        """The regular files, in the order in which they lie; links are counted in `left_out`.

        Raises:
            SpkdError: nothing can be read.
        """
        raise NotImplementedError

    def _beside(self, beside: dict[str, Member]) -> tuple[dict[str, str], Bounds | None, int | None]:
        """Speakers that members beside audio name, by the suffix or the JSON key; the stretch and channel they give."""
        found: dict[str, str] = {}
        bounds: Bounds | None = None
        channel: int | None = None
        for suffix, member in beside.items():
            if suffix == "txt" and self.wanted.speaker != "txt":  # transcripts, mostly
                self.unused[".txt"] += 1
                continue
            if member.length > LARGEST:
                self.unused[f".{suffix} of more than {LARGEST:,} bytes"] += 1
                continue
            try:
                text = read(member.address(self.path)).decode("utf-8-sig")
                if suffix == "json":
                    named, bounds, channel = self._of_json(text)
                    found |= named
                else:
                    found |= self._of_text(suffix, text)
            except (SpkdError, OSError, ValueError):  # ValueError: not UTF-8, too
                self.unused[f".{suffix} that cannot be read"] += 1
        return found, bounds, channel

    def _of_json(self, text: str) -> tuple[dict[str, str], Bounds | None, int | None]:
        tree: Any = parse_json(text, "")
        if not isinstance(tree, dict):
            return {}, None, None
        names = (*SPEAKERS, self.wanted.speaker)
        lower = {str(key).lower(): value for key, value in tree.items()}
        place = of_place(lower)
        found: dict[str, str] = {}
        for key, value in tree.items():
            name, low = str(key), str(key).lower()
            is_text = isinstance(value, str | int) and not isinstance(value, bool) and _is_name(str(value))
            if is_text and (name in names or low in names):
                found[name] = str(value).strip()
            elif low not in place and value not in (None, "", [], {}):
                bounding = seems_to_bound(low) or is_stretch(low, value)
                no_text = " (no text)" if low in SPEAKERS else ""
                self.count(self.bounding if bounding else self.columns, name + no_text)
        return found, self.bounds(lower), self.channel(lower)

    def _of_text(self, suffix: str, text: str) -> dict[str, str]:
        return {suffix: text.strip()} if _is_name(text) else {}


def _is_name(text: str) -> bool:
    return 0 < len(text.strip()) <= LONGEST and text.strip().isprintable()


def _key(name: str, begin: str, names: Collection[str]) -> str:
    """Key of a member.

    Args:
        begin: its name up to the first dot.
        names: names of all members.
    """
    stem = name.rpartition(".")[0]
    return stem if f"{stem}.spk" in names else begin


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _shown(name: str) -> str:
    return name.encode(errors="backslashreplace").decode()


def _unusable(name: str) -> str | None:
    """Reason for which no manifest can name a member; None where one can."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return "its name is not UTF-8"
    return None if name.isprintable() else "its name holds control characters"
