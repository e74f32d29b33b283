"""Writing a cache: initialise it, fill a claimed unit in any order, commit the unit. Safe against kill -9 at any time.

Rows are written at the place that the plan gives them, by pwrite into a file of this worker alone, so that memory stays
bounded for units of any size. A commit does this for every shard: it appends the index, then fsync, rename, and fsync
of the folder. Then it writes commits/K.json by the same steps. A shard without its commit record is not used, and is
written again.
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
    """Make the metadata files of a new cache, with the card last.

    If a cache is there, check that it is the same one, or let it grow by the further parts of the card.

    Args:
        root: folder of the cache.
        card: its card.
        parts: the plan of each part that the card names.
        head: the file of the teacher's classifier, where the cache keeps it.
    Raises:
        SpkdError: the folder holds a different cache, or other files.
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
    """Check that a folder without a card holds no files other than those that an interrupted start leaves.

    Raises:
        SpkdError: it holds other files.
    """
    ours = {"plan", GROUP, HEAD, CODEC, *(t.name for t in targets)}
    if (
        not (root / CARD).is_file()
        and root.is_dir()
        and any(p.name not in ours and p.suffix != PART for p in root.iterdir())
    ):
        raise SpkdError(f"{root}: is not empty and holds no teacher cache; choose another folder with cache=FOLDER")


def _write_layout(root: Path, card: Card, parts: Sequence[Plan], known: int) -> None:
    """Write the plans from part `known` on, and the descriptions of the arrays."""
    for number in range(known, len(parts)):
        parts[number].save(root, number)
    write_json(root / GROUP, GROUP_METADATA)
    for target in card.targets:
        write_json(root / array_path(target), array_metadata(target, parts[0].shard_rows(target), card.units))


def _same_or_grown(root: Path, card: Card, parts: Sequence[Plan]) -> None:
    present = load_card(root)
    if present.fingerprint == card.fingerprint:
        if (root / COMPLETE).is_file():
            _cover_growth(root)  # a growth may have been killed after it wrote the card, before it wrote the record
        return
    if not present.grows_to(card):
        raise SpkdError(f"{root}: holds a cache of {card.difference(present)}; choose another folder with cache=FOLDER")
    _write_layout(root, card, parts, len(present.parts))
    write_json(root / CARD, card.to_json())
    if (root / COMPLETE).is_file():
        _cover_growth(root)


def _cover_growth(root: Path) -> None:
    """Update the completion record for the files that a growth changed.

    The parts that were complete can then be read while the others are extracted.
    """
    before = CompletionRecord.load(root)
    after = _record(root, before.card, before.rejected)
    if after != before:
        write_json(root / COMPLETE, after.to_json())


class UnitWriter:
    """Writer of one claimed unit.

    Args:
        root: folder of the cache.
        card: its card.
        plan: its plan.
        unit: number of the unit.
        fitted: target -> its fitted codec.
    """

    def __init__(self, root: Path, card: Card, plan: Plan, unit: int, fitted: Mapping[str, Codec]) -> None:
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
        """Store a target of some views of the unit.

        Args:
            name: name of the target.
            views: (B,) numbers of the views.
            values: (B, dim) at utterance level; (B, T, dim) at frame level, where T is the number of frames of the
                longest view. Further frames of shorter views are not stored.
        Raises:
            SpkdError: another number of frames than the target declares, or values that are not finite.
        """
        self._shards[name].put(views, values)

    def reject(self, view: int, reason: str) -> None:
        """Leave a view out; it cannot be read from the cache."""
        self._rejected[view] = reason

    def commit(self) -> dict[int, str] | None:
        """Make the unit durable and release its claim.

        Returns:
            Number of each rejected view -> the reason. None, with nothing written, where another worker took the unit
            over, because this one was stopped for longer than a claim lasts.
        """
        sealed = {name: shard.seal(self._rejected) for name, shard in self._shards.items()}
        with claims.committing(self._root, self._unit) as is_held:
            if is_held and not commit_path(self._root, self._unit).is_file():
                for shard in self._shards.values():
                    shard.publish()
                record = CommitRecord(
                    {view - self._first: reason for view, reason in self._rejected.items()},
                    sealed,
                    {"host": socket.gethostname(), "worker": worker_id()},
                )
                write_json(commit_path(self._root, self._unit), record.to_json())
        if not is_held:
            self.abandon()
            return None
        claims.release(self._root, self._unit)
        return self._rejected

    def abandon(self) -> None:
        """Remove the rows that were not committed, and release the claim."""
        for shard in self._shards.values():
            shard.abandon()
        claims.release(self._root, self._unit)


