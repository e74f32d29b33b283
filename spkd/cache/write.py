"""Writing a cache: initialise, fill a claimed unit in any order, commit it. Safe against kill -9 at any moment.

Rows are written where the plan puts them (pwrite into a file of this worker alone), so memory stays bounded whatever
the unit. A commit is: index appended, fsync, rename, fsync of the folder for every shard, then commits/K.json by the
same steps. A shard without its commit record is garbage and is written again.
"""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

import google_crc32c
import numpy as np

from spkd.cache import claims
from spkd.cache.card import Card
from spkd.cache.codec import Codec, compressed
from spkd.cache.folder import (
    CARD,
    CODEC,
    COMPLETE,
    GROUP,
    HEAD,
    CommitRecord,
    CompletionRecord,
    ShardRecord,
    array_path,
    commit_path,
    load_card,
    metadata_files,
    shard_path,
)
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
)
from spkd.cache.plan import Plan
from spkd.errors import SpkdError
from spkd.files import digest
from spkd.files.atomic import (
    PART,
    create_json,
    part_path,
    read_bytes,
    read_json,
    sync_folder,
    worker_id,
    write_bytes,
    write_json,
)
from spkd.outputs.target import Target


def initialise(root: Path, card: Card, parts: Sequence[Plan], head: bytes | None = None) -> None:
    """Lay out a new cache (the card is written last), or check that the one there is the same, or let it grow.

    Args:
        parts: the plan of each part the card names.
        head: the matrices of the teacher's classifier, where they are kept.
    Raises:
        SpkdError: the folder holds a cache of something else, or other files.
    """
    if (root / CARD).is_file():
        _same_or_grown(root, card, parts)
        return
    check_folder(root, card.targets)
    _write_layout(root, card, parts, 0)
    if head is not None:
        write_bytes(root / HEAD, head)
    if not create_json(root / CARD, card.to_json()):
        _same_or_grown(root, card, parts)


def check_folder(root: Path, targets: Sequence[Target]) -> None:
    """Refuse a folder that is somebody else's: without a card, and with files that no start of ours leaves."""
    ours = {"plan", GROUP, HEAD, CODEC, *(t.name for t in targets)}
    if (
        not (root / CARD).is_file()
        and root.is_dir()
        and any(p.name not in ours and p.suffix != PART for p in root.iterdir())
    ):
        raise SpkdError(f"{root}: is not empty and holds no teacher cache; choose another folder with cache=FOLDER")


def _write_layout(root: Path, card: Card, parts: Sequence[Plan], known: int) -> None:
    """Plans from part `known` on, and the arrays' descriptions."""
    for number in range(known, len(parts)):
        parts[number].save(root, number)
    write_json(root / GROUP, GROUP_METADATA)
    for target in card.targets:
        write_json(root / array_path(target), array_metadata(target, parts[0].shard_rows(target), card.units))


def _same_or_grown(root: Path, card: Card, parts: Sequence[Plan]) -> None:
    theirs = load_card(root)
    if theirs.fingerprint == card.fingerprint:
        if (root / COMPLETE).is_file():
            _cover_growth(root)  # a kill between card and record of a growth left them apart
        return
    if not theirs.grows_to(card):
        raise SpkdError(f"{root}: holds a cache of {card.difference(theirs)}; choose another folder with cache=FOLDER")
    _write_layout(root, card, parts, len(theirs.parts))
    write_json(root / CARD, card.to_json())
    if (root / COMPLETE).is_file():
        _cover_growth(root)


def _cover_growth(root: Path) -> None:
    """What was complete stays so, and readable, while the rest is extracted: its record takes up the changed files."""
    before = CompletionRecord.load(root)
    after = _record(root, before.card, before.rejected)
    if after != before:
        write_json(root / COMPLETE, after.to_json())


class UnitWriter:
    """Fills one claimed unit."""

    def __init__(self, root: Path, card: Card, plan: Plan, unit: int, fitted: Mapping[str, Codec]) -> None:
        """fitted: codecs of the targets."""
        self._root, self._plan, self._unit = root, plan, unit
        self._first = plan.unit(unit).start
        self._rejected: dict[int, str] = {}
        part, number = plan.part(unit)
        header = header_bytes(card.part_key(part), number)
        self._shards: dict[str, _Shard] = {}
        try:
            for target in card.targets:
                self._shards[target.name] = _Shard(root, plan, target, unit, header, fitted[target.name])
        except BaseException:
            self.abandon()
            raise

    def put(self, name: str, views: Sequence[int] | np.ndarray, values: np.ndarray) -> None:
        """Store a target of `views`: (B, T, dim), or (B, dim) at utterance level. T are the frames of the longest view;
        what is beyond a shorter one's is left out.

        Raises:
            SpkdError: another number of frames than the target declares, or values that are not finite.
        """
        self._shards[name].put(views, values)

    def reject(self, view: int, reason: str) -> None:
        """Leave a view out; readers never serve it."""
        self._rejected[view] = reason

    def commit(self) -> dict[int, str] | None:
        """Make the unit durable and release its claim.

        Returns:
            The rejected views with their reasons; None where another worker took the unit over meanwhile (this one was
            stopped for longer than a claim lives): then nothing is touched.
        """
        sealed = {name: shard.seal(self._rejected) for name, shard in self._shards.items()}
        with claims.committing(self._root, self._unit) as mine:
            if mine and not commit_path(self._root, self._unit).is_file():
                for shard in self._shards.values():
                    shard.publish()
                record = CommitRecord(
                    {view - self._first: reason for view, reason in self._rejected.items()},
                    sealed,
                    {"host": socket.gethostname(), "worker": worker_id()},
                )
                write_json(commit_path(self._root, self._unit), record.to_json())
        if not mine:
            self.abandon()
            return None
        claims.release(self._root, self._unit)
        return self._rejected

    def abandon(self) -> None:
        """Remove what was not committed, and release the claim."""
        for shard in self._shards.values():
            shard.abandon()
        claims.release(self._root, self._unit)


