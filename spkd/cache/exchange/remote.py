"""Copies of caches in other places: push, pull, find.

Shards never change once committed, so they are whole objects: what is there is right, what is missing is copied. The
completion record is copied last: until then nobody takes the copy for a cache.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from spkd.cache.card import Card
from spkd.cache.exchange.remote_folder import (
    LARGEST_RECORD,
    RemoteFolder,
    checked_digest,
    in_parallel,
    patiently,
    send,
)
from spkd.cache.folder import (
    CARD,
    COMPLETE,
    PULLED,
    VERIFIED,
    CompletionRecord,
    load_card,
    metadata_files,
    parse_card,
    parse_completion,
)
from spkd.cache.lock import hold
from spkd.cache.plan import Plan
from spkd.cache.verify import ExpectedShard, expected_shards
from spkd.errors import SpkdError
from spkd.files import digest
from spkd.files.atomic import part_path, read_json, sync_folder, write_bytes, write_json
from spkd.progress import log, track

DEPTH = 3  # folders below a root in which `find` looks for caches


def push(root: Path, url: str) -> int:
    """Copy a complete cache to a place, and read back what arrived. The same call continues after an interruption.

    Returns:
        Bytes of the shards.
    Raises:
        UsageError: a place that cannot be written. SpkdError: a damaged cache, or a place that holds another one.
    """
    record = CompletionRecord.load(root)
    there = RemoteFolder.of(url).read(CARD, LARGEST_RECORD)
    if there is not None and not _same_or_less(parse_card(there, f"{url}/{CARD}"), record.card):
        raise SpkdError(f"{url}: holds another cache")
    plan = Plan.load(root, record.card)
    shards = {str(s.path.relative_to(root)): s for s in expected_shards(root, record.card, plan)}

    def expected(name: str) -> str:
        if name in record.sha256:
            return checked_digest(root / name, record.sha256[name])
        if name == VERIFIED:
            return digest.of_file(root / name)
        if (wrong := shards[name].problem()) is not None:
            raise SpkdError(f"{root / name}: {wrong}")
        return digest.of_file(root / name)

    names = [name for name in metadata_files(record.card) if name in record.sha256]
    if (root / VERIFIED).is_file():
        names.append(VERIFIED)
    send(root, url, [*names, *shards], expected, COMPLETE)
    return record.bytes


def pull(url: str, root: Path, limit: int | None = None) -> int:
    """Copy a cache from a place, checking every file on arrival. The same call continues after an interruption.

    Args:
        limit: most bytes that pulled copies may take in the folder of `root`; those used longest ago make room.
            Copies that are being read, and caches that were not pulled, are never touched.
    Returns:
        Bytes of the shards.
    Raises:
        SpkdError: no complete cache there, a damaged file, a `root` that holds something else, or no room.
    """
    place = RemoteFolder.of(url)
    data = place.read(COMPLETE, LARGEST_RECORD)
    if data is None:
        raise SpkdError(f"{url}: no complete teacher cache there ({COMPLETE} is missing)")
    record = parse_completion(data, f"{url}/{COMPLETE}")
    card = record.card
    _check_destination(root, card)
    root.mkdir(parents=True, exist_ok=True)
    write_json(root / PULLED, {"from": url, "fingerprint": card.fingerprint})
    most = (64 << 20) + 128 * card.num_views  # of a metadata file: the plan is the largest
    with contextlib.ExitStack() as held, track(f"pulling from {url}", record.bytes >> 20, "MiB") as bar:
        if (lock := hold(root)) is not None:  # no other pull evicts a copy that is coming
            held.enter_context(lock)

        def metadata(name: str) -> Callable[[], int]:
            def run() -> int:
                path, expected = root / name, record.sha256[name]
                if not (path.is_file() and digest.of_file(path) == expected):
                    found = place.read(name, most)
                    if found is None or digest.of_bytes(found) != expected:
                        raise SpkdError(f"{url}/{name}: {'missing' if found is None else 'damaged'}")
                    write_bytes(path, found)
                return 0

            return run

        in_parallel([metadata(name) for name in metadata_files(card) if name in record.sha256], bar)
        shards = list(expected_shards(root, card, Plan.load(root, card)))
        if limit is not None:
            make_room(root, sum(s.record.bytes for s in shards if not s.path.is_file()), limit)
        in_parallel([_pull_shard(place, root, shard) for shard in shards], bar)
        write_bytes(root / COMPLETE, data)
    return record.bytes


def _pull_shard(place: RemoteFolder, root: Path, shard: ExpectedShard) -> Callable[[], int]:
    def run() -> int:
        if shard.problem() is None:
            return shard.record.bytes
        name, part = str(shard.path.relative_to(root)), part_path(shard.path)
        shard.path.parent.mkdir(parents=True, exist_ok=True)

        def fetch() -> None:
            with open(part, "wb") as file:
                for block in place.blocks(name, shard.record.bytes):
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())

        try:
            patiently(fetch, f"{place.url}/{name}")
            if (wrong := shard.problem(part)) is not None:
                raise SpkdError(f"{place.url}/{name}: {wrong}")
            os.replace(part, shard.path)
        finally:
            part.unlink(missing_ok=True)
        sync_folder(shard.path.parent)
        return shard.record.bytes

    return run


def _check_destination(root: Path, card: Card) -> None:
    """A folder that is empty, or holds a part of the same cache, or the cache before it grew, pulled before."""
    if not root.is_dir() or not any(root.iterdir()):
        return
    if not (root / PULLED).is_file():
        raise SpkdError(f"{root}: is not empty and was not pulled; choose another folder")
    grown = (root / CARD).is_file() and _same_or_less(load_card(root), card)
    pulled = read_json(root / PULLED)
    if not grown and not (isinstance(pulled, dict) and pulled.get("fingerprint") == card.fingerprint):
        raise SpkdError(f"{root}: holds a copy of another cache; choose another folder, or remove it")


def _same_or_less(old: Card, new: Card) -> bool:
    """Whether one card describes the same cache as another, or what that one grew from."""
    return old.fingerprint == new.fingerprint or old.grows_to(new)


def make_room(root: Path, needed: int, limit: int) -> None:
    """Remove pulled copies beside `root`, those used longest ago first, until `needed` bytes more stay under `limit`.

    Raises:
        SpkdError: not enough can go.
    """
    copies = {p.parent: _bytes_under(p.parent) for p in root.parent.glob(f"*/{PULLED}")}
    used = sum(copies.values())
    for copy in sorted(copies, key=lambda c: (c / PULLED).stat().st_mtime):
        if used + needed <= limit:
            return
        if copy.resolve() == root.resolve() or (lock := hold(copy, alone=True)) is None:
            continue
        (copy / COMPLETE).unlink(missing_ok=True)  # first, so that nobody opens a copy that is being removed
        shutil.rmtree(copy)
        lock.close()
        used -= copies[copy]
        log(f"{copy}: removed to make room ({copies[copy] / 1e6:,.0f} MB, used longest ago)")
    if used + needed > limit:
        raise SpkdError(
            f"{root}: {needed / 1e6:,.0f} MB more would exceed the limit of {limit / 1e6:,.0f} MB "
            f"({used / 1e6:,.0f} MB are in copies that stay)"
        )


def _bytes_under(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


@dataclass(frozen=True)
class Found:
    """A cache that `find` came upon.

    Attributes:
        url: where it is.
        card: its card; None where it is damaged.
        bytes: of its shards; None where it is not complete.
        error: what is wrong with it, else None.
    """

    url: str
    card: Card | None
    bytes: int | None
    error: str | None


def find(url: str) -> Iterator[Found]:
    """Every cache below a folder or bucket, complete or not."""
    place = RemoteFolder.of(url)

    def look(here: RemoteFolder, depth: int) -> Iterator[Found]:
        shown = here.url
        try:
            card, complete = here.read(CARD, LARGEST_RECORD), here.read(COMPLETE, LARGEST_RECORD)
            if complete is not None:
                record = parse_completion(complete, f"{shown}/{COMPLETE}")
                yield Found(shown, record.card, record.bytes, None)
                return
            if card is not None:
                yield Found(shown, parse_card(card, f"{shown}/{CARD}"), None, None)
                return
        except SpkdError as error:
            yield Found(shown, None, None, str(error))
            return
        if depth == 0:
            return
        for folder in here.entries()[0]:
            yield from look(folder, depth - 1)

    yield from look(RemoteFolder(place.shown, place.files, place.path), DEPTH)


def folders_with(url: str, names: Collection[str]) -> Iterator[tuple[RemoteFolder, set[str]]]:
    """Every folder below a folder or bucket that has one of these files, with those it has; caches are not searched."""

    def look(here: RemoteFolder, depth: int) -> Iterator[tuple[RemoteFolder, set[str]]]:
        folders, files = here.entries()
        if files & {CARD, COMPLETE}:
            return
        if files & set(names):
            yield here, files & set(names)
        for folder in folders if depth else ():
            yield from look(folder, depth - 1)

    yield from look(RemoteFolder.of(url), DEPTH)
