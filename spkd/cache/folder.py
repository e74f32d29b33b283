"""The folder of a cache: names of its files, and the records that commit its units and complete it.

card.json                card
plan/N.npz               plan of part N
head.safetensors         the teacher's classifier, where logits follow from it
codec.safetensors        learnt parameters of the codecs
zarr.json                the Zarr group; TARGET/zarr.json each array
TARGET/c/K/0             shard K of a target
claims/K                 the worker that is filling unit K
commits/K.json           commit record of unit K
COMPLETE.json            completion record, the only one that readers need
verified.json            time of the last `spkd cache verify` that found everything intact
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from spkd.cache.card import Card, check_format
from spkd.errors import SpkdError
from spkd.files import digest
from spkd.files.atomic import parse_json, read_bytes, read_json
from spkd.files.schema import record
from spkd.outputs.target import Target

CARD = "card.json"
COMPLETE = "COMPLETE.json"
HEAD = "head.safetensors"
CODEC = "codec.safetensors"
GROUP = "zarr.json"
VERIFIED = "verified.json"
PULLED = "pulled.json"  # origin of a copy; the time of the file is that of the copy's last use
UINT32 = {"low": 0, "high": 2**32 - 1}


def plan_path(part: int) -> Path:
    """Path of the plan of a part within a cache's folder."""
    return Path("plan") / f"{part}.npz"


def commit_path(root: Path, unit: int) -> Path:
    """Path of the commit record of a unit."""
    return root / "commits" / f"{unit}.json"


def claim_path(root: Path, unit: int) -> Path:
    """Path of the claim on a unit."""
    return root / "claims" / str(unit)


def shard_path(root: Path, target: Target, unit: int) -> Path:
    """Path of the shard of a target and a unit."""
    return root / target.name / "c" / str(unit) / "0"


def array_path(target: Target) -> Path:
    """Path of the description of a target's array within a cache's folder."""
    return Path(target.name) / "zarr.json"


def metadata_files(card: Card) -> list[str]:
    """Names of all files of a cache except the shards and the completion record; head and codecs are optional."""
    names = [CARD, HEAD, CODEC, GROUP, *(str(array_path(target)) for target in card.targets)]
    names += [str(plan_path(part)) for part in range(len(card.parts))]
    return names + [str(commit_path(Path(), unit)) for unit in range(card.units)]


@dataclass(frozen=True)
class ShardRecord:
    """Size and checksums of a shard at its commit.

    Attributes:
        bytes: size of the file.
        chunk_crc32c: checksum of each inner chunk.
        index_crc32c: checksum of the index.
    """

    bytes: int = field(metadata={"low": 1, "high": 2**50})
    chunk_crc32c: tuple[int, ...] = field(metadata=UINT32)
    index_crc32c: int = field(metadata=UINT32)


@dataclass(frozen=True)
class CommitRecord:
    """Record of a committed unit.

    Attributes:
        rejected: number of each view left out -> the reason. Views are counted within the unit, so that the record
            stays true where a merge gives the unit another number.
        targets: target -> record of its shard.
        writer: host and identity of the worker.
    """

    rejected: dict[int, str]
    targets: dict[str, ShardRecord]
    writer: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """The record as JSON."""
        return asdict(self) | {"rejected": {str(view): reason for view, reason in sorted(self.rejected.items())}}

    @classmethod
    def from_json(cls, tree: Any, card: Card, where: str) -> CommitRecord:
        """A record from its JSON, checked.

        Raises:
            SpkdError: it is not the record of a unit of this card's cache.
        """
        commit = record(cls, tree, where)
        if set(commit.targets) != {target.name for target in card.targets}:
            raise SpkdError(f"{where}: damaged (its targets are not those of the card)")
        return commit

    @classmethod
    def load(cls, root: Path, card: Card, unit: int) -> CommitRecord:
        """Read the record of a unit.

        Raises:
            SpkdError: it is missing or damaged.
        """
        path = commit_path(root, unit)
        return cls.from_json(read_json(path), card, str(path))


@dataclass(frozen=True)
class CompletionRecord:
    """Record of a complete cache.

    Attributes:
        card: the card.
        rejected: number of each view left out of the cache -> the reason.
        bytes: size of all shards together.
        sha256: name of every metadata file -> its digest.
    """

    card: Card
    rejected: dict[int, str]
    bytes: int
    sha256: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """The record as JSON, with its digest."""
        tree = {
            "card": self.card.to_json(),
            "rejected": {str(view): reason for view, reason in self.rejected.items()},
            "bytes": self.bytes,
            "sha256": self.sha256,
        }
        return tree | {"check": self_digest(tree)}

    @classmethod
    def load(cls, root: Path) -> CompletionRecord:
        """Read the record of a cache.

        Raises:
            SpkdError: no cache there, not complete, damaged or of another format.
        """
        path = root / COMPLETE
        if not path.is_file():
            card = load_card(root)
            done = sum(commit_path(root, unit).is_file() for unit in range(card.units))
            raise SpkdError(
                f"{root}: extraction is not finished ({done} of {card.units} units); run the same `spkd extract` again"
            )
        return parse_completion(read_bytes(path), str(path))


@dataclass(frozen=True)
class _Rest:
    rejected: dict[int, str]
    bytes: int = field(metadata={"low": 0, "high": 2**60})
    sha256: dict[str, str]


def parse_completion(data: bytes, where: str) -> CompletionRecord:
    """A completion record from its bytes.

    Args:
        data: content of the file.
        where: name of the file, for errors.
    Raises:
        SpkdError: damaged, of another format, or with names or views that its card does not have.
    """
    tree = parse_json(data, where)
    if isinstance(tree, dict) and isinstance(tree.get("card"), dict) and "spkd_cache" in tree["card"]:
        check_format(tree["card"]["spkd_cache"], where)
    if not isinstance(tree, dict) or "card" not in tree or tree.get("check") != self_digest(tree):
        raise SpkdError(f"{where}: damaged (it does not match its own digest)")
    card = Card.from_json(tree["card"], where)
    rest = record(_Rest, {name: tree[name] for name in ("rejected", "bytes", "sha256") if name in tree}, where)
    if card.units > len(rest.sha256):  # before so many names are built
        raise SpkdError(f"{where}: damaged (its files are not those of its card)")
    names = set(metadata_files(card))
    if not names - {HEAD, CODEC} <= set(rest.sha256) <= names:
        raise SpkdError(f"{where}: damaged (its files are not those of its card)")
    if any(not 0 <= view < card.num_views for view in rest.rejected):
        raise SpkdError(f"{where}: damaged (it rejects views that there are not)")
    return CompletionRecord(card, rest.rejected, rest.bytes, rest.sha256)


def load_card(root: Path) -> Card:
    """Read the card of a cache.

    Raises:
        SpkdError: no cache here, another format, or a damaged card.
    """
    path = root / CARD
    if not path.is_file():
        raise SpkdError(f"{root}: no teacher cache; make one with `spkd extract cache={root}`")
    return parse_card(read_bytes(path), str(path))


def parse_card(data: bytes | str, where: str) -> Card:
    """A card from the content of its file.

    Raises:
        SpkdError: it is damaged or of another format.
    """
    return Card.from_json(parse_json(data, where), where)


def self_digest(tree: dict[str, Any]) -> str:
    """Digest of a record without its field `check`; of the completion record, or of the index of an export."""
    return digest.of_tree({name: value for name, value in tree.items() if name != "check"})
