"""The folder of a cache: names of its files, and the records that commit its units and complete it.

card.json                card
plan/N.npz               plan of part N
plan/N.bin               what follows from it, to be mapped; no part of the cache
speech/                  speech that was found, until the plan has it; no part of the cache
head.safetensors         the teacher's classifier, where logits follow from it
codec.safetensors        learnt parameters of the codecs
zarr.json                the Zarr group; TARGET/zarr.json each array
TARGET/c/K/0             shard K of a target
claims/K                 the worker that is filling unit K
claims/growth            the worker that made the cache or let it grow last; locked while card or records change
commits/K.json           commit record of unit K
commits/K.withdrawn      that of a unit which is filled again, until it is
COMPLETE.json            completion record, the only one that readers need
rejected.csv             utterances and views that were left out, and why
verified.json            time since which `spkd cache verify` has found every shard whole
verified.log             times at which it found each shard of this copy whole
"""

from __future__ import annotations

import contextlib
import csv
import io
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from spkd.cache.card import Card, check_format
from spkd.errors import SpkdError, UsageError
from spkd.files import digest
from spkd.files.reading import State, parse_json, read_bytes, read_json, state_of
from spkd.files.schema import record
from spkd.files.sealed import CHECK, self_digest
from spkd.files.text import counted
from spkd.outputs.target import Target

CARD = "card.json"
COMPLETE = "COMPLETE.json"
HEAD = "head.safetensors"
CODEC = "codec.safetensors"
GROUP = "zarr.json"
REJECTED = "rejected.csv"
VERIFIED = "verified.json"
NOTES = "verified.log"
PULLED = "pulled.json"  # origin of a copy; the time of the file is that of the copy's last use
FOLDERS = ("claims", "commits", "plan", "speech")  # within a cache's folder, besides those of its targets
OPTIONAL = (HEAD, CODEC, REJECTED)  # files that not every cache has
SPEECH = "speech"  # folder of the speech that was found before there is a plan
SPEECH_BYTES = 1024  # of a plan for each second of speech, at most: a detector gives fewer than 100 stretches
COMMIT = re.compile(r"commits/(0|[1-9][0-9]{0,17})\.json")
SHA256_BYTES = 32
UINT32 = {"low": 0, "high": 2**32 - 1}


def plan_path(part: int) -> Path:
    """Path of the plan of a part within a cache's folder."""
    return Path("plan") / f"{part}.npz"


def mapped_path(part: int) -> Path:
    """Path of the mapped file that follows from the plan of a part, within a cache's folder."""
    return plan_path(part).with_suffix(".bin")


def commit_name(unit: int) -> str:
    """Path of the commit record of a unit within a cache's folder."""
    return f"commits/{unit}.json"


def commit_path(root: Path, unit: int) -> Path:
    return root / commit_name(unit)


def withdrawn_path(root: Path, unit: int) -> Path:
    """Path of the commit record of a unit that is filled again, until it is."""
    return commit_path(root, unit).with_suffix(".withdrawn")


def claim_path(root: Path, unit: int) -> Path:
    return root / "claims" / str(unit)


def growth_path(root: Path) -> Path:
    """Path of the claim on the growth of a cache: on its card, plan and completion record."""
    return root / "claims" / "growth"


def shard_path(root: Path, target: Target, unit: int) -> Path:
    return root / target.name / "c" / str(unit) / "0"


def array_path(target: Target) -> Path:
    """Path of the description of a target's array within a cache's folder."""
    return Path(target.name) / "zarr.json"


def remedy(root: Path) -> str:
    """Advice for an error about a shard, to follow what is wrong with it."""
    return (
        f"the `spkd extract` that made {root} makes again what is damaged, and "
        f"`spkd cache repair {shlex.quote(str(root))} --from COPY` fetches it from another copy"
    )


def only_from_copy(root: Path) -> str:
    """Advice for an error about a file that no extraction makes again."""
    return f"`spkd cache repair {shlex.quote(str(root))} --from COPY` fetches it"


def metadata_files(card: Card) -> list[str]:
    """Names of the files of a cache that neither are shards nor follow from the card; some are OPTIONAL."""
    names = [*OPTIONAL, *(str(plan_path(part)) for part in range(len(card.parts)))]
    return names + [commit_name(unit) for unit in range(card.units)]


@dataclass(frozen=True)
class ShardRecord:
    """Size and checksums of a shard at its commit."""

    bytes: int = field(metadata={"low": 1, "high": 2**50})
    chunk_crc32c: tuple[int, ...] = field(metadata=UINT32)
    index_crc32c: int = field(metadata=UINT32)


