"""Caches in other places: push, pull, list. Places are fsspec URLs (s3://, file://, memory:// ..., http:// to read).

Shards never change once committed, so they are whole objects: what is there is right, what is missing is brought.
The completion record is brought last: until then nobody takes the copy for a cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from spkd.cache import card as cards
from spkd.cache.layout import header_bytes, shard_path
from spkd.cache.plan import Plan
from spkd.cache.read import PULLED, parse_record, read_record, shard_problem, use
from spkd.cache.target import Target
from spkd.cache.write import COMPLETE, manifest_path, small_files, units_of
from spkd.errors import SpkdError, UsageError
from spkd.files import read_json, write_bytes, write_json
from spkd.progress import Ticker, say, track

PARALLEL = 8
TRIES = 3
DEPTH = 3  # folders below a root in which `find` looks for caches
BLOCK = 1 << 22  # bytes


@dataclass(frozen=True)
class Place:
    """A folder somewhere."""

    url: str
    files: fsspec.AbstractFileSystem
    path: str

    @classmethod
    def of(cls, url: str) -> Place:
        """Raises UsageError where the package for this kind of place is not installed."""
        try:
            files, path = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise UsageError(f'{url}: {error}; pip install "spkd[remote]" brings s3:// and http://') from error
        return cls(url, files, path.rstrip("/"))

    def at(self, name: str) -> str:
        return f"{self.path}/{name}"

    def read(self, name: str) -> bytes | None:
        """A small file; None where there is none. Raises SpkdError where the place does not answer."""

        def once() -> bytes | None:
            try:
                return self.files.cat_file(self.at(name))
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                return None

        return patiently(once, f"{self.url}/{name}")


def patiently(call: Callable[[], Any], what: str) -> Any:
    """Call, and again after a pause where the network failed. Raises SpkdError, naming `what`, in the end."""
    for turn in range(TRIES):
        try:
            return call()
        except SpkdError:
            raise
        except Exception as error:  # every file system has errors of its own
            if isinstance(error, FileNotFoundError | PermissionError) or turn == TRIES - 1:
                text = " ".join(str(error).split()) or type(error).__name__
                raise SpkdError(f"{what}: {text[:200]}") from error
            time.sleep(0.5 * 4**turn)
    return None


def push(root: Path, url: str) -> int:
    """Copy a complete cache to a place, and read back what arrived. The same call continues after an interruption.

    Returns:
        Bytes of the shards.
    Raises:
        UsageError: a place that cannot be written. SpkdError: a damaged cache, or a place that holds another one.
    """
    record = read_record(root)
    card, digests = record["card"], record["sha256"]
    there = Place.of(url).read(cards.FILE)
    if there is not None and not _same_or_less(cards.check(json.loads(there), f"{url}/{cards.FILE}"), card):
        raise SpkdError(f"{url}: holds another cache")
    problems = {path: problem for path, _, problem in shards(root, card, Plan.load(root, len(card["parts"])))}

    def digest(name: str) -> str:
        if name in digests:
            return digest_as_told(root / name, digests[name])
        if (wrong := problems[root / name](root / name)) is not None:
            raise SpkdError(f"{root / name}: {wrong}")
        return _digest(_local_blocks(root / name))

    names = [name for name in small_files(card) if name in digests]
    send(root, url, [*names, *(str(path.relative_to(root)) for path in problems)], digest, COMPLETE)
    return int(record["bytes"])


def send(root: Path, url: str, names: Sequence[str], digest: Callable[[str], str], last: str) -> None:
    """Copy files of a folder to a place, those that are not there already, and read back every one.

    Args:
        digest: the SHA-256 of a file here, once it was found to be what it ought to be. last: the file that makes the
            copy whole, sent behind the others.
    Raises:
        UsageError: a place that cannot be written. SpkdError: a file here that is not what it ought to be.
    """
    place = Place.of(url)
    if "http" in str(place.files.protocol):
        raise UsageError(f"{url}: http can be pulled from, not pushed to")

    def one(name: str, expected: str) -> None:
        remote = place.at(name)
        if _size(place, remote) == (root / name).stat().st_size and _digest(_blocks(place, remote)) == expected:
            return
        place.files.makedirs(remote.rsplit("/", 1)[0], exist_ok=True)
        part = f"{remote}.part" if "file" in place.files.protocol else remote  # objects appear whole
        place.files.put_file(str(root / name), part)
        if _digest(_blocks(place, part)) != expected:
            raise OSError("arrived damaged")
        if part != remote:
            place.files.mv(part, remote)

    def job(name: str) -> Callable[[], int]:
        def run() -> int:
            expected = digest(name)
            patiently(lambda: one(name, expected), f"{url}/{name}")
            return (root / name).stat().st_size

        return run

    total = sum((root / name).stat().st_size for name in names if (root / name).is_file())
    with track(f"pushing to {url}", total >> 20, "MiB") as bar:
        in_parallel([job(name) for name in names], bar)
    patiently(lambda: one(last, _digest(_local_blocks(root / last))), f"{url}/{last}")


def digest_as_told(path: Path, expected: str) -> str:
    """`expected`, if it is the file's SHA-256. Raises SpkdError otherwise."""
    if _digest(_local_blocks(path)) != expected:
        raise SpkdError(f"{path}: damaged (its digest is another)")
    return expected


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
    place = Place.of(url)
    data = place.read(COMPLETE)
    if data is None:
        raise SpkdError(f"{url}: no complete teacher cache there ({COMPLETE} is missing)")
    record = parse_record(data, f"{url}/{COMPLETE}")
    card = record["card"]
    _check_destination(root, card)
    root.mkdir(parents=True, exist_ok=True)
    write_json(root / PULLED, {"from": url, "fingerprint": card["fingerprint"]})
    with contextlib.ExitStack() as held, track(f"pulling from {url}", record["bytes"] >> 20, "MiB") as bar:
        if (lock := use(root)) is not None:  # no other pull evicts a copy that is coming
            held.enter_context(lock)

        def small(name: str) -> Callable[[], int]:
            def run() -> int:
                path, digest = root / name, record["sha256"][name]
                if not (path.is_file() and _digest([path.read_bytes()]) == digest):
                    found = place.read(name)
                    if found is None or _digest([found]) != digest:
                        raise SpkdError(f"{url}/{name}: {'missing' if found is None else 'damaged'}")
                    write_bytes(path, found)
                return 0

            return run

        def shard(path: Path, problem: Callable[[Path], str | None]) -> Callable[[], int]:
            def run() -> int:
                name, part = str(path.relative_to(root)), path.with_name("0.part")
                if not (path.is_file() and problem(path) is None):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    patiently(lambda: place.files.get_file(place.at(name), str(part)), f"{url}/{name}")
                    if (wrong := problem(part)) is not None:
                        part.unlink()
                        raise SpkdError(f"{url}/{name}: {wrong}")
                    with open(part, "rb") as file:
                        os.fsync(file.fileno())
                    os.replace(part, path)
                return path.stat().st_size

            return run

        in_parallel([small(name) for name in small_files(card) if name in record["sha256"]], bar)
        plan = Plan.load(root, len(card["parts"]))
        listed = list(shards(root, card, plan))
        if limit is not None:
            make_room(root, sum(size for path, size, _ in listed if not path.is_file()), limit)
        in_parallel([shard(path, problem) for path, _, problem in listed], bar)
        write_bytes(root / COMPLETE, data)
    return int(record["bytes"])