class _Shard:
    """A shard that is being filled, in a file of this worker alone."""

    def __init__(self, root: Path, plan: Plan, target: Target, unit: int, header: bytes, codec: Codec) -> None:
        self._path = shard_path(root, target, unit)
        self._target, self._codec, self._first_view = target, codec, plan.unit(unit).start
        start, count = plan.unit_places(target, unit)
        self._start, self._count = start.tolist(), count.tolist()
        self._checks: list[int | None] = [None] * len(start)  # checksum of each view's rows as they were written
        self._rows, self._used = plan.shard_rows(target), int(count.sum())
        self._row_bytes = row_bytes(target)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._part = part_path(self._path)
        self._part.unlink(missing_ok=True)  # left by an earlier attempt of this worker that failed
        self._descriptor = os.open(self._part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self._open, self._header = True, header

    def put(self, views: Sequence[int] | np.ndarray, values: np.ndarray) -> None:
        """Write the rows of some views, as `UnitWriter.put`."""
        target, height = self._target, 1 if values.ndim == 2 else values.shape[1]
        numbers = (np.asarray(views) - self._first_view).tolist()
        counts = [self._count[view] for view in numbers]
        if max(counts) != height:
            raise SpkdError(f"target {target.name}: the teacher gave {height} frames where it declares {max(counts)}")
        if min(counts) < height:
            values = np.concatenate([frames[:count] for frames, count in zip(values, counts, strict=True)])
        stored = self._codec.encode(values.reshape(-1, self._codec.dim))
        if not _finite(stored if stored.dtype.kind == "f" else values):
            raise SpkdError(
                f"target {target.name}: values that are not finite as {target.codec}; try storage.codec=float32"
            )
        for view, rows in zip(numbers, np.split(stored, np.cumsum(counts)[:-1]), strict=True):
            data = rows.tobytes()
            _write_all(self._descriptor, data, HEADER + self._start[view] * self._row_bytes)
            self._checks[view] = google_crc32c.value(data)

    def seal(self, rejected: Mapping[int, str]) -> ShardRecord:
        """Finish the file, durably, under its temporary name.

        Args:
            rejected: the rejected views, whose rows become empty.
        Raises:
            SpkdError: a view was never written, or its rows in the file are not those written.
        """
        # Read every view's rows back and compare their checksum.
        for view, check in enumerate(self._checks):
            if view + self._first_view in rejected:
                self._blank(self._start[view], self._count[view])
                continue
            if check is None:
                raise SpkdError(f"target {self._target.name}: view {view + self._first_view} was never written")
            size, offset = self._count[view] * self._row_bytes, HEADER + self._start[view] * self._row_bytes
            if google_crc32c.value(os.pread(self._descriptor, size, offset)) != check:
                raise SpkdError(f"{self._part}: the rows of view {view + self._first_view} are not those written")
        # Fill the last chunk with empty rows, then write header, chunks and index.
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
        """Give the finished file its final name."""
        os.replace(self._part, self._path)
        sync_folder(self._path.parent)

    def _chunks(self, chunks: int) -> tuple[list[int], list[int]]:
        """Length and checksum of every inner chunk. Chunks are compressed in the file here, if the codec does so."""
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
        """Remove the file, if it was not published."""
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
    """Write the completion record once every unit is committed.

    The record holds the card and the digest of every metadata file: plans, descriptions of arrays, commit records. The
    commit records hold the checksums of the shards. So any flipped bit can be found from it. Readers use this record
    alone, so that a cache that grows changes for them by a single rename.

    Args:
        root: folder of the cache.
        card: its card.
        plan: its plan.
    Returns:
        Whether the cache is complete.
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
    # Files left by workers that were killed; a file that is still being written is not needed.
    for left in root.glob(f"*/**/*{PART}"):
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
