"""The file of enrolled voices: JSON of the voiceprints of one model, with a digest."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spkd.cache.lock import made_exclusive
from spkd.errors import SpkdError, UsageError, did_you_mean
from spkd.files.atomic import remove_abandoned, write_json
from spkd.files.reading import parse_json, read_bytes
from spkd.files.sealed import Format
from spkd.voiceprint import Voiceprint

FORMAT = Format("spkd_voices", 1, "a file of voices", "`spkd enrol NAME AUDIO...` makes one")
LONGEST = 200  # characters of a name
PRIVATE = 0o600  # permissions of a new file
LARGEST = 1 << 31  # bytes of a file


@dataclass(frozen=True)
class Voices(Mapping[str, Voiceprint]):
    """Voiceprints by name, all of one model.

    Attributes:
        path: the file, for messages.
        prints: name -> voiceprint, in the order of enrolment.
    """

    path: Path
    prints: Mapping[str, Voiceprint]

    def __getitem__(self, name: str) -> Voiceprint:
        """The voiceprint of a name. Raises UsageError: there is none."""
        if name not in self.prints:
            raise UsageError(f"{self.path}: no voice {name!r}{did_you_mean(name, self.prints)}")
        return self.prints[name]

    def __contains__(self, name: object) -> bool:
        return name in self.prints

    def __iter__(self) -> Iterator[str]:
        return iter(self.prints)

    def __len__(self) -> int:
        return len(self.prints)

    @classmethod
    def load(cls, path: str | Path) -> Voices:
        """Read a file of voices.

        Raises:
            UsageError: no such file.
            SpkdError: another file, or a damaged one.
        """
        path = Path(path)
        if not path.exists():
            raise UsageError(f"no voices {path}; enrol some with `spkd enrol NAME AUDIO...`")
        tree = parse_json(read_bytes(path, LARGEST), str(path))
        return cls(path, FORMAT.open(tree, str(path), _checked))

    @classmethod
    def at(cls, path: Path) -> Voices:
        """Voices of a file, none where there is no file; raises SpkdError as `load`."""
        return cls.load(path) if path.exists() else cls(path, {})

    def save(self) -> None:
        """Write the file, whole or not at all. A new one is for its owner alone: it holds personal data."""
        tree = {"voices": {name: each.to_json() for name, each in self.prints.items()}}
        write_json(self.path, FORMAT.seal(tree), PRIVATE)

    def check_model(self, digest: str, name: str) -> None:
        """Check that the voices are of a model. Raises UsageError: they are of another.

        Args:
            digest: digest of the model.
            name: name of the model.
        """
        if any(each.model != digest for each in self.prints.values()):
            file = shlex.quote(str(self.path))
            raise UsageError(
                f"{self.path}: its voices are of another model than {name}; enrol them again with it, or map them: "
                f"`spkd map OLD_CACHE NEW_CACHE`, then `spkd voices {file} --map map --out FILE`"
            )


@contextmanager
def changing(path: Path) -> Iterator[Voices]:
    """Voices of a file, none where there is no file, while no other process changes them.

    Raises:
        UsageError: the path is a symbolic link.
        SpkdError: another file has this name, or a damaged one.
    """
    check_no_link(path)
    lock = path.with_name(f"{path.name}.lock")
    with made_exclusive(lock):
        remove_abandoned(path.parent, [path.name, lock.name, f"{lock.name}.lock"])
        try:
            yield Voices.at(path)
        finally:
            lock.unlink(missing_ok=True)  # a process that waits for it then finds out, and makes another


def check_no_link(path: Path) -> None:
    """Check that a file of voices can be replaced. Raises UsageError: a symbolic link, in whose place it would be."""
    if path.is_symlink():
        raise UsageError(
            f"{path}: a symbolic link, which is not written through; name the file: {os.path.realpath(path)}"
        )


def _checked(content: dict[str, Any], where: str) -> dict[str, Voiceprint]:
    voices = content.get("voices")
    if not isinstance(voices, dict) or set(content) != {"voices"}:
        raise SpkdError(f"{where}: damaged (no voices)")
    for name in voices:
        try:
            check_name(name)
        except UsageError as error:
            raise SpkdError(f"{where}: damaged ({error})") from error
    prints = {name: Voiceprint.from_json(tree, f"{where}: {name}") for name, tree in voices.items()}
    if len({(each.model, len(each.embedding)) for each in prints.values()}) > 1:
        raise SpkdError(f"{where}: damaged (voices of several models)")
    return prints


def check_name(name: str) -> None:
    """Check the name of a voice. Raises UsageError: it cannot be one."""
    if not name or name != name.strip() or not name.isprintable() or len(name) > LONGEST or "=" in name:
        raise UsageError(
            f"{name!r}: no name for a voice (1 to {LONGEST} printable characters, no = and no spaces around)"
        )
