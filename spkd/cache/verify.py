"""Verification of a cache by its checksums, which find every flipped bit."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import google_crc32c
import numpy as np

from spkd.cache.card import Card
from spkd.cache.folder import (
    CARD,
    VERIFIED,
    CommitRecord,
    CompletionRecord,
    ShardRecord,
    array_path,
    load_card,
    shard_path,
)
from spkd.cache.layout import array_metadata, chunk_lengths, chunk_rows, header_bytes, index_length, shard_rows
from spkd.cache.plan import Plan
from spkd.cache.read import Cache
from spkd.errors import SpkdError
from spkd.files import digest
from spkd.files.atomic import read_json, write_json
from spkd.outputs.target import EMBEDDING, Target
from spkd.version import __version__


class ExpectedShard(NamedTuple):
    """A shard of a cache, with the content that it must have.

    Attributes:
        path: the file.
        unit: number of the unit whose views it holds.
        target: the target whose rows it holds.
        rows: rows of the array that one shard takes.
        header: the header that it must have.
        record: size and checksums at its commit.
    """

    path: Path
    unit: int
    target: Target
    rows: int
    header: bytes
    record: ShardRecord

    def problem(self, path: Path | None = None) -> str | None:
        """Phrase that says what is wrong with the shard, or with a copy at `path`; None where nothing is."""
        path = path or self.path
        if not path.is_file():
            return "missing"
        size = path.stat().st_size
        if size != self.record.bytes:
            return f"{size} bytes instead of {self.record.bytes}"
        length = index_length(self.target, self.rows)
        with open(path, "rb") as file:
            if file.read(len(self.header)) != self.header:
                return "of another cache or unit, or changed in its header"
            file.seek(max(size - length, 0))
            index = file.read()
            if google_crc32c.value(index) != self.record.index_crc32c:
                return "changed in its index"
            file.seek(len(self.header))
            lengths = chunk_lengths(index)
            if len(lengths) != len(self.record.chunk_crc32c) or len(self.header) + sum(lengths) != size - length:
                return "its index does not match its size"
            for i, (count, check) in enumerate(zip(lengths, self.record.chunk_crc32c, strict=True)):
                if google_crc32c.value(file.read(count)) != check:
                    rows = chunk_rows(self.target)
                    return f"changed in rows {i * rows} to {(i + 1) * rows - 1}"
        return None


def expected_shards(root: Path, card: Card, plan: Plan) -> Iterator[ExpectedShard]:
    """Every shard of a cache.

    Args:
        root: folder of its metadata files.
        card: its card.
        plan: its plan.
    Raises:
        SpkdError: a damaged commit record.
    """
    keys = [card.part_key(part) for part in range(len(card.parts))]
    for unit in range(card.units):
        part, number = plan.part(unit)
        header, commit = header_bytes(keys[part], number), CommitRecord.load(root, card, unit)
        for target in card.targets:
            path, rows = shard_path(root, target, unit), plan.shard_rows(target)
            yield ExpectedShard(path, unit, target, rows, header, commit.targets[target.name])


def metadata_problems(root: Path, record: CompletionRecord) -> list[str]:
    """One line for each metadata file that is missing or changed."""
    grown = _card_that_grows(root, record.card)
    return [
        f"{root / name}: missing or changed"
        for name, expected in record.sha256.items()
        if not (root / name).is_file()
        or (digest.of_file(root / name) != expected and not (grown and _describes(root, name, record.card, grown)))
    ]


def _card_that_grows(root: Path, card: Card) -> Card | None:
    """The card in a folder, where `card` is that of its completion record and the folder's card has further parts.

    A growth that was interrupted before it wrote the completion record leaves such a card.
    """
    try:
        present = load_card(root)
    except SpkdError:
        return None
    return present if card.grows_to(present) else None


def _describes(root: Path, name: str, *cards: Card) -> bool:
    """Whether a file that a growth replaces is the card, or the description of an array before or after the growth."""
    arrays = {str(array_path(target)): target for target in cards[0].targets}
    if name == CARD:
        return True  # checked when it was loaded
    if name not in arrays:
        return False
    target = arrays[name]
    rows = shard_rows(target, cards[0].unit_views, cards[0].unit_seconds)
    return read_json(root / name) in [array_metadata(target, rows, card.units) for card in cards]


def verify(root: str | Path) -> list[str]:
    """Read all files of a cache and compare them with the recorded checksums.

    Args:
        root: folder of the cache.
    Returns:
        One line for each damaged file.
    Raises:
        SpkdError: no complete cache there, or a damaged completion record.
    """
    root = Path(root)
    record = CompletionRecord.load(root)
    if damaged := metadata_problems(root, record):
        return damaged
    try:
        cache = Cache.open(root)
        return [line for shard in expected_shards(root, record.card, cache.plan) if (line := _line(cache, shard))]
    except SpkdError as error:
        return [str(error)]


def note_verified(root: str | Path) -> None:
    """Record in the cache's folder, if it can be written, that everything was intact at this time."""
    fingerprint = load_card(Path(root)).fingerprint
    with contextlib.suppress(OSError):
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        write_json(Path(root) / VERIFIED, {"at": now, "fingerprint": fingerprint, "version": __version__})


def _line(cache: Cache, shard: ExpectedShard) -> str | None:
    """Line that says what is wrong with a shard; None where nothing is.

    Values are checked right after the checksums, while they are in memory.
    """
    problem = shard.problem() or _odd_values(cache, shard)
    return f"{shard.path}: {problem}" if problem else None


def _odd_values(cache: Cache, shard: ExpectedShard) -> str | None:
    """Phrase that names values of usable views that no teacher gives: not finite, or an embedding of zeros.

    A cache that another program wrote may hold such values and still match its checksums.
    """
    views = np.array(cache.plan.unit(shard.unit))
    stored = cache.ragged(views[cache.is_usable[views]], shard.target.name).values
    values = cache.codebook.codecs[shard.target.name].decode(stored)
    if not bool(values.isfinite().all()):
        return "values that are not finite"
    if shard.target.name == EMBEDDING and len(values) and not bool(values.any(-1).all()):
        return "embeddings of zeros"
    return None
