"""Writing a cache: initialise it, fill a claimed unit in any order, commit the unit. Safe against kill -9 at any time.

Rows are written at the place that the plan gives them, by pwrite into a file of this worker alone, so that memory stays
bounded for units of any size. A commit does this for every shard: it appends the index, then fsync, rename, and fsync
of the folder. Then it writes commits/K.json by the same steps. A shard without its commit record is not used, and is
written again.
"""

from __future__ import annotations

import csv
import io
import math
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import google_crc32c
import numpy as np

from spkd.cache import claims, mapped_plan
from spkd.cache.card import CONTENT, SERIES, Card
from spkd.cache.codec import Codec, compressed
from spkd.cache.folder import (
    CARD,
    CODEC,
    COMPLETE,
    FOLDERS,
    GROUP,
    HEAD,
    REJECTED,
    SPEECH,
    CommitRecord,
    CompletionRecord,
    ShardRecord,
    array_path,
    commit_path,
    committed_views,
    load_card,
    mapped_path,
    metadata_digest,
    metadata_files,
    most_bytes,
    only_from_copy,
    plan_path,
    shard_path,
    withdrawn_path,
)
from spkd.cache.layout import (
    HEADER,
    blank,
    chunk_bytes,
    chunk_rows,
    compress,
    index_bytes,
    row_bytes,
    unit_header,
    zarr_files,
)
from spkd.cache.plan import Plan
from spkd.errors import SpkdError, UsageError
from spkd.files import digest
from spkd.files.atomic import (
    PART,
    PROBE,
    PartFile,
    check_no_links,
    remove,
    remove_abandoned,
    worker_id,
    write_bytes,
    write_json,
)
from spkd.files.reading import State, holds, read_bytes
from spkd.outputs.target import Target


def initialise(root: Path, card: Card, parts: Sequence[Plan], head: bytes | None = None) -> Card:
    """Make a new cache, or let the one that is there grow by the further parts of the card.

    The rename of the card's file does it: plans and head are written before. A cache of this card, which may have grown
    since, is left as it is. The caller holds `claims.changing`, unless nobody else knows of the folder.

    Args:
        head: the file of the teacher's classifier, where the cache keeps it.
    Returns:
        The card of these parts of the cache, which keeps the origin of the first part.
    Raises:
        SpkdError: the folder holds a different cache, or other files.
    """
    check_folder(root, card)
    record, known = CompletionRecord.there(root), 0
    if head is not None:
        _write_again(root, HEAD, head, record)
    if (root / CARD).is_file():
        present = load_card(root)
        is_there = present.identity == card.identity or card.grows_to(present)
        if not is_there and not present.grows_to(card):
            raise _another(root, card, present)
        for number, plan in enumerate(parts[: len(present.parts)]):
            if not _is_plan(root, present, number, record):
                _write_again(root, str(plan_path(number)), plan.to_bytes(), record)
        if is_there:
            return present.with_parts(card.parts)
        card, known = present.with_parts(card.parts), len(present.parts)
    for number in range(known, len(parts)):
        parts[number].save(root, number)
    write_json(root / CARD, card.to_json())
    return card


def _write_again(root: Path, name: str, data: bytes, record: CompletionRecord | None) -> None:
    """Write a metadata file of a cache, unless it is there; not with other content than its completion record names."""
    hashed = digest.of_bytes(data)
    if not holds(root / name, data) and (record is None or record.sha256.get(name, hashed) == hashed):
        write_bytes(root / name, data)


def _is_plan(root: Path, card: Card, number: int, record: CompletionRecord | None) -> bool:
    """Whether the plan of a part is whole: as its completion record says or, where there is none, by its checksums."""
    name = str(plan_path(number))
    if record is not None and name in record.sha256:
        return metadata_digest(root, card, name) == record.sha256[name]
    try:
        Plan.read(read_bytes(root / name, most_bytes(card)), card, number, name)
    except (SpkdError, OSError):
        return False
    return True


def check_folder(root: Path, card: Card) -> None:
    """Check that a folder holds nothing but a cache of the card's series, or what an interrupted start leaves.

    Raises:
        SpkdError: it holds a different cache, or other files, or a folder within it is a symbolic link.
    """
    check_no_links(root, FOLDERS)
    if (root / CARD).is_file():
        present = load_card(root)
        if present.series != card.series:
            raise _another(root, card, present, [name for name in SERIES if name != "codecs"])
        return
    check_is_free(root)


