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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from spkd.cache import card as cards
from spkd.cache.layout import (
    GROUP_METADATA,
    HEADER,
    array_metadata,
    chunk_bytes,
    chunk_rows,
    header_bytes,
    index_bytes,
    shard_path,
)
from spkd.cache.plan import FILE as PLAN_FILE
from spkd.cache.plan import Plan
from spkd.cache.target import DTYPES, Target
from spkd.errors import SpkdError
from spkd.files import create_json, read_json, sync_folder, write_bytes, write_json

HEAD_FILE = "head.safetensors"
COMPLETE = "COMPLETE.json"
CLAIM_STALE = 300.0  # s without a heartbeat after which a claim is taken over


def initialise(root: Path, card: dict[str, Any], plan: Plan, targets: list[Target], head: bytes | None) -> None:
    """Lay out a new cache, or check that the one there is the same (the card is written last).

    Raises:
        SpkdError: the folder holds a cache of something else, or other files.
    """
    if (root / cards.FILE).is_file():
        _check_same(root, card)
        return
    # An interrupted or concurrent start leaves these; anything else belongs to somebody.
    ours = {"plan", "zarr.json", HEAD_FILE, *(t.name for t in targets)}
    if root.is_dir() and any(p.name not in ours and p.suffix != ".part" for p in root.iterdir()):
        raise SpkdError(f"{root}: is not empty and holds no teacher cache; choose another folder with cache=FOLDER")
    plan.save(root)
    write_json(root / "zarr.json", GROUP_METADATA)
    for target in targets:
        write_json(root / target.name / "zarr.json", array_metadata(target, plan.shard_rows(target), plan.units))
    if head is not None:
        write_bytes(root / HEAD_FILE, head)
    if not create_json(root / cards.FILE, card):
        _check_same(root, card)


def _check_same(root: Path, card: dict[str, Any]) -> None:
    theirs = cards.load(root)
    if theirs["fingerprint"] != card["fingerprint"]:
        raise SpkdError(
            f"{root}: holds a cache of {cards.difference(card, theirs)}; choose another folder with cache=FOLDER"
        )


def manifest_path(root: Path, unit: int) -> Path:
    return root / "manifest" / f"{unit}.json"


def claim_units(root: Path, units: int) -> Iterator[int]:
    """Units without a manifest, each claimed for this process before it is yielded, released after."""
    for unit in range(units):
        if manifest_path(root, unit).is_file() or not _claim(_claim_path(root, unit)):
            continue
        try:
            if not manifest_path(root, unit).is_file():
                yield unit
        finally:
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


class UnitWriter:
    """Fills one claimed unit."""

    def __init__(self, root: Path, plan: Plan, targets: list[Target], unit: int, fingerprint: str) -> None:
        self._root, self._plan, self._unit = root, plan, unit
        self._views = plan.unit(unit)
        self._rejected: dict[int, str] = {}
        self._shards = {t.name: _Shard(root, plan, t, unit, fingerprint) for t in targets}

    def put(self, name: str, row: int, values: np.ndarray) -> None:
        """Store what the teacher said of view `row`: (rows, dim), or (dim,) at utterance level.

        Raises:
            SpkdError: another number of rows than the target declares, or values that are not finite.
        """
        self._shards[name].put(row, values)

    def reject(self, row: int, reason: str) -> None:
        """Leave a view out; its rows stay NaN and readers never serve it."""
        self._rejected[row] = reason

    def commit(self) -> dict[int, str]:
        """Make the unit durable. Returns the rejected views with their reasons."""
        files = {}
        for shard in self._shards.values():
            files[str(shard.path.relative_to(self._root))] = shard.finish(self._rejected)
        record = {
            "unit": self._unit,
            "views": [self._views.start, self._views.stop],
            "rejected": {str(row): reason for row, reason in sorted(self._rejected.items())},
            "files": files,
            "writer": {"host": socket.gethostname(), "pid": os.getpid()},
        }
        write_json(manifest_path(self._root, self._unit), record)
        return self._rejected

    def abandon(self) -> None:
        """Remove what was not committed."""
        for shard in self._shards.values():
            shard.abandon()


