"""Remote copies of caches: push, pull, find.

A shard never changes once it is committed: a shard with the right checksums is kept, a missing one is copied. The
completion record is copied last, so that an incomplete copy is never taken for a cache.
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
    """Copy a complete cache to a place, and read the copy back. The same call continues after an interruption.

    Args:
        root: folder of the cache.
        url: folder or URL of the copy.
    Returns:
        Bytes of the shards.
    Raises:
        UsageError: the place cannot be written.
        SpkdError: the cache is damaged, or the place holds another cache.
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
    """Copy a cache from a place, and check every file on arrival. The same call continues after an interruption.

    Args:
        url: folder or URL of the cache.
        root: folder of the copy.
        limit: most bytes that pulled copies may take in the parent folder of `root`. Copies that were not used for the
            longest time are removed to make room. Copies that are being read, and caches that were not pulled, are
            never removed. None sets no limit.
    Returns:
        Bytes of the shards.
    Raises:
        SpkdError: no complete cache there, a damaged file, another content of `root`, or no room.
    """
    # Read the completion record, and make the folder.
    place = RemoteFolder.of(url)
    data = place.read(COMPLETE, LARGEST_RECORD)
    if data is None:
        raise SpkdError(f"{url}: no complete teacher cache there ({COMPLETE} is missing)")
    record = parse_completion(data, f"{url}/{COMPLETE}")
    card = record.card
    _check_destination(root, card)
    root.mkdir(parents=True, exist_ok=True)
    write_json(root / PULLED, {"from": url, "fingerprint": card.fingerprint})
    most = (64 << 20) + 128 * card.num_views  # bytes of a metadata file, of which the plan is the largest
    with contextlib.ExitStack() as locks, track(f"pulling from {url}", record.bytes >> 20, "MiB") as bar:
        if (lock := hold(root)) is not None:  # so that no other pull evicts this copy
            locks.enter_context(lock)

        def metadata(name: str) -> Callable[[], int]:
            def run() -> int:
                path, expected = root / name, record.sha256[name]
                if not (path.is_file() and digest.of_file(path) == expected):
                    content = place.read(name, most)
                    if content is None or digest.of_bytes(content) != expected:
                        raise SpkdError(f"{url}/{name}: {'missing' if content is None else 'damaged'}")
                    write_bytes(path, content)
                return 0

            return run

        # Copy the metadata files, then the shards, then the completion record.
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
    """Check that a folder is empty, or holds an earlier copy of the cache: an incomplete one, or one before it grew.

    Raises:
        SpkdError: it holds something else.
    """
    if not root.is_dir() or not any(root.iterdir()):
        return
    if not (root / PULLED).is_file():
        raise SpkdError(f"{root}: is not empty and was not pulled; choose another folder")
    grown = (root / CARD).is_file() and _same_or_less(load_card(root), card)
    pulled = read_json(root / PULLED)
    if not grown and not (isinstance(pulled, dict) and pulled.get("fingerprint") == card.fingerprint):
        raise SpkdError(f"{root}: holds a copy of another cache; choose another folder, or remove it")


def _same_or_less(old: Card, new: Card) -> bool:
    """Whether the old card describes the same cache as the new one, or that cache before it grew."""
    return old.fingerprint == new.fingerprint or old.grows_to(new)


def make_room(root: Path, needed: int, limit: int) -> None:
    """Remove pulled copies next to `root`, those used longest ago first, until there is room.

    Args:
        root: folder of the copy that needs the room; it is not removed.
        needed: further bytes that it will take.
        limit: most bytes that all pulled copies may take.
    Raises:
        SpkdError: not enough can be removed.
    """
    copies = {p.parent: _bytes_under(p.parent) for p in root.parent.glob(f"*/{PULLED}")}
    used = sum(copies.values())
    for copy in sorted(copies, key=lambda c: (c / PULLED).stat().st_mtime):
        if used + needed <= limit:
            return
        if copy.resolve() == root.resolve() or (lock := hold(copy, alone=True)) is None:
            continue
        (copy / COMPLETE).unlink(missing_ok=True)  # first, so that no process opens a copy that is being removed
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
class ListedCache:
    """A cache that `find` lists.

    Attributes:
        url: folder or URL of the cache.
        card: its card; None where it is damaged.
        bytes: size of its shards; None where it is not complete.
        error: the reason why it cannot be read; None where it can.
    """

    url: str
    card: Card | None
    bytes: int | None
    error: str | None


def find(url: str) -> Iterator[ListedCache]:
    """Every cache below a folder or bucket, complete or not."""
    place = RemoteFolder.of(url)

    def look(here: RemoteFolder, depth: int) -> Iterator[ListedCache]:
        shown = here.url
        try:
            card, complete = here.read(CARD, LARGEST_RECORD), here.read(COMPLETE, LARGEST_RECORD)
            if complete is not None:
                record = parse_completion(complete, f"{shown}/{COMPLETE}")
                yield ListedCache(shown, record.card, record.bytes, None)
                return
            if card is not None:
                yield ListedCache(shown, parse_card(card, f"{shown}/{CARD}"), None, None)
                return
        except SpkdError as error:
            yield ListedCache(shown, None, None, str(error))
            return
        if depth == 0:
            return
        for folder in here.entries()[0]:
            yield from look(folder, depth - 1)

    yield from look(RemoteFolder(place.shown, place.files, place.path), DEPTH)


def folders_with(url: str, names: Collection[str]) -> Iterator[tuple[RemoteFolder, set[str]]]:
    """Every folder below a folder or bucket that holds some of the named files. Caches are not searched.

    Args:
        url: the folder or bucket.
        names: names of the files.
    Yields:
        The folder, and the names of those files that it holds.
    """

    def look(here: RemoteFolder, depth: int) -> Iterator[tuple[RemoteFolder, set[str]]]:
        folders, files = here.entries()
        if files & {CARD, COMPLETE}:
            return
        if files & set(names):
            yield here, files & set(names)
        for folder in folders if depth else ():
            yield from look(folder, depth - 1)

    yield from look(RemoteFolder.of(url), DEPTH)