def check_is_free(root: Path) -> None:
    """Check that a folder without a card holds nothing but what an interrupted start leaves. Raises UsageError."""
    ours = {"claims", "plan", SPEECH, HEAD, CODEC}
    if root.is_dir() and any(p.name not in ours and p.suffix != PART for p in root.iterdir()):
        raise UsageError(f"{root}: is not empty and holds no teacher cache; choose another folder with cache=FOLDER")


def _another(root: Path, card: Card, present: Card, names: Sequence[str] = CONTENT) -> UsageError:
    """Error for a folder that holds another cache than that of `card`; `names` are the parts that are compared."""
    way = "choose another folder with cache=FOLDER"
    if present.series == card.series:
        way = f"give a manifest that also has the utterances of the cache, to which it adds the others, or {way}"
    return UsageError(f"{root}: holds a cache of {card.difference(present, names)}{claims.last_change(root)}; {way}")


class ViewsAway(SpkdError):
    """A unit that is filled again lacks views that it had, whose audio is away: it is not committed."""


class UnitWriter:
    """Writer of one claimed unit.

    Args:
        fitted: target -> its fitted codec.
    """

    def __init__(self, root: Path, card: Card, plan: Plan, unit: int, fitted: Mapping[str, Codec]) -> None:
        self._root, self._card, self._plan, self._unit = root, card, plan, unit
        self._first = plan.unit(unit).start
        self._rejected: dict[int, str] = {}
        self._decoded: dict[int, State] = {}
        header = unit_header(card, unit)
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
            views: (B,) numbers of the views.
            values: (B, dim) at utterance level; (B, T, dim) at frame level, where T is the number of frames of the
                longest view. Further frames of shorter views are not stored.
        Raises:
            SpkdError: another number of frames than the target declares, or values that are not finite.
        """
        self._shards[name].put(views, values)

    def reject(self, view: int, reason: str, state: State | None = None) -> None:
        """Leave a view out; it cannot be read from the cache.

        Args:
            state: as of AudioError.
        """
        self._rejected[view] = reason
        if state is not None:
            self._decoded[view] = state

    def commit(self) -> dict[int, str] | None:
        """Make the unit durable and release its claim.

        Returns:
            Number of each rejected view -> the reason. None, with nothing written, where another worker took the unit
            over, because this one was stopped for longer than a claim lasts.
        Raises:
            ViewsAway: views are rejected that the unit had when it was committed before; its record is that of before.
        """
        sealed = {name: shard.seal(self._rejected) for name, shard in self._shards.items()}
        with claims.committing(self._root, self._unit) as is_held:
            if is_held and not commit_path(self._root, self._unit).is_file():
                if lost := self._lost():
                    claims.put_back_of(self._root, self._unit)
                    raise ViewsAway(f"unit {self._unit}: {lost} of the views that it had cannot be loaded")
                for shard in self._shards.values():
                    shard.publish()
                record = CommitRecord(
                    {view - self._first: reason for view, reason in self._rejected.items()},
                    {view - self._first: state for view, state in self._decoded.items()},
                    sealed,
                    {"host": socket.gethostname(), "worker": worker_id()},
                )
                write_json(commit_path(self._root, self._unit), record.to_json())
                remove(withdrawn_path(self._root, self._unit))
        if not is_held:
            self.abandon()
            return None
        claims.release(self._root, self._unit)
        return self._rejected

    def _lost(self) -> int:
        """Number of the rejected views that the unit had when it was committed before."""
        if not self._rejected:
            return 0
        had = committed_views(self._root, self._card, self._unit, self._plan.unit(self._unit)) or []
        return len(self._rejected.keys() & set(had))

    def abandon(self) -> None:
        """Remove the rows that were not committed, and release the claim."""
        for shard in self._shards.values():
            shard.abandon()
        claims.release(self._root, self._unit)


class _Shard:
    """A shard that is being filled, in a file of this worker alone."""

    def __init__(self, root: Path, plan: Plan, target: Target, unit: int, header: bytes, codec: Codec) -> None:
        self._target, self._codec, self._first_view = target, codec, plan.unit(unit).start
        start, count = plan.unit_places(target, unit)
        self._start, self._count = start.tolist(), count.tolist()
        self._checks: list[int | None] = [None] * len(start)  # checksum of each view's rows as they were written
        self._rows, self._used = plan.shard_rows(target), int(count.sum())
        self._row_bytes = row_bytes(target)
        check_no_links(root, [shard_path(Path(), target, unit).parent])
        self._part, self._header = PartFile(shard_path(root, target, unit)), header
        self._descriptor = self._part.file.fileno()

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
            self._write(data, HEADER + self._start[view] * self._row_bytes)
            self._checks[view] = google_crc32c.value(data)

    def seal(self, rejected: Mapping[int, str]) -> ShardRecord:
        """Finish the file, durably, under its temporary name.

        Args:
            rejected: the rejected views, whose rows become empty.
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
                raise SpkdError(
                    f"{self._part.file.name}: the rows of view {view + self._first_view} are not those written"
                )
        # Fill the last chunk with empty rows, then write header, chunks and index.
        chunks = math.ceil(self._used / chunk_rows(self._target))
        self._blank(self._used, chunks * chunk_rows(self._target) - self._used)
        self._write(self._header, 0)
        lengths, checks = self._chunks(chunks)
        size = HEADER + sum(lengths)
        index = index_bytes(self._target, self._rows, lengths)
        os.ftruncate(self._descriptor, size)
        self._write(index, size)
        self._part.sync()
        return ShardRecord(size + len(index), tuple(checks), google_crc32c.value(index))

    def publish(self) -> None:
        """Give the finished file its final name."""
        self._part.publish()

    def _chunks(self, chunks: int) -> tuple[list[int], list[int]]:
        """Length and checksum of every inner chunk. Chunks are compressed in the file here, if the codec does so."""
        step = chunk_bytes(self._target)
        plain = (os.pread(self._descriptor, step, HEADER + i * step) for i in range(chunks))
        if not compressed(self._target.codec):
            return [step] * chunks, [google_crc32c.value(chunk) for chunk in plain]
        packed = [compress(chunk) for chunk in plain]
        self._write(b"".join(packed), HEADER)
        return [len(chunk) for chunk in packed], [google_crc32c.value(chunk) for chunk in packed]

    def _write(self, data: bytes, offset: int) -> None:
        """Write bytes to the file. Raises OSError: it cannot be written; the error names it."""
        view = memoryview(data)
        while view:
            try:
                written = os.pwrite(self._descriptor, view, offset)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self._part.path)) from error
            view, offset = view[written:], offset + written

    def _blank(self, row: int, count: int) -> None:
        self._write(blank(self._target, count), HEADER + row * self._row_bytes)

    def abandon(self) -> None:
        """Remove the file, if it was not published."""
        self._part.abandon()