@dataclass(frozen=True)
class CommitRecord:
    """Record of a committed unit.

    Attributes:
        rejected: number of each view left out -> the reason. Views are counted within the unit, so that the record
            stays true where a merge gives the unit another number.
        decoded: number of each view that was left out although its audio was decoded -> state of the file. Unless that
            changes, it is not decoded again.
        writer: host and identity of the worker.
    """

    rejected: dict[int, str]
    decoded: dict[int, State]
    targets: dict[str, ShardRecord]
    writer: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """The record as JSON, with its digest."""
        tree = asdict(self)
        return tree | {CHECK: self_digest(tree)}

    @classmethod
    def from_json(cls, tree: Any, card: Card, where: str) -> CommitRecord:
        """A record from its JSON, checked.

        Raises:
            SpkdError: it is not the record of a unit of this card's cache, or it was changed.
        """
        if not isinstance(tree, dict):
            raise SpkdError(f"{where}: damaged (expected an object)")
        commit = record(cls, {name: value for name, value in tree.items() if name != CHECK}, where)
        if set(commit.targets) != {target.name for target in card.targets}:
            raise SpkdError(f"{where}: damaged (its targets are not those of the card)")
        if tree.get(CHECK) != self_digest(tree):
            raise SpkdError(f"{where}: damaged (it does not match its own digest)")
        return commit

    @classmethod
    def load(cls, root: Path, card: Card, unit: int) -> CommitRecord:
        """Read the record of a unit. Raises SpkdError: it is missing or damaged."""
        path = commit_path(root, unit)
        return cls.from_json(read_json(path), card, str(path))


