"""Writing a cache: initialise, claim a unit, fill it in any order, commit it. Safe against kill -9 at any moment.

Rows are written where the plan puts them (pwrite into a `.part` file), so memory stays bounded whatever the unit.
A commit is: index appended, fsync, rename, fsync of the folder for every shard, then manifest/K.json the same way.
A shard without its manifest is garbage and is done again.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import google_crc32c
import numpy as np

from spkd.cache import card as cards
from spkd.cache import codebook as codebooks
from spkd.cache import codec as codecs
from spkd.cache import head as heads
from spkd.cache import plan as plans
from spkd.cache.codec import Codec
from spkd.cache.layout import (
    GROUP_METADATA,
    HEADER,
    array_metadata,
    blank,
    chunk_bytes,
    chunk_rows,
    compress,
    header_bytes,
    index_bytes,
    row_bytes,
    shard_path,
)
from spkd.cache.plan import Plan
from spkd.cache.target import Target
from spkd.errors import SpkdError
from spkd.files import create_json, read_json, sync_folder, write_bytes, write_json

COMPLETE = "COMPLETE.json"
CLAIM_STALE = 300.0  # s without a heartbeat after which a claim is taken over
AHEAD = 8  # calls that may wait for the writing thread: as many teacher batches lie in memory


def initialise(
    root: Path, card: dict[str, Any], parts: Sequence[Plan], targets: list[Target], head: bytes | None = None
) -> None:
    """Lay out a new cache (the card is written last), or check that the one there is the same, or let it grow.

    Args:
        parts: the plan of each part the card names.
    Raises:
        SpkdError: the folder holds a cache of something else, or other files.
    """
    if (root / cards.FILE).is_file():
        _same_or_grown(root, card, parts, targets)
        return
    check_folder(root, targets)
    _write_layout(root, parts, targets, 0)
    if head is not None:
        write_bytes(root / heads.FILE, head)
    if not create_json(root / cards.FILE, card):
        _same_or_grown(root, card, parts, targets)


def check_folder(root: Path, targets: list[Target]) -> None:
    """Refuse a folder that is somebody else's: without a card, and with files that no start of ours leaves."""
    ours = {"plan", "zarr.json", heads.FILE, codebooks.FILE, *(t.name for t in targets)}
    if (
        not (root / cards.FILE).is_file()
        and root.is_dir()
        and any(p.name not in ours and p.suffix != ".part" for p in root.iterdir())
    ):
        raise SpkdError(f"{root}: is not empty and holds no teacher cache; choose another folder with cache=FOLDER")


def _write_layout(root: Path, parts: Sequence[Plan], targets: list[Target], known: int) -> None:
    """Plans from part `known` on, and the arrays' descriptions."""
    for number in range(known, len(parts)):
        parts[number].save(root, number)
    write_json(root / "zarr.json", GROUP_METADATA)
    units = sum(part.units for part in parts)
    for target in targets:
        write_json(root / target.name / "zarr.json", array_metadata(target, parts[0].shard_rows(target), units))


def _same_or_grown(root: Path, card: dict[str, Any], parts: Sequence[Plan], targets: list[Target]) -> None:
    theirs = cards.load(root)
    if theirs["fingerprint"] == card["fingerprint"]:
        return
    if not cards.grows(theirs, card):
        raise SpkdError(
            f"{root}: holds a cache of {cards.difference(card, theirs)}; choose another folder with cache=FOLDER"
        )
    _write_layout(root, parts, targets, len(theirs["parts"]))
    write_json(root / cards.FILE, card)
    if (root / COMPLETE).is_file():
        # What was complete stays so, and readable, while the rest is extracted.
        record = read_json(root / COMPLETE)
        write_json(root / COMPLETE, _record(root, record["card"], record["rejected"]))


def manifest_path(root: Path, unit: int) -> Path:
    return root / "manifest" / f"{unit}.json"


def claim_units(root: Path, units: int) -> Iterator[int]:
    """Units without a manifest, each claimed for this process before it is yielded, until `release`."""
    for unit in range(units):
        if manifest_path(root, unit).is_file() or not _claim(_claim_path(root, unit)):
            continue
        if manifest_path(root, unit).is_file():
            release(root, unit)
        else:
            yield unit


def release(root: Path, unit: int) -> None:
    """Give a claim back."""
    _claim_path(root, unit).unlink(missing_ok=True)


def heartbeat(root: Path, unit: int) -> None:
    """Say that the claim's owner is alive."""
    _claim_path(root, unit).touch()


def _claim_path(root: Path, unit: int) -> Path:
    return root / "claims" / str(unit)


def _claim(path: Path) -> bool:
    # The claim appears together with its owner: one without, left by a kill in between, would hold the unit for long.
    owner = {"host": socket.gethostname(), "pid": os.getpid()}
    for _ in range(2):
        if create_json(path, owner):
            return True
        if not _dead(path):
            return False
        path.unlink(missing_ok=True)
    return False