class _Shard:
    """One shard being filled: rows land at their planned place in a `.part` file."""

    def __init__(self, root: Path, plan: Plan, target: Target, unit: int, fingerprint: str) -> None:
        self.path = shard_path(root, target, unit)
        self._target, self._first_view = target, plan.unit(unit).start
        start, count = plan.local_rows(target)
        self._start, self._count = (column[plan.unit(unit).start : plan.unit(unit).stop] for column in (start, count))
        self._written = np.zeros(len(self._start), bool)
        self._rows = plan.shard_rows(target)
        self._chunks = math.ceil(int(self._count.sum()) / chunk_rows(target))
        self._row_bytes = target.dim * DTYPES[target.dtype].itemsize
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._part = self.path.with_name(f"0.{socket.gethostname()}.{os.getpid()}.part")
        self._descriptor = os.open(self._part, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        _write_all(self._descriptor, header_bytes(fingerprint, unit), 0)

    def put(self, row: int, values: np.ndarray) -> None:
        view, target = row - self._first_view, self._target
        with np.errstate(over="ignore"):  # an overflow becomes infinite, which is refused below
            stored = np.ascontiguousarray(values, DTYPES[target.dtype]).reshape(-1, target.dim)
        if len(stored) != self._count[view]:
            raise SpkdError(
                f"target {target.name}: the teacher gave {len(stored)} rows where it declares {self._count[view]}"
            )
        if not np.isfinite(stored).all():
            raise SpkdError(
                f"target {target.name}: values that are not finite as {target.dtype}; try storage.dtype=float32"
            )
        _write_all(self._descriptor, stored.tobytes(), HEADER + int(self._start[view]) * self._row_bytes)
        self._written[view] = True

    def finish(self, rejected: dict[int, str]) -> dict[str, Any]:
        for view in np.flatnonzero(~self._written):
            if int(view) + self._first_view not in rejected:
                raise SpkdError(f"target {self._target.name}: view {int(view) + self._first_view} was never written")
            self._blank(int(self._start[view]), int(self._count[view]))
        used = int(self._count.sum())
        self._blank(used, self._chunks * chunk_rows(self._target) - used)
        step = chunk_bytes(self._target)
        size = HEADER + self._chunks * step
        index = index_bytes(self._target, self._rows, self._chunks)
        _write_all(self._descriptor, index, size)
        checks = [google_crc32c.value(os.pread(self._descriptor, step, HEADER + i * step)) for i in range(self._chunks)]
        os.fsync(self._descriptor)
        os.close(self._descriptor)
        os.replace(self._part, self.path)
        sync_folder(self.path.parent)
        return {"bytes": size + len(index), "chunk_crc32c": checks, "index_crc32c": google_crc32c.value(index)}

    def _blank(self, row: int, count: int) -> None:
        blank = np.full((count, self._target.dim), np.nan, DTYPES[self._target.dtype])
        _write_all(self._descriptor, blank.tobytes(), HEADER + row * self._row_bytes)

    def abandon(self) -> None:
        if self._part.exists():
            os.close(self._descriptor)
            self._part.unlink()


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def finalize(root: Path, units: int) -> bool:
    """Write the completion record once every unit is committed. Returns whether the cache is complete.

    The record holds the digest of every small file (card, plan, array metadata, unit manifests), and the unit
    manifests hold checksums of the shards: from it, any flipped bit can be found.
    """
    if (root / COMPLETE).is_file():
        return True
    if not all(manifest_path(root, unit).is_file() for unit in range(units)):
        return False
    for left in root.glob("*/**/*.part"):  # of workers that were killed
        left.unlink(missing_ok=True)
    rejected: dict[str, str] = {}
    for unit in range(units):
        rejected |= read_json(manifest_path(root, unit))["rejected"]
    small = [root / cards.FILE, root / PLAN_FILE, *sorted(root.glob("**/zarr.json")), *root.glob(HEAD_FILE)]
    small += [manifest_path(root, unit) for unit in range(units)]
    record = {
        "units": units,
        "rejected": rejected,
        "sha256": {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in small},
    }
    write_json(root / COMPLETE, record | {"check": record_check(record)})
    return True


def record_check(record: dict[str, Any]) -> str:
    """Digest of the completion record itself (without its `check`)."""
    content = {k: v for k, v in record.items() if k != "check"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