def _check_destination(root: Path, card: dict[str, Any]) -> None:
    """A folder that is empty, or holds a part of the same cache, or the cache before it grew, pulled before."""
    if not root.is_dir() or not any(root.iterdir()):
        return
    if not (root / PULLED).is_file():
        raise SpkdError(f"{root}: is not empty and was not pulled; choose another folder")
    grown = (root / cards.FILE).is_file() and _same_or_less(cards.load(root), card)
    if not grown and read_json(root / PULLED).get("fingerprint") != card["fingerprint"]:
        raise SpkdError(f"{root}: holds a copy of another cache; choose another folder, or remove it")


def _same_or_less(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether one card describes the same cache as another, or what that one grew from."""
    return old["fingerprint"] == new["fingerprint"] or cards.grows(old, new)


def shards(root: Path, card: dict[str, Any], plan: Plan) -> Iterator[tuple[Path, int, Callable[[Path], str | None]]]:
    """Every shard of a cache whose small files are there, its bytes, and what tells its faults."""
    targets = [Target.from_card(target) for target in card["targets"]]
    keys = [cards.part_key(card, part) for part in range(len(card["parts"]))]
    for unit in range(units_of(card)):
        part, number = plan.part(unit)
        header, expected = header_bytes(keys[part], number), read_json(manifest_path(root, unit))["targets"]
        for target in targets:

            def problem(
                path: Path, target: Target = target, header: bytes = header, shard: dict = expected[target.name]
            ) -> str | None:
                return shard_problem(path, target, plan, header, shard)

            yield shard_path(root, target, unit), int(expected[target.name]["bytes"]), problem


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
        if copy.resolve() == root.resolve() or (held := use(copy, alone=True)) is None:
            continue
        (copy / COMPLETE).unlink(missing_ok=True)  # first, so that nobody opens a copy that is going
        shutil.rmtree(copy)
        held.close()
        used -= copies[copy]
        say(f"{copy}: removed to make room ({copies[copy] / 1e6:,.0f} MB, used longest ago)")
    if used + needed > limit:
        raise SpkdError(
            f"{root}: {needed / 1e6:,.0f} MB more would exceed the limit of {limit / 1e6:,.0f} MB "
            f"({used / 1e6:,.0f} MB are in copies that stay)"
        )


def _bytes_under(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def find(url: str) -> Iterator[dict[str, Any]]:
    """Every cache below a folder or bucket, complete or not: its `url`, its `card` and its `record` (None where it is
    not complete)."""
    place = Place.of(url)

    def look(folder: str, depth: int) -> Iterator[dict[str, Any]]:
        shown = folder if "file" in place.files.protocol else place.files.unstrip_protocol(folder)
        here = Place(shown, place.files, folder)
        card, complete = here.read(cards.FILE), here.read(COMPLETE)
        if card is not None or complete is not None:
            try:
                record = None if complete is None else parse_record(complete, f"{shown}/{COMPLETE}")
                found = record["card"] if record else cards.check(json.loads(card or b""), f"{shown}/{cards.FILE}")
            except (SpkdError, ValueError) as error:
                yield {"url": shown, "error": str(error)}
                return
            yield {"url": shown, "card": found, "record": record}
            return
        if depth == 0:
            return
        for entry in sorted(patiently(lambda: place.files.ls(folder, detail=True), folder), key=lambda e: e["name"]):
            name = entry["name"].rstrip("/")
            if entry["type"] == "directory" and name != folder.rstrip("/") and len(name) > len(folder):
                yield from look(name, depth - 1)

    yield from look(place.path, DEPTH)


def in_parallel(jobs: Iterable[Callable[[], int]], bar: Ticker) -> None:
    """Run jobs side by side, the bar advancing by the bytes they return; the first failure ends all."""
    pool, total, shown = ThreadPoolExecutor(PARALLEL), 0, 0
    try:
        for job in as_completed([pool.submit(job) for job in jobs]):
            total += job.result()
            bar.advance((total >> 20) - shown)
            shown = total >> 20
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _size(place: Place, path: str) -> int | None:
    try:
        return int(place.files.info(path)["size"])
    except FileNotFoundError:
        return None


def _blocks(place: Place, path: str) -> Iterator[bytes]:
    with place.files.open(path, "rb", cache_type="none") as file:
        while block := file.read(BLOCK):
            yield block


def _local_blocks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            yield block


def _digest(blocks: Iterable[bytes]) -> str:
    state = hashlib.sha256()
    for block in blocks:
        state.update(block)
    return state.hexdigest()