def _finite(values: np.ndarray) -> bool:
    if values.dtype != np.float16:
        return bool(np.isfinite(values).all())
    return not values.size or bool((values.view(np.uint16) & 0x7FFF).max() < 0x7C00)  # numpy's own is 9 times slower


def finalize(root: Path, card: Card, plan: Plan, left_out: Mapping[str, str] = MappingProxyType({})) -> bool:
    """Write the completion record once every unit is committed.

    The record holds the card and the digest of every file that it does not determine: plans, head, codebook, commit
    records. The commit records hold the checksums of the shards. So any flipped bit can be found from it. Readers use
    this record alone, so that a cache that grows changes for them by a single rename.

    Args:
        left_out: id of each utterance that is not in the plan, because it could not be measured -> the reason.
    Returns:
        Whether the cache is complete.
    Raises:
        SpkdError: the folder holds another cache by now.
    """
    if not _all_committed(root, card):
        return False
    if _is_covered(root, card, plan, left_out):
        for folder in ("claims", "commits", "plan"):
            if _is_folder(root / folder):
                remove_abandoned(root / folder)
        mapped_plan.mend(root, CompletionRecord.load(root))
        return True
    with claims.changing(root):
        present, record = load_card(root), CompletionRecord.there(root)
        stored = present.with_parts(present.parts[: len(card.parts)])
        if stored.identity != card.identity:
            raise _another(root, card, present)
        # Another process may have let the cache grow meanwhile: it completed it, or left that to who commits last.
        if card.grows_to(present) and _all_committed(root, present):
            stored = card = present
            plan = Plan.load(root, present)
        elif record is not None and card.grows_to(record.card):
            stored, plan = record.card, Plan.load(root, record.card)
        if not _all_committed(root, stored):  # some unit is extracted again
            return False
        if not _is_covered(root, card, plan, left_out):
            _complete(root, stored, plan, left_out)
    return True


