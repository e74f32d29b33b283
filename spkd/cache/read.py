"""Reading a cache at the speed of a memory map."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple

import google_crc32c
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from spkd.cache import card as cards
from spkd.cache.contents import Crop, OneTeacher
from spkd.cache.layout import (
    Shard,
    chunk_lengths,
    chunk_rows,
    expect_shards,
    header_bytes,
    index_length,
    map_shard,
    row,
    shard_path,
)
from spkd.cache.plan import Plan
from spkd.cache.plan import file as plan_file
from spkd.cache.target import Target
from spkd.cache.write import COMPLETE, manifest_path, record_check, units_of
from spkd.errors import SpkdError
from spkd.files import read_json

PULLED = "pulled.json"  # where a copy came from; its time says when the copy was last used
WARM_RATE = 3e9  # bytes/s: memory gives 10e9 and more, disks less than this
JUDGED_BYTES = 1 << 20  # batches smaller than this say too little of the rate, and gain nothing from a second thread
TORCH_TYPES = {"<f2": torch.float16, "<f4": torch.float32, "|i1": torch.int8, "|u1": torch.uint8}


class Ragged(NamedTuple):
    """Frames of views of different lengths, one behind the other: values (sum of lengths, D), lengths (B,)."""

    values: Tensor
    lengths: np.ndarray

    def pieces(self) -> list[np.ndarray]:
        """The frames of each view: (length, D)."""
        return np.split(self.values.numpy(), np.cumsum(self.lengths)[:-1])


class Cache(OneTeacher):
    """A cache as `spkd extract` writes it.

    Safe in forked and spawned workers: maps are opened read-only on first use in each process.
    """

    def __init__(self, root: Path, card: dict[str, Any], plan: Plan, rejected: dict[int, str]) -> None:
        super().__init__(root, str(root), card, plan, rejected)
        self._keys = [cards.part_key(card, part) for part in range(len(card["parts"]))]
        self._shards: dict[str, dict[int, Shard]] = {}
        self._places: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._cold = True  # until a batch comes at the speed of memory
        self._pool: tuple[int, ThreadPoolExecutor] | None = None
        self._use: IO[bytes] | None = None

    @classmethod
    def open(cls, path: str | Path) -> Cache:
        """Open a complete cache; of one that grows, what was complete before.

        Raises:
            SpkdError: none there, not complete, of a newer format, or its card, plan or record is damaged.
        """
        root = Path(path)
        if not (root / COMPLETE).is_file():
            card = cards.load(root)
            units = units_of(card)
            done = sum(manifest_path(root, unit).is_file() for unit in range(units))
            raise SpkdError(
                f"{root}: extraction is not finished ({done} of {units} units); run the same `spkd extract` again"
            )
        record = read_record(root)
        card = record["card"]
        for part in range(len(card["parts"])):
            name = str(plan_file(part))
            if not (root / name).is_file():
                raise SpkdError(f"{root / name}: missing")
            if hashlib.sha256((root / name).read_bytes()).hexdigest() != record["sha256"].get(name):
                raise SpkdError(f"{root / name}: damaged, or of another cache (digest differs from {COMPLETE})")
        plan = Plan.load(root, len(card["parts"]))
        cache = cls(root, card, plan, {int(row): reason for row, reason in record["rejected"].items()})
        cache._use = use(root)
        return cache

    def __getstate__(self) -> dict[str, Any]:
        # A spawned worker opens its own maps: pickling one would copy the shard.
        return {**self.__dict__, "_shards": {}, "_pool": None, "_use": None}

    def batch(
        self,
        rows: np.ndarray,
        names: Sequence[str],
        crop: Crop | None = None,
        out: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """What the teacher said of a batch of views: `stored`, decoded.

        Returns:
            (B, D) at utterance level, (B, T, D) at frame level; float16 or float32 where stored so, else float32.
        Raises:
            As `stored`.
        """
        return self.decode(self.stored(rows, names, crop, out), names)

    def stored(
        self,
        rows: np.ndarray,
        names: Sequence[str],
        crop: Crop | None = None,
        out: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """What lies on disk of a batch of views. `decode` makes it what the teacher said, on any device.

        Args:
            rows: (B,) views. names: targets (for logits that follow from the head, the embedding is read). crop: the
                same stretch of every frame-level target; needed where the views differ in length. A crop that runs
                over a view's end goes on at its beginning. out: tensors to fill, by name, of the shapes and types
                returned; the rest is allocated, in pinned memory where there is CUDA.
        Returns:
            (B, columns) at utterance level, (B, T, columns) at frame level.
        Raises:
            SpkdError: a target the cache lacks, a rejected view, or a missing or damaged shard.
        """
        self.check(rows)
        out = out or {}
        return {name: self._gather(name, rows, crop, out.get(name)) for name in self.sources(names)}

    def ragged(self, rows: np.ndarray, name: str) -> Ragged:
        """A target of whole views, whatever their lengths, as stored: gathered into one preallocated tensor.

        Raises:
            SpkdError: as `stored`.
        """
        self.check(rows)
        (source,) = self.sources([name])
        target = self.targets[source]
        place, count = self._place(source)
        first, counts = place[rows], count[rows]
        values = self._empty(target, (int(counts.sum()),))
        ends = np.cumsum(counts)
        array, begins, heights = values.numpy(), first.tolist(), counts.tolist()
        shards = self._mapped(target, self.plan.unit_of[rows].tolist())

        def copy(a: int, b: int) -> None:
            for end, shard, at, height in zip(ends[a:b].tolist(), shards[a:b], begins[a:b], heights[a:b], strict=True):
                array[end - height : end] = shard.rows[at : at + height]

        self._copy(array, shards, begins, heights, copy)
        return Ragged(values, counts)

    def _gather(self, name: str, rows: np.ndarray, crop: Crop | None, out: Tensor | None) -> Tensor:
        target = self.targets[name]
        place, count = self._place(name)
        first, counts = place[rows], count[rows]
        height, skip = self.stretch(target, counts, crop)
        if out is None:
            out = self._empty(target, (len(rows),) if target.hop is None else (len(rows), height))
        array = out.numpy().reshape(len(rows), height, -1)
        shards = self._mapped(target, self.plan.unit_of[rows].tolist())
        starts = first + skip
        begins = starts.tolist()
        if (starts + height <= first + counts).all():

            def copy(a: int, b: int) -> None:
                for i in range(a, b):
                    at = begins[i]
                    array[i] = shards[i].rows[at : at + height]

        else:
            wrapped = first[:, None] + (skip[:, None] + np.arange(height)) % counts[:, None]

            def copy(a: int, b: int) -> None:
                for i in range(a, b):
                    array[i] = shards[i].rows[wrapped[i]]

        self._copy(array, shards, begins, [height] * len(rows), copy)
        return out

    def _copy(
        self,
        array: np.ndarray,
        shards: list[Shard],
        begins: list[int],
        heights: list[int],
        copy: Callable[[int, int], None],
    ) -> None:
        """Run copy(a, b) over all windows, with read-ahead where the last batch came from the disk, and on two
        threads where torch may use so many and there is enough to copy."""
        started = time.perf_counter()
        if self._cold:
            for shard, at, height in zip(shards, begins, heights, strict=True):
                shard.read_ahead(at, min(at + height, len(shard.rows)))
        count, big = len(shards), array.nbytes >= JUDGED_BYTES
        if big and count > 1 and torch.get_num_threads() > 1:
            other = self._helper().submit(copy, count // 2, count)
            copy(0, count // 2)
            other.result()
        else:
            copy(0, count)
        if big:
            # Read-ahead costs a fifth of the speed of warm pages and gains an order of magnitude on cold ones.
            self._cold = array.nbytes < WARM_RATE * (time.perf_counter() - started)

    def _helper(self) -> ThreadPoolExecutor:
        if self._pool is None or self._pool[0] != os.getpid():  # threads do not outlive a fork
            self._pool = (os.getpid(), ThreadPoolExecutor(1, "cache reader"))
        return self._pool[1]

    def _empty(self, target: Target, shape: tuple[int, ...]) -> Tensor:
        columns, dtype = row(target)
        shape = (*shape, columns)
        if get_worker_info() is None:
            return torch.empty(shape, dtype=TORCH_TYPES[dtype.str], pin_memory=torch.cuda.is_available())
        # A loader's worker sends its batches through shared memory: filled there, they need no second copy (torch's own
        # collate does the same). The loader pins them.
        storage = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize)
        return torch.empty(0, dtype=TORCH_TYPES[dtype.str]).set_(storage).reshape(shape)

    def _place(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        if name not in self._places:
            self._places[name] = self.plan.local_rows(self.targets[name])
        return self._places[name]

    def _mapped(self, target: Target, units: list[int]) -> list[Shard]:
        known = self._shards.setdefault(target.name, {})
        try:
            return [known[unit] for unit in units]
        except KeyError:
            new = sorted(set(units) - known.keys())
            rows = self.plan.shard_rows(target)
            paths = [shard_path(self.root, target, unit) for unit in new]
            expect_shards(paths, target, rows)
            for unit, path in zip(new, paths, strict=True):
                known[unit] = map_shard(path, target, rows, self.header(unit))
            return [known[unit] for unit in units]

    def header(self, unit: int) -> bytes:
        """The header that every shard of a unit has."""
        part, number = self.plan.part(unit)
        return header_bytes(self._keys[part], number)


def use(root: Path, alone: bool = False) -> IO[bytes] | None:
    """Lock a copy that was pulled while it is read, so that no other pull evicts it, and note the time; None for
    caches that were not pulled (those nobody evicts), and where `alone` is asked for and others read it."""
    try:
        file = open(root / PULLED, "rb")
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, (fcntl.LOCK_EX | fcntl.LOCK_NB) if alone else fcntl.LOCK_SH)
        if not alone:
            os.utime(root / PULLED)
    except OSError:
        if alone:
            file.close()
            return None
    return file


def read_record(root: Path) -> dict[str, Any]:
    """The completion record. Raises SpkdError where it is missing, damaged or of a newer format."""
    path = root / COMPLETE
    if not path.is_file():
        raise SpkdError(f"{path}: missing; only complete caches can be used so")
    return parse_record(path.read_bytes(), str(path))


def parse_record(data: bytes, where: str) -> dict[str, Any]:
    """A completion record from its bytes. Raises SpkdError where it is damaged or of a newer format."""
    try:
        record = json.loads(data)
    except ValueError as error:
        raise SpkdError(f"{where}: damaged, not valid JSON ({error})") from error
    if isinstance(record, dict) and isinstance(record.get("card"), dict) and "spkd_cache" in record["card"]:
        cards.check_format(record["card"], where)
    if not isinstance(record, dict) or "card" not in record or record.get("check") != record_check(record):
        raise SpkdError(f"{where}: damaged (it does not fit its own digest)")
    cards.check(record["card"], where)
    return record


def verify(root: str | Path) -> list[str]:
    """Read everything and compare it with the recorded digests. Returns one line per damaged file."""
    root = Path(root)
    cache = Cache.open(root)
    damaged = []
    for name, digest in read_record(root)["sha256"].items():
        path = root / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            damaged.append(f"{path}: missing or changed")
    if damaged:
        return damaged
    for unit in range(cache.plan.units):
        expected = read_json(manifest_path(root, unit))["targets"]
        for target in cache.targets.values():
            path = shard_path(root, target, unit)
            problem = shard_problem(path, target, cache.plan, cache.header(unit), expected[target.name])
            if problem:
                damaged.append(f"{path}: {problem}")
    return damaged


def shard_problem(path: Path, target: Target, plan: Plan, header: bytes, expected: dict[str, Any]) -> str | None:
    """What is wrong with a shard, compared with its unit's manifest; None where nothing is."""
    if not path.is_file():
        return "missing"
    size = path.stat().st_size
    if size != expected["bytes"]:
        return f"{size} bytes instead of {expected['bytes']}"
    length = index_length(target, plan.shard_rows(target))
    with open(path, "rb") as file:
        if file.read(len(header)) != header:
            return "of another cache or unit, or changed in its header"
        file.seek(size - length)
        index = file.read()
        if google_crc32c.value(index) != expected["index_crc32c"]:
            return "changed in its index"
        file.seek(len(header))
        for i, (count, check) in enumerate(zip(chunk_lengths(index), expected["chunk_crc32c"], strict=True)):
            if google_crc32c.value(file.read(count)) != check:
                rows = chunk_rows(target)
                return f"changed in rows {i * rows} to {(i + 1) * rows - 1}"
    return None