class _Shard:
    """One shard being filled: rows are put at their planned place in a file of this worker."""

    def __init__(self, root: Path, plan: Plan, target: Target, unit: int, header: bytes, codec: Codec) -> None:
        self._path = shard_path(root, target, unit)
        self._target, self._codec, self._first_view = target, codec, plan.unit(unit).start
        start, count = plan.unit_places(target, unit)
        self._start, self._count = start.tolist(), count.tolist()
        self._checks: list[int | None] = [None] * len(start)  # of each view's rows as they were put
        self._rows, self._used = plan.shard_rows(target), int(count.sum())
        self._row_bytes = row_bytes(target)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._part = part_path(self._path)
        self._part.unlink(missing_ok=True)  # of this very worker, whose last try failed
        self._descriptor = os.open(self._part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self._open, self._header = True, header

    def put(self, views: Sequence[int] | np.ndarray, values: np.ndarray) -> None:
        target, height = self._target, 1 if values.ndim == 2 else values.shape[1]
        numbers = (np.asarray(views) - self._first_view).tolist()
        counts = [self._count[view] for view in numbers]
        if max(counts) != height:
            raise SpkdError(f"target {target.name}: the teacher gave {height} frames where it declares {max(counts)}")
        if min(counts) < height:
            values = np.concatenate([own[:count] for own, count in zip(values, counts, strict=True)])
        stored = self._codec.encode(values.reshape(-1, self._codec.dim))
        if not _finite(stored if stored.dtype.kind == "f" else values):
            raise SpkdError(
                f"target {target.name}: values that are not finite as {target.codec}; try storage.codec=float32"
            )
        for view, part in zip(numbers, np.split(stored, np.cumsum(counts)[:-1]), strict=True):
            data = part.tobytes()
            _write_all(self._descriptor, data, HEADER + self._start[view] * self._row_bytes)
            self._checks[view] = google_crc32c.value(data)

    def seal(self, rejected: Mapping[int, str]) -> ShardRecord:
        """Finish the file, durably, under its temporary name.

        Raises:
            SpkdError: a view was never put, or its rows in the file are not those that were.
        """
        for view, check in enumerate(self._checks):
            if view + self._first_view in rejected:
                self._blank(self._start[view], self._count[view])
                continue
            if check is None:
                raise SpkdError(f"target {self._target.name}: view {view + self._first_view} was never written")
            size, at = self._count[view] * self._row_bytes, HEADER + self._start[view] * self._row_bytes
            if google_crc32c.value(os.pread(self._descriptor, size, at)) != check:
                raise SpkdError(f"{self._part}: the rows of view {view + self._first_view} are not those written")
        chunks = math.ceil(self._used / chunk_rows(self._target))
        self._blank(self._used, chunks * chunk_rows(self._target) - self._used)
        _write_all(self._descriptor, self._header, 0)
        lengths, checks = self._chunks(chunks)
        size = HEADER + sum(lengths)
        index = index_bytes(self._target, self._rows, lengths)
        os.ftruncate(self._descriptor, size)
        _write_all(self._descriptor, index, size)
        os.fsync(self._descriptor)
        self._close()
        return ShardRecord(size + len(index), tuple(checks), google_crc32c.value(index))

    def publish(self) -> None:
        """Give the sealed file its own name."""
        os.replace(self._part, self._path)
        sync_folder(self._path.parent)

    def _chunks(self, chunks: int) -> tuple[list[int], list[int]]:
        """Length and checksum of every inner chunk as it stays in the file; compressed here where it is to be."""
        step = chunk_bytes(self._target)
        plain = (os.pread(self._descriptor, step, HEADER + i * step) for i in range(chunks))
        if not compressed(self._target.codec):
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


def finalize(root: Path, card: Card, plan: Plan) -> bool:
    """Write the completion record once every unit is committed. Returns whether the cache is complete.

    The record holds the card, the digest of every metadata file (plans, array descriptions, commit records), and the
    commit records hold checksums of the shards: from it, any flipped bit can be found. Readers go by it alone, so a
    cache that grows changes for them in one rename.
    """
    if (root / COMPLETE).is_file() and len(CompletionRecord.load(root).card.parts) >= len(card.parts):
        return True
    if not all(commit_path(root, unit).is_file() for unit in range(plan.units)):
        return False
    rejected: dict[int, str] = {}
    for unit in range(plan.units):
        first = plan.unit(unit).start
        rejected |= {first + view: reason for view, reason in CommitRecord.load(root, card, unit).rejected.items()}
    write_json(root / COMPLETE, _record(root, card, rejected).to_json())
    for left in root.glob(f"*/**/*{PART}"):  # of workers that were killed; what one is still writing is not needed
        left.unlink(missing_ok=True)
    return True


def _record(root: Path, card: Card, rejected: dict[int, str]) -> CompletionRecord:
    small = {name: read_bytes(root / name) for name in metadata_files(card) if (root / name).is_file()}
    commits = (
        CommitRecord.from_json(read_json(commit_path(root, unit)), card, str(commit_path(root, unit)))
        for unit in range(card.units)
    )
    size = sum(shard.bytes for commit in commits for shard in commit.targets.values())
    return CompletionRecord(card, rejected, size, {name: digest.of_bytes(data) for name, data in small.items()})