def _all_committed(root: Path, card: Card) -> bool:
    return all(commit_path(root, unit).is_file() for unit in range(card.units))


def _is_covered(root: Path, card: Card, plan: Plan, left_out: Mapping[str, str]) -> bool:
    """Whether the completion record of a cache covers its files as they are; a damaged record covers none.

    Args:
        card: its card, perhaps without the parts of a later growth.
    Raises:
        SpkdError: a file was changed that no extraction changes.
    """
    record = CompletionRecord.there(root)
    if record is None or not (record.card.identity == card.identity or card.grows_to(record.card)):
        return False
    found = _digests(root, card)
    recorded = [name for name in metadata_files(card) if name in record.sha256]
    changed = [name for name in recorded if found.get(name) != record.sha256[name]]
    for name in changed:
        if name != REJECTED and not name.startswith("commits/"):
            raise SpkdError(f"{root / name}: missing, or changed since the cache was completed; {only_from_copy(root)}")
    if changed or not found.keys() <= record.sha256.keys():
        return False
    listed = _rejected_table(plan, record.rejected, left_out)
    return card.grows_to(record.card) or found.get(REJECTED) == (digest.of_bytes(listed) if listed else None)


def _digests(root: Path, card: Card) -> dict[str, str]:
    """Name of each metadata file of a card that is there -> its digest."""
    found = {name: metadata_digest(root, card, name) for name in metadata_files(card)}
    return {name: value for name, value in found.items() if value is not None}


def _complete(root: Path, card: Card, plan: Plan, left_out: Mapping[str, str]) -> None:
    """Write what follows from the units of a cache, remove what killed workers left, write the completion record."""
    rejected: dict[int, str] = {}
    size = 0
    for unit in range(plan.units):
        commit, first = CommitRecord.load(root, card, unit), plan.unit(unit).start
        rejected |= {first + view: reason for view, reason in commit.rejected.items()}
        size += sum(shard.bytes for shard in commit.targets.values())
    check_no_links(root, [array_path(target).parent for target in card.targets])
    for name, tree in zarr_files(card).items():
        write_json(root / name, tree)
    if table := _rejected_table(plan, rejected, left_out):
        write_bytes(root / REJECTED, table)
    else:
        (root / REJECTED).unlink(missing_ok=True)
    _remove_leftovers(root, card)
    record = CompletionRecord(card, rejected, size, _digests(root, card))
    mapped_plan.mend(root, record)
    write_json(root / COMPLETE, record.to_json())


def _rejected_table(plan: Plan, rejected: Mapping[int, str], left_out: Mapping[str, str]) -> bytes:
    """Content of the table of the utterances and views that a cache lacks; empty where it lacks none."""
    reasons = {**left_out, **{plan.view_name(view): reason for view, reason in rejected.items()}}
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([("utt", "reason"), *reasons.items()] if reasons else [])
    return out.getvalue().encode()


def _remove_leftovers(root: Path, card: Card) -> None:
    """Remove claims and unfinished files that killed workers left in the units of a card, all of which are committed.

    Workers of a further growth may be at work in other units.
    """
    written: dict[Path, set[str] | None] = {
        root: {CARD, COMPLETE, HEAD, CODEC, GROUP, REJECTED, PROBE},
        root / "plan": {path(part).name for part in range(len(card.parts)) for path in (plan_path, mapped_path)},
        root / "commits": {commit_path(root, unit).name for unit in range(card.units)},
        root / "claims": None,
    }
    for target in card.targets:
        written[root / target.name] = {array_path(target).name}
        if _is_folder(root / target.name) and _is_folder(root / target.name / "c"):
            written |= {shard_path(root, target, unit).parent: {"0"} for unit in range(card.units)}
    for folder, names in written.items():
        if _is_folder(folder):
            remove_abandoned(folder, names)
    for path in _entries(root / "commits"):
        # Of a unit that was filled again before a kill.
        if path.suffix == withdrawn_path(root, 0).suffix and path.with_suffix(".json").is_file():
            path.unlink(missing_ok=True)
    for path in _entries(root / "claims"):
        unit = path.name.partition(".")[0]
        if unit.isdecimal() and int(unit) < card.units:
            path.unlink(missing_ok=True)


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if _is_folder(folder) else []


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()