class Digests(Mapping[str, str]):
    """Digests of the metadata files of a cache, by name.

    A cache of 100 million views has 100,000 commit records; as a dict, their digests would take most of the time and
    memory of opening it.

    Args:
        files: digests of the other files.
        commits: SHA-256 of the commit record of each unit, 32 bytes each.
    """

    def __init__(self, files: Mapping[str, str], commits: bytes) -> None:
        self._files, self._commits = files, commits

    def __getitem__(self, name: str) -> str:
        if name in self._files:
            return self._files[name]
        found = COMMIT.fullmatch(name)
        if found is None or int(found[1]) >= len(self._commits) // SHA256_BYTES:
            raise KeyError(name)
        start = int(found[1]) * SHA256_BYTES
        return self._commits[start : start + SHA256_BYTES].hex()

    def __iter__(self) -> Iterator[str]:
        yield from self._files
        yield from map(commit_name, range(len(self._commits) // SHA256_BYTES))

    def __len__(self) -> int:
        return len(self._files) + len(self._commits) // SHA256_BYTES


@dataclass(frozen=True)
class CompletionRecord:
    """Record of a complete cache.

    Attributes:
        rejected: number of each view left out of the cache -> the reason.
        bytes: size of all shards together.
        sha256: name of every file of `metadata_files` -> its digest.
    """

    card: Card
    rejected: dict[int, str]
    bytes: int
    sha256: Mapping[str, str]

    @property
    def fingerprint(self) -> str:
        return self.card.fingerprint(self.rejected)

    def utterances_at(self, fingerprint: str) -> int | None:
        """Number of utterances of the cache when it had a fingerprint, before it grew; None where it never had it."""
        for count in range(1, len(self.card.parts)):
            earlier = self.card.with_parts(self.card.parts[:count])
            if earlier.fingerprint(view for view in self.rejected if view < earlier.num_views) == fingerprint:
                return sum(part.utterances for part in earlier.parts)
        return None

    def to_json(self) -> dict[str, Any]:
        """The record as JSON, with its digest."""
        tree = {
            "fingerprint": self.fingerprint,
            "card": self.card.to_json(),
            "rejected": self.rejected,
            "bytes": self.bytes,
            "sha256": {name: value for name, value in self.sha256.items() if not COMMIT.fullmatch(name)},
            "commits_sha256": "".join(self.sha256[commit_name(unit)] for unit in range(self.card.units)),
        }
        return tree | {CHECK: self_digest(tree)}

    @classmethod
    def there(cls, root: Path) -> CompletionRecord | None:
        """The record of a cache; None where it is missing or damaged."""
        try:
            return cls.load(root)
        except SpkdError:
            return None

    @classmethod
    def load(cls, root: Path) -> CompletionRecord:
        """Read the record of a cache. Raises SpkdError: no cache there, not complete, damaged or of another format."""
        path = root / COMPLETE
        if not path.is_file():
            card = load_card(root)
            commits = commit_path(root, 0).parent  # a card may promise any number of units
            done = sum(path.suffix == ".json" for path in commits.iterdir()) if commits.is_dir() else 0
            raise SpkdError(
                f"{root}: extraction is not finished ({done} of {counted(card.units, 'unit')}); run the same "
                "`spkd extract` again"
            )
        return parse_completion(read_bytes(path), str(path))


def committed_views(root: Path, card: Card, unit: int, views: range) -> list[int] | None:
    """Views that a unit has or had: by its commit record, by the one that was withdrawn, or by the completion record.

    Args:
        views: numbers of all views of the unit.
    Returns:
        Their numbers; None where no record tells which they are.
    """
    for path in (commit_path(root, unit), withdrawn_path(root, unit)):
        with contextlib.suppress(SpkdError):  # missing or damaged
            rejected = CommitRecord.from_json(read_json(path), card, str(path)).rejected
            return [view for view in views if view - views.start not in rejected]
    complete = _completion(root, state_of(root / COMPLETE))
    if complete is None or unit >= complete.card.units:
        return None
    return [view for view in views if view not in complete.rejected]


@lru_cache(maxsize=8)
def _completion(root: Path, state: State | None) -> CompletionRecord | None:
    """The completion record of a cache, which is read once for each state of its file."""
    return CompletionRecord.there(root)


@dataclass(frozen=True)
class _Rest:
    rejected: dict[int, str]
    bytes: int = field(metadata={"low": 0, "high": 2**60})


def parse_completion(data: bytes, where: str) -> CompletionRecord:
    """A completion record from its bytes.

    Raises:
        SpkdError: damaged, of another format, or with names or views that its card does not have.
    """
    tree = parse_json(data, where)
    if isinstance(tree, dict) and isinstance(tree.get("card"), dict) and "spkd_cache" in tree["card"]:
        check_format(tree["card"]["spkd_cache"], where)
    if not isinstance(tree, dict) or "card" not in tree or tree.get(CHECK) != self_digest(tree):
        raise SpkdError(f"{where}: damaged (it does not match its own digest)")
    card = Card.from_json(tree["card"], where)
    rest = record(_Rest, {name: tree[name] for name in ("rejected", "bytes") if name in tree}, where)
    sha256 = tree.get("sha256")
    if not isinstance(sha256, dict) or not all(type(value) is str for value in sha256.values()):
        raise SpkdError(f"{where}: damaged (no digests of its files)")
    plans = {str(plan_path(part)) for part in range(len(card.parts))}
    if not plans <= sha256.keys() <= plans | set(OPTIONAL):
        raise SpkdError(f"{where}: damaged (its files are not those of its card)")
    commits = _commits(tree.get("commits_sha256"), card.units, where)
    if any(not 0 <= view < card.num_views for view in rest.rejected):
        raise SpkdError(f"{where}: damaged (it rejects views that there are not)")
    complete = CompletionRecord(card, rest.rejected, rest.bytes, Digests(sha256, commits))
    if tree.get("fingerprint") != complete.fingerprint:
        raise SpkdError(f"{where}: damaged (it does not match its fingerprint)")
    return complete


def _commits(listed: Any, units: int, where: str) -> bytes:
    """Digests of the commit records of all units, 32 bytes each, from their digits. Raises SpkdError: others."""
    if isinstance(listed, str) and len(listed) == 2 * SHA256_BYTES * units:
        with contextlib.suppress(ValueError):
            digests = bytes.fromhex(listed)
            if len(digests) == SHA256_BYTES * units:  # no spaces
                return digests
    raise SpkdError(f"{where}: damaged (not the digest of a commit record for each of {counted(units, 'unit')})")


def read_rejected(path: Path) -> dict[str, str]:
    """The table of rejections of a cache: name of each utterance or view that it lacks -> the reason.

    Raises:
        SpkdError: it is damaged.
    """
    try:
        _, *rows = csv.reader(io.StringIO(read_bytes(path).decode()))
        return dict(rows)
    except (ValueError, csv.Error) as error:
        raise SpkdError(f"{path}: damaged ({error})") from error


def most_bytes(card: Card) -> int:
    """Most bytes that a metadata file of a cache may have.

    The largest are a plan, with some 30 bytes and a share of an id for each view and 8 for each stretch of speech, and
    a head, with the weights of each class.
    """
    classes = 0 if card.head is None else len(card.head.classes)
    seconds = 0.0 if card.views.vad is None else 3600 * sum(part.hours for part in card.parts)
    return (64 << 20) + 128 * card.num_views + (classes << 14) + round(SPEECH_BYTES * seconds)


def metadata_digest(root: Path, card: Card, name: str) -> str | None:
    """Digest of a metadata file; None where it is missing, no regular file, or larger than any of such a cache."""
    path = root / name
    return digest.of_file(path) if path.is_file() and path.stat().st_size <= most_bytes(card) else None


def load_card(root: Path) -> Card:
    """Read the card of a cache.

    Raises:
        UsageError: no cache here.
        SpkdError: another format, or a damaged card.
    """
    path = root / CARD
    if not path.is_file():
        if root.is_file():
            raise UsageError(f"{root}: a file; name the folder of a teacher cache")
        what = " (it holds other files)" if root.is_dir() and any(root.iterdir()) else ""
        advice = (
            f"name its folder, or make one with `spkd extract cache={'NEW_FOLDER' if what else shlex.quote(str(root))}`"
        )
        raise UsageError(f"{root}: no teacher cache{what}; {advice}")
    return parse_card(read_bytes(path), str(path))


def parse_card(data: bytes | str, where: str) -> Card:
    """A card from the content of its file. Raises SpkdError: it is damaged or of another format."""
    return Card.from_json(parse_json(data, where), where)