def _dead(path: Path) -> bool:
    """Whether a claim's owner is gone: its process on this host, or its heartbeat on another."""
    try:
        owner, beat = json.loads(path.read_text()), path.stat().st_mtime
    except FileNotFoundError:
        return True
    if time.time() - beat > CLAIM_STALE:
        return True
    if owner["host"] != socket.gethostname():
        return False
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return bool(owner["pid"] == os.getpid())


class Background:
    """Runs calls in order behind the caller's back, so that the teacher never waits for the disk; commits, which wait
    for the disk, on a second thread, so that the rows of the next unit do not wait for them either. What fails there
    is raised by the next call here, or on leaving the block; `ahead` bounds the memory that waiting calls hold."""

    def __init__(self, ahead: int = AHEAD) -> None:
        self._rows, self._commits = ThreadPoolExecutor(1, "cache rows"), ThreadPoolExecutor(1, "cache commits")
        self._ahead = ahead
        self._waiting: deque[Future] = deque()
        self._committing: deque[Future] = deque()

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._waiting.append(self._rows.submit(function, *arguments))
        while self._waiting and (self._waiting[0].done() or len(self._waiting) > self._ahead):
            self._waiting.popleft().result()
        while self._committing and self._committing[0].done():
            self._committing.popleft().result()

    def commit(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Run a call after all before it, and let those after it overtake it."""
        self(lambda: self._committing.append(self._commits.submit(function, *arguments)))

    def __enter__(self) -> Background:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: TracebackType | BaseException | None) -> None:
        for pool in (self._rows, self._commits):
            pool.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            for call in (*self._waiting, *self._committing):
                call.result()


class UnitWriter:
    """Fills one claimed unit."""

    def __init__(
        self, root: Path, plan: Plan, targets: list[Target], unit: int, part: str, fitted: Mapping[str, Codec]
    ) -> None:
        """part: the key of the unit's part (see card.part_key). fitted: codecs of the targets."""
        self._root, self._plan, self._unit = root, plan, unit
        self._first = plan.unit(unit).start
        self._rejected: dict[int, str] = {}
        header = header_bytes(part, plan.part(unit)[1])
        self._shards: dict[str, _Shard] = {}
        try:
            for target in targets:
                self._shards[target.name] = _Shard(root, plan, target, unit, header, fitted[target.name])
        except BaseException:
            self.abandon()
            raise

    def put(self, name: str, rows: Sequence[int] | np.ndarray, values: np.ndarray) -> None:
        """Store what the teacher said of the views `rows`: (B, T, dim), or (B, dim) at utterance level.

        Raises:
            SpkdError: another number of rows than the target declares, or values that are not finite.
        """
        self._shards[name].put(rows, values)

    def reject(self, row: int, reason: str) -> None:
        """Leave a view out; readers never serve it."""
        self._rejected[row] = reason

    def commit(self) -> dict[int, str]:
        """Make the unit durable and release its claim. Returns the rejected views with their reasons."""
        record = {
            # Counted within the unit: a manifest stays true where a merge gives its unit another number.
            "rejected": {str(row - self._first): reason for row, reason in sorted(self._rejected.items())},
            "targets": {name: shard.finish(self._rejected) for name, shard in self._shards.items()},
            "writer": {"host": socket.gethostname(), "pid": os.getpid()},
        }
        write_json(manifest_path(self._root, self._unit), record)
        release(self._root, self._unit)
        return self._rejected

    def abandon(self) -> None:
        """Remove what was not committed, and release the claim."""
        for shard in self._shards.values():
            shard.abandon()
        release(self._root, self._unit)


class _Shard:
    """One shard being filled: rows land at their planned place in a `.part` file."""

    def __init__(self, root: Path, plan: Plan, target: Target, unit: int, header: bytes, codec: Codec) -> None:
        self._path = shard_path(root, target, unit)
        self._target, self._codec, self._first_view = target, codec, plan.unit(unit).start
        start, count = plan.unit_rows(target, unit)
        self._start, self._count = start.tolist(), count.tolist()
        self._written = np.zeros(len(start), bool)
        self._rows, self._used = plan.shard_rows(target), int(count.sum())
        self._row_bytes = row_bytes(target)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._part = self._path.with_name(f"0.{socket.gethostname()}.{os.getpid()}.part")
        self._descriptor = os.open(self._part, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        self._open, self._header = True, header

    def put(self, rows: Sequence[int] | np.ndarray, values: np.ndarray) -> None:
        target, height = self._target, 1 if values.ndim == 2 else values.shape[1]
        stored = self._codec.encode(values.reshape(-1, self._codec.dim))
        if not _finite(stored if stored.dtype.kind == "f" else values):
            raise SpkdError(
                f"target {target.name}: values that are not finite as {target.codec}; try storage.codec=float32"
            )
        for view, part in zip(np.asarray(rows) - self._first_view, np.split(stored, len(rows)), strict=True):
            if height != self._count[view]:
                raise SpkdError(
                    f"target {target.name}: the teacher gave {height} rows where it declares {self._count[view]}"
                )
            _write_all(self._descriptor, part.data.cast("B"), HEADER + self._start[view] * self._row_bytes)
            self._written[view] = True

    def finish(self, rejected: dict[int, str]) -> dict[str, Any]:
        for view in np.flatnonzero(~self._written).tolist():
            if view + self._first_view not in rejected:
                raise SpkdError(f"target {self._target.name}: view {view + self._first_view} was never written")
            self._blank(self._start[view], self._count[view])
        chunks = math.ceil(self._used / chunk_rows(self._target))
        self._blank(self._used, chunks * chunk_rows(self._target) - self._used)
        _write_all(self._descriptor, self._header, 0)
        lengths, checks = self._seal(chunks)
        size = HEADER + sum(lengths)
        index = index_bytes(self._target, self._rows, lengths)
        os.ftruncate(self._descriptor, size)
        _write_all(self._descriptor, index, size)
        os.fsync(self._descriptor)
        self._close()
        os.replace(self._part, self._path)
        sync_folder(self._path.parent)
        return {"bytes": size + len(index), "chunk_crc32c": checks, "index_crc32c": google_crc32c.value(index)}

    def _seal(self, chunks: int) -> tuple[list[int], list[int]]:
        """Length and checksum of every inner chunk as it stays in the file; compressed here where it is to be."""
        step, packs = chunk_bytes(self._target), codecs.compressed(self._target.codec)
        plain = (os.pread(self._descriptor, step, HEADER + i * step) for i in range(chunks))
        if not packs:
            return [step] * chunks, [google_crc32c.value(chunk) for chunk in plain]
        packed = [compress(chunk) for chunk in plain]
        _write_all(self._descriptor, b"".join(packed), HEADER)
        return [len(chunk) for chunk in packed], [google_crc32c.value(chunk) for chunk in packed]

    def _blank(self, row: int, count: int) -> None:
        _write_all(self._descriptor, blank(self._target, count), HEADER + row * self._row_bytes)

    def abandon(self) -> None:
        if self._open:
            self._close()
            self._part.unlink(missing_ok=True)

    def _close(self) -> None:
        os.close(self._descriptor)
        self._open = False


def _finite(values: np.ndarray) -> bool:
    if values.dtype != np.float16:
        return bool(np.isfinite(values).all())
    return not values.size or bool((values.view(np.uint16) & 0x7FFF).max() < 0x7C00)  # numpy's own is 9 times slower


def _write_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def finalize(root: Path, card: dict[str, Any], plan: Plan) -> bool:
    """Write the completion record once every unit is committed. Returns whether the cache is complete.

    The record holds the card, the digest of every small file (plans, array metadata, unit manifests), and the unit
    manifests hold checksums of the shards: from it, any flipped bit can be found. Readers go by it alone, so a cache
    that grows changes for them in one rename.
    """
    if (root / COMPLETE).is_file() and len(read_json(root / COMPLETE)["card"]["parts"]) >= len(card["parts"]):
        return True
    if not all(manifest_path(root, unit).is_file() for unit in range(plan.units)):
        return False
    for left in root.glob("*/**/*.part"):  # of workers that were killed
        left.unlink(missing_ok=True)
    rejected: dict[str, str] = {}
    for unit in range(plan.units):
        first = plan.unit(unit).start
        found = read_json(manifest_path(root, unit))["rejected"]
        rejected |= {str(first + int(view)): reason for view, reason in found.items()}
    write_json(root / COMPLETE, _record(root, card, rejected))
    return True


def _record(root: Path, card: dict[str, Any], rejected: dict[str, str]) -> dict[str, Any]:
    small = {name: (root / name).read_bytes() for name in small_files(card) if (root / name).is_file()}
    manifests = [json.loads(small[str(manifest_path(Path(), unit))]) for unit in range(units_of(card))]
    record = {
        "card": card,
        "rejected": rejected,
        "bytes": sum(shard["bytes"] for unit in manifests for shard in unit["targets"].values()),
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in small.items()},
    }
    return record | {"check": record_check(record)}


def units_of(card: dict[str, Any]) -> int:
    """Units of all parts."""
    return sum(part["units"] for part in card["parts"])


def small_files(card: dict[str, Any]) -> list[str]:
    """Every file of a cache but the shards and the completion record; head and codebook need not be there."""
    names = [cards.FILE, heads.FILE, codebooks.FILE, "zarr.json"]
    names += [f"{target['name']}/zarr.json" for target in card["targets"]]
    names += [str(plans.file(part)) for part in range(len(card["parts"]))]
    return names + [str(manifest_path(Path(), unit)) for unit in range(units_of(card))]


def record_check(record: dict[str, Any]) -> str:
    """Digest of a record itself (without its `check`): the completion record, or the index of an export."""
    content = {k: v for k, v in record.items() if k != "check"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
